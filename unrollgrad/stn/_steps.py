"""What both self-tuning networks are made of: training steps, and the step of hyperparameters."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad import noise
from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad._core.endless import endless
from unrollgrad._training import inner_optimizers
from unrollgrad.stn.losses import plus
from unrollgrad.stn.response import Response, as_vector
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Estimate,
    GradientEstimator,
    Key,
    MadeBy,
    Numeric,
    Sigma,
    StnInfo,
    Theta,
)

_PARAMS, _RESPONSE, _TRAIN, _META = range(4)  # folded into an episode's key


class Settings(NamedTuple):
    """The arguments of the factories."""

    loss: Callable[..., Numeric]
    meta_loss: Callable[..., Numeric]
    init_params: Callable[[Key], ArrayTree]
    sample_batch: Callable[[Key], Any]
    inner_optimizer: optax.GradientTransformation
    response_optimizer: optax.GradientTransformation | None
    sigma_optimizer: optax.GradientTransformation | None  # None: sigma is not tuned
    response: Response
    sigma: Sigma
    entropy: Numeric
    train_steps: int
    num_perturbations: int
    warm_up: int


class SelfTuning(NamedTuple):
    """Where a self-tuning network stands: ``state.carried``.

    Attributes:
        params: The weights; of ``stn`` those at theta = 0, to which the response is added.
        response: The response's own weights.
        scales: sigma, as softplus(scales); None if sigma is not tuned.
        optimizer: The state of the weights' optimizer.
        response_optimizer: The state of the response's optimizer.
        sigma_optimizer: The state of sigma's optimizer; None if sigma is not tuned.
    """

    params: Any
    response: Any
    scales: Any
    optimizer: optax.OptState
    response_optimizer: optax.OptState
    sigma_optimizer: Any


class Draw(NamedTuple):
    """What a training step draws: a batch, its key, and perturbations in units of sigma."""

    batch: Any
    key: Key
    units: Any


class Method(NamedTuple):
    """What tells the two networks apart.

    Attributes:
        name: The factory's.
        offset: ``offset(theta, center)``, of which the response is a function; ``center`` is
            theta's current value.
        gradients: ``gradients(settings, theta, carried, draw)``: the gradients of the params and of
            the response, and the losses ``(train_loss, perturbed_loss)``.
    """

    name: str
    offset: Callable[[Any, Any], Any]
    gradients: Callable[..., tuple[Any, Any, tuple[jax.Array, jax.Array]]]


def self_tuning(chosen: Settings, method: Method) -> GradientEstimator:
    """Makes the estimator: ``train_steps`` training steps, and the gradient for theta."""
    chosen = _checked(chosen)
    of_sigma = chosen.sigma_optimizer

    def begin(episode: Episode, theta: Theta) -> SelfTuning:
        params = chosen.init_params(jax.random.fold_in(episode.key, _PARAMS))
        advice = "Let the functions close over the others."
        params = arguments.floating("init_params(key)", params, advice)
        response = chosen.response.init(jax.random.fold_in(episode.key, _RESPONSE), params, theta)
        response = arguments.floating("response.init(key, params, theta)", response, advice)
        _check_functions(chosen, episode.key, theta, params, response)
        scales, of_scales = None, None
        if of_sigma is not None:
            scales = jax.tree.map(_inverse_softplus, _sigma(chosen, theta))
            of_scales = _opened(of_sigma, scales)
        return SelfTuning(
            params,
            response,
            scales,
            _opened(chosen.inner_optimizer, params),
            _opened(_of_response(chosen), response),
            of_scales,
        )

    def step(episode: Episode, theta: Theta, carried: SelfTuning):
        call = jax.random.fold_in(jax.random.fold_in(episode.key, _TRAIN), episode.t)

        def train(carried, i):
            draw = _draw(chosen, jax.random.fold_in(call, i), theta)
            return _train(chosen, method, theta, carried, draw)

        steps = jnp.arange(chosen.train_steps, dtype=jnp.int32)
        carried, losses = jax.lax.scan(train, carried, steps)
        key = jax.random.fold_in(jax.random.fold_in(episode.key, _META), episode.t)
        grad, of_scales, value = _hypergradient(chosen, method, theta, carried, key)
        warm = episode.t > chosen.warm_up
        grad = jax.tree.map(lambda g: jnp.where(warm, g, jnp.zeros_like(g)), grad)
        sigma = sigma_of(chosen, theta, carried.scales)
        train_loss, perturbed_loss = map(jnp.mean, losses)
        info = StnInfo(
            inner_steps=jnp.int32(chosen.train_steps),
            train_loss=train_loss,
            perturbed_loss=perturbed_loss,
            theta=as_vector(theta),
            sigma=as_vector(sigma),
        )
        if of_sigma is not None:
            moved = _moved(of_sigma, of_scales, carried.sigma_optimizer, carried.scales, value)
            before = (carried.scales, carried.sigma_optimizer)
            scales, state = jax.tree.map(lambda new, old: jnp.where(warm, new, old), moved, before)
            carried = carried._replace(scales=scales, sigma_optimizer=state)
        return Estimate(grad, value, info), carried

    made_by = MadeBy(method.name, (("tune_sigma", of_sigma is not None),))
    return endless(made_by, begin, step, batches="`sample_batch` and inside `meta_loss`")


def sigma_of(chosen: Settings, theta: Theta, scales: Any) -> Any:
    """The standard deviations, a tree with theta's shapes, in at least float32."""
    if chosen.sigma_optimizer is None:
        return _sigma(chosen, theta)
    return jax.tree.map(jax.nn.softplus, scales)


