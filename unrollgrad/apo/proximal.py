"""The proximal meta-objective, and the one transformation that descends it during training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import eager, mesh_axes
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad._training import inner_optimizers
from unrollgrad.apo import _safeguard
from unrollgrad.constraints import constrain, unconstrain
from unrollgrad.types import ArrayTree, Numeric

__all__ = [
    "KL",
    "ApoState",
    "Default",
    "Proximal",
    "adapted",
    "kl_divergence",
    "known_zero",
    "relative_steps",
    "squared_error",
]


class ApoState(NamedTuple):
    """The state of an optimizer that APO adapts.

    Attributes:
        count: Number of steps so far.
        hyperparams: The current hyperparameters, by name.
        base_state: The state of the optimizer with these hyperparameters.
        meta_state: The state of the meta-optimizer; its ``total_notfinite`` counts the
            meta-gradients that were skipped because they were not finite.
        safeguard: What is known about the look-ahead steps; its ``total_shortened`` counts the
            steps that were shortened because they would have raised the meta-objective.
    """

    count: jax.Array
    hyperparams: Any
    base_state: optax.OptState
    meta_state: optax.ApplyIfFiniteState
    safeguard: _safeguard.Safeguard


class Default(NamedTuple):
    """A function as a default: ``optax.inject_hyperparams`` takes a bare one for a schedule."""

    function: Callable[..., Numeric]


class Proximal(NamedTuple):
    """The meta-objective and its optimizer: the arguments that both factories document."""

    lambda_fsd: Numeric
    lambda_wsd: Numeric
    discrepancy: Callable[..., Numeric] | Default | None
    linearised: bool
    meta_optimizer: optax.GradientTransformation
    meta_interval: int
    axis_name: str | tuple[str, ...] | None


class _Given(NamedTuple):
    """The keyword arguments of ``update`` that the meta-objective depends on."""

    loss: Callable[..., jax.Array]
    predict: Callable[..., ArrayTree]
    batch: object
    other_batch: object


def relative_steps(rate: float) -> optax.GradientTransformation:
    """The default meta-optimizer: its steps are about ``rate``, however small the meta-gradients.

    Meta-gradients are as small as the learning rates and fall by orders of magnitude during
    training: ``eps`` must not dominate them, and a long memory (Adam's) must not damp the steps.
    """
    return optax.rmsprop(rate, eps=1e-30, bias_correction=True)


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(softmax(reference) ‖ softmax(logits)) along the last axis, in nats: for classification."""
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    )


KL = Default(kl_divergence)


def squared_error(outputs: jax.Array, reference: jax.Array) -> jax.Array:
    """½ ‖outputs - reference‖² along the last axis: for regression."""
    return jnp.sum(optax.l2_loss(outputs, reference), axis=-1)


