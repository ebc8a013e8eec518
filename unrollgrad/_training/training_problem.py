"""From a loss and an optax optimizer to an unrolled problem: inner training loops."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._training import inner_optimizers
from unrollgrad.types import Key, State, Theta, UnrolledProblem


class TrainingState(NamedTuple):
    """The inner state of ``training_problem``.

    Attributes:
        params: Inner weights.
        opt_state: The inner optimizer's state.
    """

    params: Any
    opt_state: Any


def training_problem(
    *,
    loss: Callable[[Theta, Any, Any, Key], Any],
    init_params: Callable[[Key], Any],
    optimizer: Callable[[Theta, Any], optax.GradientTransformation],
    sample_batch: Callable[[Key], Any] | None = None,
    meta_loss: Callable[[Theta, Any, Key], Any] | None = None,
    horizon: int | Callable[[Key], Any] = 1000,
) -> UnrolledProblem:
    """Training inner weights with an optimizer that theta controls, as an unrolled problem.

    One inner step draws a batch, takes the gradient of ``loss`` with respect to the weights, and
    applies ``optimizer(theta, t)``; its step loss is ``meta_loss`` at the new weights. Theta may
    enter anywhere: learning rates, regularisation, data weights, augmentation, or all the weights
    of a learned optimizer, which is just such a function of (theta, t).

    Backpropagation goes through the optimizer's own arithmetic, which some have not been written
    for. It is tried once when the step is about to be differentiated, and a warning names the
    setting that helps: ``eps_root`` for optax.adam and its relatives; nothing for optax.radam.
    Evolution strategies only run it forwards.

    Args:
        loss: ``loss(theta, params, batch, key) -> scalar``, the inner training loss.
        init_params: ``init_params(key) -> params``, any pytree of arrays: a dict, flax parameters,
            the arrays of an equinox module (``eqx.partition(model, eqx.is_array)[0]``). Leaves that
            are not floating (counters, keys) stay as they are.
        optimizer: ``optimizer(theta, t) -> optax transform``, called inside every step; its state
            must have the same structure for every (theta, t) and keeps the dtypes it begins with.
            Line searches get ``value``, ``grad`` and ``value_fn``.
            ``optax.inject_hyperparams`` is no exception: the numbers it keeps in the state are
            those of this step's theta and t (optax alone would keep those of ``init``).
        sample_batch: ``sample_batch(key) -> batch`` from data on the device. None: batches are
            streamed through ``estimate(..., data=)``, one slice per step.
        meta_loss: ``meta_loss(theta, params, key) -> scalar``, such as the validation loss. By
            default the training loss at the new weights, on the same batch.
        horizon: Inner steps in an episode, or a sampler of them.

    Returns:
        A problem whose inner state is ``TrainingState(params, opt_state)``.

    Raises:
        TypeError: If ``loss``, ``init_params`` or ``optimizer`` is no function.
        ValueError: When stepping, if the loss is no scalar, or neither ``sample_batch`` nor
            ``data`` gives a batch; in ``init``, if ``optax.inject_hyperparams`` keeps
            hyperparameters in 16 bits.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> problem = ug.training_problem(
        ...     loss=lambda theta, w, batch, key: jnp.mean((w - batch) ** 2),
        ...     init_params=lambda key: jnp.zeros(3),
        ...     optimizer=lambda theta, t: optax.sgd(jnp.exp(theta["log_lr"])),
        ...     sample_batch=lambda key: 1 + 0.1 * jax.random.normal(key, (3,)), horizon=20)
        >>> theta = {"log_lr": jnp.log(0.1)}
        >>> round(float(ug.episode_loss(problem, jax.random.key(0), theta)), 1)
        0.3
    """
    for name, function in {
        "loss": loss,
        "init_params": init_params,
        "optimizer": optimizer,
    }.items():
        if not callable(function):
            raise TypeError(
                f"`{name}` must be a function; got a {type(function).__name__}. For a fixed "
                "optimizer write `optimizer=lambda theta, t: optax.adam(1e-3)`."
            )

    # Tried once for the same shapes, not in every trace.
    derivatives = functools.cache(
        functools.partial(inner_optimizers.warn_of_derivatives, optimizer)
    )
    float16 = functools.cache(functools.partial(inner_optimizers.warn_of_float16, optimizer))

    def init(key: Key, theta: Theta) -> TrainingState:
        params = arguments.strong_state(init_params(key), made_by="init_params")
        trained = _floating(params)
        float16(inner_optimizers.shapes(theta), inner_optimizers.shapes(trained))
        return TrainingState(params, inner_optimizers.init(optimizer, theta, trained))

    def step(key: Key, theta: Theta, state: TrainingState, t: Any, batch: Any = None):
        key_batch, key_loss, key_meta = jax.random.split(key, 3)
        if batch is None:
            if sample_batch is None:
                raise ValueError(
                    "no batch: this training_problem has `sample_batch=None`, so pass "
                    "`data=` to `estimate`, with one batch per inner step along its leading axis."
                )
            batch = sample_batch(key_batch)
        params = _floating(state.params)

        def whole(params):
            return _merged(params, state.params)

        def inner(params):
            value = loss(theta, whole(params), batch, key_loss)
            arguments.check_loss("loss", value)
            return value

        value, grad = jax.value_and_grad(inner)(params)
        updates, opt_state = inner_optimizers.update(
            optimizer, theta, t, grad, state.opt_state, params, value=value, value_fn=inner
        )
        updates = inner_optimizers.when_differentiated(
            updates,
            functools.partial(
                derivatives, inner_optimizers.shapes(theta), inner_optimizers.shapes(params)
            ),
        )
        params = optax.apply_updates(params, updates)
        if meta_loss is None:
            outer = inner(params)
        else:
            outer = meta_loss(theta, whole(params), key_meta)
        return TrainingState(whole(params), opt_state), outer

    return UnrolledProblem(init, step, horizon)


def _floating(params: Any) -> Any:
    """The leaves that are trained; None in place of the others."""

    def leaf(x):
        return x if jnp.issubdtype(arguments.dtype_of(x), jnp.inexact) else None

    return jax.tree.map(leaf, params)


def _merged(trained: Any, params: Any) -> Any:
    """``params`` with the trained leaves in place of their own."""

    def leaf(new, old):
        return old if new is None else new

    return jax.tree.map(leaf, trained, params, is_leaf=lambda x: x is None)


def final_loss(
    problem: UnrolledProblem, evaluate: Callable[[Key, Theta, State], Any]
) -> UnrolledProblem:
    """The problem whose J is exactly the loss of the final state: zero step losses, ``evaluate``.

    Windowed estimators see it as a telescoping sum, (T/K) (L_end - L_start) per window, with the
    evaluation's key fixed for the episode; persistent ones weigh the two ends with their own
    accumulated noise, which is unbiased and of lower variance.

    Args:
        problem: The inner loop; its horizon must be static. Its own step losses are dropped.
        evaluate: ``evaluate(key, theta, state) -> scalar``.

    Raises:
        ValueError: If the horizon is sampled.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=500)
        >>> final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
        >>> round(float(ug.episode_loss(final, jax.random.key(0), theta)), 3)
        8.0
    """
    inner_loop.static_horizon(problem, "final_loss")

    def step(key: Key, theta: Theta, state: State, t: Any, *data: Any):
        result = problem.step(key, theta, state, t, *data)
        if not (isinstance(result, tuple) and len(result) == 2):
            return result  # refused with its own message, in ``inner_loop.check_step``
        return result[0], jnp.zeros_like(result[1])

    return problem._replace(step=step, evaluate=evaluate)