def perturbed(theta: Theta, sigma: Any, unit: Any) -> Theta:
    """Perturbs theta by sigma * unit, in theta's dtypes."""
    with standard_promotion():
        return jax.tree.map(lambda x, s, u: (x + s * u).astype(x.dtype), theta, sigma, unit)


def move(chosen: Settings, response: Any, offset: Any, params: Any) -> Any:
    """The response's move of the weights, in their dtypes."""
    moves = chosen.response.apply(response, offset)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), moves, params)


def shares_weights(chosen: Settings) -> bool:
    """Whether the groups of a batch share the weights: there are several, and quax is there."""
    several = chosen.num_perturbations > 1 and chosen.response.shared is not None
    return several and importlib.util.find_spec("quax") is not None


def moved(chosen: Settings, response: Any, offset: Any, params: Any) -> Callable[[Any, bool], Any]:
    """``moved(share, linear)``: the weights after a share of the response's move, shared."""
    shared = chosen.response.shared
    assert shared is not None

    def after(share, linear):
        part = jax.tree.map(lambda x: x * jnp.asarray(share).astype(x.dtype), offset)
        return shared(response, params, part, linear)

    return after


def over_groups(chosen: Settings, function: Callable[..., jax.Array], draw: Draw) -> jax.Array:
    """The mean of ``function(unit, rows, key)`` over the groups of a batch's rows."""
    groups = chosen.num_perturbations
    if groups == 1:
        return function(jax.tree.map(lambda x: x[0], draw.units), draw.batch, draw.key)

    def cut(path, x):
        if jnp.ndim(x) == 0 or x.shape[0] % groups:
            raise ValueError(
                f"`num_perturbations`={groups} must divide the rows of a batch, along the leading "
                f"axis of every leaf; batch{jax.tree_util.keystr(path)} is "
                f"{arguments.describe(x)}. Use one of its divisors, or 1."
            )
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])

    rows = jax.tree_util.tree_map_with_path(cut, draw.batch)
    return jnp.mean(jax.vmap(function)(draw.units, rows, jax.random.split(draw.key, groups)))


def as_loss(loss: Numeric) -> jax.Array:
    """The loss, in at least float32."""
    return jnp.asarray(loss, wide(loss))


