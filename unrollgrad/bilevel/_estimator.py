"""Makes a ``GradientEstimator`` of an algorithm that begins once and never ends.

``begin(episode, theta) -> carried`` and ``step(episode, theta, carried) -> (Estimate, carried)``
are all that an algorithm is. ``average`` begins a replica again after a non-finite gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad._core.dtypes import standard_promotion
from unrollgrad._core.endless import endless
from unrollgrad._training import inner_optimizers
from unrollgrad.bilevel import data
from unrollgrad.bilevel._losses import Losses
from unrollgrad.bilevel.advice import advice
from unrollgrad.bilevel.unrolled import InnerOptimizer, by_theta
from unrollgrad.implicit import trees
from unrollgrad.types import (
    ArrayTree,
    BilevelInfo,
    Episode,
    Estimate,
    GradientEstimator,
    Key,
    MadeBy,
    Theta,
)

_PARAMS = 0  # folded into an episode's key


class Before(NamedTuple):
    """Theta in the last call, and the norm of its gradient: they tell the outer rate."""

    theta: Any
    grad_norm: jax.Array


class Settings(NamedTuple):
    """What all algorithms have in common."""

    name: str
    losses: Losses
    init_params: Callable[[Key], ArrayTree]
    inner_optimizer: inner_optimizers.Optimizer


def settings(
    name: str,
    losses: Losses,
    init_params: Callable[[Key], ArrayTree],
    inner_optimizer: InnerOptimizer,
) -> Settings:
    """Checks the arguments that all factories have."""
    for argument, function in {
        "outer": losses.outer,
        "inner": losses.inner,
        "init_params": init_params,
    }.items():
        trees.check_function(argument, function)
    data.check_source("outer_data", losses.outer_data)
    data.check_source("inner_data", losses.inner_data)
    return Settings(name, losses, init_params, optimizer("inner_optimizer", inner_optimizer))


def optimizer(name: str, given: InnerOptimizer) -> inner_optimizers.Optimizer:
    """The optimizer as a function of theta and the step; raises TypeError if it is none."""
    if not isinstance(given, optax.GradientTransformation) and not callable(given):
        raise TypeError(
            f"`{name}` must be an optax transformation such as optax.sgd(0.1), or a function of "
            f"theta that returns one; got {arguments.describe(given)}."
        )
    return by_theta(given)


def first_params(chosen: Settings, episode: Episode, theta: Theta) -> Any:
    """The first params; raises unless they are floating and both losses are scalars there."""
    params = chosen.init_params(jax.random.fold_in(episode.key, _PARAMS))
    params = trees.check_floating("init_params(key)", params)
    for name, loss, source in (
        ("outer", chosen.losses.outer, chosen.losses.outer_data),
        ("inner", chosen.losses.inner, chosen.losses.inner_data),
    ):
        found = jax.eval_shape(lambda: loss(params, theta, data.example(source, episode.key)))  # noqa: B023
        arguments.check_loss(name, found)
    if trees.is_concrete(theta):
        with jax.ensure_compile_time_eval():
            concrete = trees.is_concrete(params)  # `average` traces the keys of its workers
            some = params if concrete else chosen.init_params(jax.random.key(0))
            _check_means(chosen.losses, some, theta)
    return params


def _check_means(losses: Losses, params: Any, theta: Theta) -> None:
    """Raises ValueError if a loss is a sum over the rows of its batch, not their mean.

    The loss of a batch, of the batch twice and three times are equal for a mean; a sum grows by the
    same amount each time, whatever is added to it. Losses that do neither pass: contrastive ones,
    for example. Endless samplers are not checked: their batches need not have rows.
    """

    def copies(loss, source):
        batch = data.example(source, jax.random.key(0))

        def of(times):
            return loss(params, theta, jax.tree.map(lambda x: jnp.concatenate([x] * times), batch))

        return jnp.stack([of(times) for times in (1, 2, 3)]).astype(jnp.float32)

    pairs = {
        "outer": (losses.outer, losses.outer_data),
        "inner": (losses.inner, losses.inner_data),
    }
    pairs = {k: pair for k, pair in pairs.items() if isinstance(pair[1], data.FiniteSum)}

    def all_copies():
        return {k: copies(*v) for k, v in pairs.items()}

    _, constants, _ = eager.traced(all_copies)
    if not trees.is_concrete(constants):  # params, data, or what a loss closes over
        return
    found = jax.device_get(eager.compiled(all_copies)())
    for name, (one, two, three) in found.items():
        grows = abs(two - one) > 1e-2 * (abs(one) + abs(two))
        if grows and abs(three - 2 * two + one) < 1e-2 * abs(two - one):
            raise ValueError(
                f"`{name}` must be the mean over its batch, but it grows with the rows: {one:.4g}, "
                f"and {two:.4g} with every row twice. Use jnp.mean in place of jnp.sum; a batch's "
                "weight in its epoch and all rates rest on it."
            )


def moved(
    optimizer: inner_optimizers.Optimizer,
    theta: Theta,
    direction: ArrayTree,
    state: optax.OptState,
    variable: Any,
) -> tuple[Any, optax.OptState, Any]:
    """One step of a variable along its direction: the variable, the state, and the updates."""
    grad = trees.narrow(direction, variable)
    updates, state = inner_optimizers.update(optimizer, theta, 0, grad, state, variable)
    with standard_promotion():
        return optax.apply_updates(variable, updates), state, updates


def rate(step: Any, norm: jax.Array) -> jax.Array:
    """The length of a step over the norm of its direction; 0 where that is 0."""
    zero = norm == 0
    return jnp.where(zero, 0, length(step) / jnp.where(zero, 1, norm))


def length(tree: Any) -> jax.Array:
    """The norm of a tree, as float32."""
    return optax.tree.norm(tree).astype(jnp.float32)


def outer_rate(theta: Theta, before: Before) -> jax.Array:
    """The length of theta's last step over the norm of its gradient."""
    return rate(jax.tree.map(jnp.subtract, theta, before.theta), before.grad_norm)


def opened(optimizer: inner_optimizers.Optimizer, theta: Theta, variable: Any) -> optax.OptState:
    """The first state of a variable's optimizer."""
    return jax.tree.map(arguments.strong, inner_optimizers.init(optimizer, theta, variable))


def before(theta: Theta) -> Before:
    """``Before`` of a first call."""
    return Before(theta, jnp.zeros((), jnp.float32))


def forever(
    fingerprint: MadeBy,
    losses: Losses,
    begin: Callable[[Episode, Theta], Any],
    step: Callable[[Episode, Theta, Any], tuple[Estimate, Any]],
) -> GradientEstimator:
    """Makes an estimator that begins in ``init`` and never ends.

    ``episode.t`` is the number of the next call, from 1 on; 0 makes that call begin again, with its
    own key. Otherwise the keys of calls are not used: all draws come from the key of ``init``. The
    data of ``losses`` are looked at if a run of ``fit`` ends with numbers that are not finite.
    """

    def explain(history: dict[str, Any]) -> str:
        sources = {"outer_data": losses.outer_data, "inner_data": losses.inner_data}
        bad = [text for pair in sources.items() if (text := data.bad_rows(*pair))]
        return " ".join(bad) or advice(history)

    batches = "`outer_data` and `inner_data`, finite sums or samplers"
    return endless(fingerprint, begin, step, batches=batches, explain=explain)


def estimate_of(grad: ArrayTree, theta: Theta, loss: jax.Array, info: BilevelInfo) -> Estimate:
    """The estimate, in theta's dtypes."""
    return Estimate(trees.narrow(grad, theta), loss, info)