def adapted(
    name: str,
    start: Callable[..., ArrayTree],
    constraints: Any,
    base: inner_optimizers.Optimizer,
    proximal: Proximal,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer ``base`` with hyperparameters that descend the meta-objective.

    Args:
        name: Name of the factory, for errors.
        start: ``start(params)``, the initial hyperparameters.
        constraints: Domains of the hyperparameters; the unconstrained numbers are descended.
        base: ``base(hyperparams, t)``, the optimizer with these hyperparameters.
        proximal: The meta-objective and its optimizer.
    """
    if isinstance(proximal.discrepancy, Default):
        proximal = proximal._replace(discrepancy=proximal.discrepancy.function)
    _check(proximal)
    # A non-finite meta-gradient would be applied only after 2^31 skips in a row.
    meta: Any = optax.apply_if_finite(proximal.meta_optimizer, max_consecutive_errors=2**31 - 1)

    def init(params):
        params = _admitted(name, params)
        hyperparams = start(params)
        return ApoState(
            count=jnp.zeros((), jnp.int32),
            hyperparams=hyperparams,
            base_state=inner_optimizers.init(base, hyperparams, params),
            meta_state=meta.init(_nameless(unconstrain(constraints, hyperparams))),
            safeguard=_safeguard.begin(),
        )

    def update(updates, state, params=None, **extra_args):
        axes = _axes(proximal.axis_name)
        given = _Given(*(extra_args.pop(key, None) for key in _Given._fields))
        _check_given(name, proximal, {"params": params, **given._asdict()})
        params, updates = _admitted(name, params), jax.tree.map(jnp.asarray, updates)

        def step(hyperparams, updates=updates):
            return inner_optimizers.update(
                base, hyperparams, state.count, updates, state.base_state, params, **extra_args
            )

        def adapt(hyperparams, meta_state, safeguard):
            named = unconstrain(constraints, hyperparams)
            free, structure = _nameless(named), jax.tree.structure(named)
            objective = _meta_objective(proximal, updates, params, given)

            def value(free):
                return constrain(constraints, structure.unflatten(jax.tree.leaves(free)))

            def there(free, scale=None):
                moved, _ = step(value(free))
                with standard_promotion():
                    return optax.apply_updates(params, _scaled(scale, moved))

            gradient, after = _gradient(axes, lambda free: objective(there(free)), free)
            before = _mean(axes, objective(params)[0])
            too_long = _safeguard.is_too_long(safeguard, before, after)
            with standard_promotion():
                free, meta_state = _meta_step(meta, too_long, gradient, meta_state, free)
            scale = _safeguard.share(
                too_long, before, lambda s: _mean(axes, objective(there(free, s))[0])
            )
            known = _safeguard.remember(safeguard, too_long, before, after, scale)
            return value(free), meta_state, known, scale, _unseen_zero()

        def unchanged(*at):
            return *at, jnp.float32(1), _unseen_zero()

        @eager.compiled
        def adapted_when_due(count, *at):
            do = adapt if jax.tree.leaves(params) else unchanged
            due = (count % proximal.meta_interval == 0) | at[-1].shortened
            return jax.lax.cond(due, do, unchanged, *at)

        hyperparams, meta_state, safeguard, scale, zero = adapted_when_due(
            state.count, state.hyperparams, state.meta_state, state.safeguard
        )
        # The step waits for the meta-step, which reads the old state of `base`: otherwise XLA
        # begins to overwrite the state too early, and copies all of it in every step.
        after = jax.tree.map(lambda g: g + zero.astype(g.dtype), updates)
        moved, base_state = step(hyperparams, after)
        moved = jax.tree.map(
            lambda g, x: mesh_axes.sharded_like(x.astype(g.dtype), jnp.asarray(g)),
            updates,
            _scaled(scale, moved),
        )
        return moved, ApoState(state.count + 1, hyperparams, base_state, meta_state, safeguard)

    return optax.GradientTransformationExtraArgs(init, update)


def _meta_objective(
    proximal: Proximal, gradient: optax.Updates, params: optax.Params, given: _Given
) -> Callable[[optax.Params], tuple[jax.Array, jax.Array]]:
    """Q(weights after the look-ahead step), and Q without its weight-space term."""
    discrepancy: Any = None if known_zero(proximal.lambda_fsd) else proximal.discrepancy
    reference = None if discrepancy is None else given.predict(params, given.other_batch)

    def objective(there):
        moved = jax.tree.map(lambda x, y: _widened(x) - _widened(y), there, params)
        if proximal.linearised:
            value = optax.tree.vdot(gradient, moved)
        else:
            value = given.loss(there, given.batch)
            arguments.check_loss("loss", value)
        if discrepancy is not None:
            away = discrepancy(given.predict(there, given.other_batch), reference)
            if not jnp.issubdtype(arguments.dtype_of(away), jnp.floating):
                raise TypeError(
                    f"`discrepancy` must return a real array; got {arguments.describe(away)}. Its "
                    "arguments are the outputs of `predict`."
                )
            value += proximal.lambda_fsd * jnp.mean(_widened(jnp.asarray(away)))
        if known_zero(proximal.lambda_wsd):
            return value, value
        with standard_promotion():
            away = optax.tree.norm(moved, squared=True)
            return value + 0.5 * proximal.lambda_wsd * away, value

    return objective


def _unseen_zero() -> jax.Array:
    """A zero that XLA does not know to be one."""
    return jax.lax.optimization_barrier(jnp.float32(0))


def _nameless(hyperparams: ArrayTree) -> ArrayTree:
    """The hyperparameters without their names, which ``optax.tree.get`` is to find once."""
    return tuple(hyperparams.values()) if isinstance(hyperparams, dict) else hyperparams


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))


def _meta_step(
    meta: optax.GradientTransformation,
    too_long: jax.Array,
    gradient: ArrayTree,
    state: optax.ApplyIfFiniteState,
    free: ArrayTree,
) -> tuple[ArrayTree, optax.ApplyIfFiniteState]:
    """One step of the meta-optimizer; after a step that was too long, its first one.

    Such gradients are larger than others by orders of magnitude. RMSprop would remember them, and
    hardly move for hundreds of steps.
    """

    def where(then, otherwise):
        return jax.tree.map(lambda x, y: jnp.where(too_long, x, y), then, otherwise)

    kept = state.inner_state
    fresh: Any = meta.init(free)
    begun = state._replace(inner_state=where(fresh.inner_state, kept))
    updated: Any = meta.update(gradient, begun, free)
    moved, new = updated
    new = new._replace(inner_state=where(kept, new.inner_state))
    return optax.apply_updates(free, moved), new  # type: ignore[bad-return]


def _scaled(scale: jax.Array | None, updates: optax.Updates) -> optax.Updates:
    if scale is None:
        return updates
    return jax.tree.map(lambda x: jnp.asarray(x) * scale.astype(x.dtype), updates)


def _axes(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else axis_name or ()


def _mean(axes: tuple[str, ...], x: Any) -> Any:
    """The mean over the devices along these axes."""
    return jax.lax.pmean(mesh_axes.over(frozenset(axes), x), axes) if axes else x


def _gradient(
    axes: tuple[str, ...],
    objective: Callable[..., tuple[jax.Array, jax.Array]],
    free: ArrayTree,
) -> tuple[ArrayTree, jax.Array]:
    """Gradient and value of the objective, averaged over devices.

    The gradient is NaN where the value is not finite.
    """
    free = mesh_axes.over(frozenset(axes), free)
    (whole, value), gradient = jax.value_and_grad(objective, has_aux=True)(free)
    if apart := mesh_axes.axes((gradient, value)) - frozenset(axes):
        raise ValueError(
            f"the meta-objective differs along the mesh axes {sorted(apart)}, over which batches "
            f"are split: pass axis_name={sorted(apart)[0]!r} to average its gradient over them."
        )
    gradient = jax.tree.map(lambda x: jnp.where(jnp.isfinite(value), x, jnp.nan), gradient)
    return _mean(axes, gradient), _mean(axes, whole)


def known_zero(number: Numeric) -> bool:
    """Whether a number is known to be 0; a traced number is not known."""
    return not isinstance(number, jax.core.Tracer) and float(number) == 0


def _is_masked(x: object) -> bool:
    return isinstance(x, optax.MaskedNode)


def _admitted(name: str, params: object) -> optax.Params:
    """The weights as strongly typed arrays. Raises if a leaf is masked or not floating.

    Abstract weights become zeros, and there may be none: optax's tools begin a state with either.
    """
    if any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        raise ValueError(
            f"params have masked leaves, but `loss` and `predict` need them all: mask the base of "
            f"apo.learning_rate, or use apo.frozen() in apo.preconditioner, not apo.{name}."
        )
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, params
    )
    return arguments.floating_leaves("params", params, "Train the floating leaves alone.")


def _check(proximal: Proximal) -> None:
    """Raises if a setting is not valid."""
    arguments.number("lambda_fsd", proximal.lambda_fsd)
    arguments.number("lambda_wsd", proximal.lambda_wsd)
    if not known_zero(proximal.lambda_fsd) and not callable(proximal.discrepancy):
        raise TypeError(
            "`discrepancy` must be a function of (outputs, reference) where `lambda_fsd` is not 0; "
            f"got {proximal.discrepancy!r}. Pass apo.kl_divergence for logits, apo.squared_error "
            "for regression, or lambda_fsd=0."
        )
    if not isinstance(proximal.meta_optimizer, optax.GradientTransformation):
        raise TypeError(
            "`meta_optimizer` must be an optax transform; got a "
            f"{type(proximal.meta_optimizer).__name__}. Pass optax.rmsprop(0.1), say."
        )
    arguments.positive_int("meta_interval", proximal.meta_interval)


_GIVEN = {
    "params": "the weights",
    "loss": "loss(params, batch), the scalar that `updates` is the gradient of",
    "predict": "predict(params, other_batch), the outputs that the discrepancy compares",
    "batch": "the batch of the gradient",
    "other_batch": "another batch",
}


def _check_given(name: str, proximal: Proximal, given: dict[str, object]) -> None:
    """Raises if an argument of ``update`` is missing, or ``loss`` or ``predict`` not callable."""
    needed = ["params"]
    if not proximal.linearised:
        needed += ["loss", "batch"]
    if not known_zero(proximal.lambda_fsd):
        needed += ["predict", "other_batch"]
    missing = [key for key in needed if given[key] is None]
    if missing:
        call = ", ".join(["updates", "state", "params", *(f"{key}=..." for key in needed[1:])])
        told = "; ".join(f"`{key}` ({_GIVEN[key]})" for key in missing)
        raise ValueError(f"`apo.{name}` is missing {told}. Call update({call}).")
    for key in ("loss", "predict"):
        if key in needed and not callable(given[key]):
            raise TypeError(
                f"`{key}` must be a function, {_GIVEN[key]}; got {arguments.describe(given[key])}."
            )