def widened(tree: Any) -> Any:
    """The tree in at least float32."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def _draw(chosen: Settings, key: Key, theta: Theta) -> Draw:
    of_batch, of_loss, of_units = jax.random.split(key, 3)
    units = noise.sample(noise.gaussian(), of_units, theta, chosen.num_perturbations)
    return Draw(chosen.sample_batch(of_batch), of_loss, units)


def _train(chosen: Settings, method: Method, theta: Theta, carried: SelfTuning, draw: Draw):
    """One training step of the weights and of the response."""
    grad, of_response, losses = method.gradients(chosen, theta, carried, draw)
    params, optimizer = _moved(
        chosen.inner_optimizer, grad, carried.optimizer, carried.params, losses[0]
    )
    response, response_optimizer = _moved(
        _of_response(chosen),
        of_response,
        carried.response_optimizer,
        carried.response,
        losses[1],
    )
    return carried._replace(
        params=params,
        response=response,
        optimizer=optimizer,
        response_optimizer=response_optimizer,
    ), losses


def _hypergradient(
    chosen: Settings, method: Method, theta: Theta, carried: SelfTuning, key: Key
) -> tuple[Any, Any, jax.Array]:
    """The gradients for theta and the scales, and the validation loss."""
    of_loss, of_units = jax.random.split(key)
    tuned = chosen.sigma_optimizer is not None
    units = noise.sample(noise.gaussian(), of_units, theta, 1)
    unit = jax.tree.map(lambda x: x[0], units)

    def objective(theta_now, scales):
        sigma = sigma_of(chosen, theta, scales)
        there = perturbed(theta_now, sigma, unit) if tuned else theta_now
        offset = method.offset(widened(there), widened(jax.lax.stop_gradient(theta)))
        params = plus(carried.params, move(chosen, carried.response, offset, carried.params))
        value = as_loss(chosen.meta_loss(there, params, of_loss))
        spread = sum(jnp.sum(jnp.log(s)) for s in jax.tree.leaves(sigma)) if tuned else 0
        with standard_promotion():
            return value - (chosen.entropy * spread if tuned else 0), value

    both = jax.grad(objective, (0, 1), has_aux=True)
    (grad, of_scales), value = both(theta, carried.scales)
    return grad, of_scales, value


def _of_response(chosen: Settings) -> optax.GradientTransformation:
    given = chosen.response_optimizer
    return chosen.inner_optimizer if given is None else given


def _opened(optimizer: optax.GradientTransformation, variable: Any) -> optax.OptState:
    state = inner_optimizers.init(lambda theta, t: optimizer, (), variable)
    return jax.tree.map(arguments.strong, state)


def _moved(
    optimizer: optax.GradientTransformation,
    grad: Any,
    state: optax.OptState,
    variable: Any,
    value: jax.Array,
) -> tuple[Any, optax.OptState]:
    """One step of a variable; ``value`` is the loss whose gradient is given."""
    updates, state = inner_optimizers.update(
        lambda theta, t: optimizer, (), 0, grad, state, variable, value=value
    )
    with standard_promotion():
        return optax.apply_updates(variable, updates), state


def _sigma(chosen: Settings, theta: Theta) -> Any:
    full = arguments.broadcast_sigma(chosen.sigma, theta)
    return jax.tree.map(
        lambda s, x: jnp.broadcast_to(jnp.asarray(s, wide(x.dtype)), x.shape), full, theta
    )


def _inverse_softplus(x: jax.Array) -> jax.Array:
    return x + jnp.log(-jnp.expm1(-x))


def _checked(chosen: Settings) -> Settings:
    """Checks the arguments that need no theta."""
    for name in ("loss", "meta_loss", "init_params", "sample_batch"):
        if not callable(given := getattr(chosen, name)):
            raise TypeError(f"`{name}` must be a function; got a {type(given).__name__}.")
    for name in ("inner_optimizer", "response_optimizer", "sigma_optimizer"):
        given = getattr(chosen, name)
        if given is not None and not isinstance(given, optax.GradientTransformation):
            raise TypeError(
                f"`{name}` must be an optax transformation such as optax.sgd(0.1); got "
                f"{arguments.describe(given)}. A best response knows nothing of the optimizer, so "
                "that its settings cannot be tuned here: use ug.training_problem for those."
            )
    if not isinstance(chosen.response, Response):
        raise TypeError(
            "`response` must be stn.scaled_rows(), stn.linear() or stn.Response(init, apply); got "
            f"{arguments.describe(chosen.response)}."
        )
    arguments.check_sigma(chosen.sigma)
    arguments.number("entropy", chosen.entropy)
    if (
        isinstance(chosen.warm_up, bool)
        or not isinstance(chosen.warm_up, int)
        or chosen.warm_up < 0
    ):
        raise ValueError(
            f"`warm_up` must be a whole number of calls, 0 or more; got {chosen.warm_up!r}."
        )
    return chosen._replace(
        train_steps=arguments.positive_int("train_steps", chosen.train_steps),
        num_perturbations=arguments.positive_int("num_perturbations", chosen.num_perturbations),
    )


def _check_functions(chosen: Settings, key: Key, theta: Theta, params: Any, response: Any) -> None:
    """Checks by their shapes alone what the user's functions return."""
    named = {"theta": theta, "params": params, "batch": None, "key": key}
    inner_loop.check_call("loss", chosen.loss, **named)
    inner_loop.check_call("meta_loss", chosen.meta_loss, theta=theta, params=params, key=key)
    batch = jax.eval_shape(chosen.sample_batch, key)
    found = jax.eval_shape(chosen.loss, theta, params, batch, key)
    arguments.check_loss("loss", found)
    arguments.check_loss("meta_loss", jax.eval_shape(chosen.meta_loss, theta, params, key))
    moves = jax.eval_shape(chosen.response.apply, response, widened(theta))
    if difference := arguments.shape_difference(params, moves):
        raise TypeError(
            "`response.apply(weights, offset)` must return a tree like params; it differs at "
            f"params{difference}."
        )
