"""The proximal meta-objective, and the one transformation that descends it while it trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._training import inner_optimizers
from unrollgrad.constraints import constrain, unconstrain


class ApoState(NamedTuple):
    """The state of an optimizer that APO adapts.

    Attributes:
        count: Steps so far.
        hyperparams: Their current values, by name.
        base_state: Of the optimizer that has them.
        meta_state: Of the meta-optimizer; its ``total_notfinite`` counts the meta-gradients that
            were not finite, and were skipped.
    """

    count: jax.Array
    hyperparams: Any
    base_state: Any
    meta_state: optax.ApplyIfFiniteState


class Proximal(NamedTuple):
    """What the two factories have in common.

    Attributes:
        lambda_fsd: Weight of the discrepancy in function space.
        lambda_wsd: Weight of the squared distance in weight space.
        discrepancy: ``discrepancy(outputs, reference)``, an array; its mean counts.
        linearised: Whether the loss is replaced by its first-order expansion.
        meta_optimizer: Descends the meta-objective.
        meta_interval: Steps from one meta-step to the next.
        axis_name: Of a surrounding ``shard_map`` or ``pmap``.
    """

    lambda_fsd: Any
    lambda_wsd: Any
    discrepancy: Any
    linearised: bool
    meta_optimizer: optax.GradientTransformation
    meta_interval: int
    axis_name: Any


def relative_steps(rate: float) -> optax.GradientTransformation:
    """The default meta-optimizer: steps of about ``rate``, whatever the size of the meta-gradients.

    They are as small as the learning rates, and fall by orders of magnitude during training: an
    ``eps`` must not stand in for them, nor a long memory (Adam's) hold them down.
    """
    return optax.rmsprop(rate, eps=1e-30, bias_correction=True)


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(softmax(reference) ‖ softmax(logits)) along the last axis, in nats: for classification."""
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    )


def squared_error(outputs: jax.Array, reference: jax.Array) -> jax.Array:
    """½ ‖outputs - reference‖² along the last axis: for regression."""
    return jnp.sum(optax.l2_loss(outputs, reference), axis=-1)


def adapted(
    name: str,
    start: Callable[[Any], Any],
    constraints: Any,
    base: Callable[[Any], optax.GradientTransformation],
    proximal: Proximal,
) -> optax.GradientTransformationExtraArgs:
    """``base(hyperparams)`` with hyperparams that descend the meta-objective.

    Args:
        name: Of the factory, for errors.
        start: ``start(params)``, the first hyperparams.
        constraints: Of the hyperparams; descended are the unconstrained numbers.
        base: The optimizer with these hyperparams.
        proximal: The meta-objective and its optimizer.
    """
    _check(proximal)
    # Only after 2^31 skips in a row would it apply what is not finite. It is given the leaves in a
    # list, so that ``optax.tree.get`` finds a name in the hyperparams alone.
    meta: Any = optax.apply_if_finite(proximal.meta_optimizer, max_consecutive_errors=2**31 - 1)

    def optimizer(hyperparams, t):
        return base(hyperparams)

    def admit(params):
        if any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
            raise ValueError(
                f"params have masked leaves, but `loss` and `predict` need them all: mask the base "
                f"of apo.learning_rate, or use apo.frozen() in apo.preconditioner, not apo.{name}."
            )
        return arguments.floating("params", params, "Train the floating leaves alone.")

    def init(params):
        params = admit(params)
        hyperparams = start(params)
        return ApoState(
            count=jnp.zeros((), jnp.int32),
            hyperparams=hyperparams,
            base_state=inner_optimizers.init(optimizer, hyperparams, params),
            meta_state=meta.init(jax.tree.leaves(unconstrain(constraints, hyperparams))),
        )

    def update(
        updates,
        state,
        params=None,
        *,
        loss=None,
        predict=None,
        batch=None,
        other_batch=None,
        **extra_args,
    ):
        given = {"loss": loss, "predict": predict, "batch": batch, "other_batch": other_batch}
        _check_given(name, proximal, {"params": params, **given})
        params = admit(params)

        def step(hyperparams):
            return inner_optimizers.update(
                optimizer, hyperparams, state.count, updates, state.base_state, params, **extra_args
            )

        def adapt(hyperparams, meta_state):
            free, structure = jax.tree.flatten(unconstrain(constraints, hyperparams))

            def value(free):
                return constrain(constraints, structure.unflatten(free))

            def look_ahead(free):
                return optax.apply_updates(params, step(value(free))[0])

            objective = _meta_objective(proximal, updates, params, given)
            gradient = _gradient(proximal.axis_name, lambda x: objective(look_ahead(x)), free)
            moved, meta_state = meta.update(gradient, meta_state, free)
            return value(optax.apply_updates(free, moved)), meta_state

        hyperparams, meta_state = jax.lax.cond(
            state.count % proximal.meta_interval == 0,
            adapt,
            lambda *unchanged: unchanged,
            state.hyperparams,
            state.meta_state,
        )
        moved, base_state = step(hyperparams)
        return moved, ApoState(state.count + 1, hyperparams, base_state, meta_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _meta_objective(
    proximal: Proximal, gradient: Any, params: Any, given: dict[str, Any]
) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """Q as a function of the weights after the look-ahead step, and its part that may overflow."""
    loss, predict = given["loss"], given["predict"]
    reference = None if known_zero(proximal.lambda_fsd) else predict(params, given["other_batch"])

    def wide(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def objective(there):
        moved = jax.tree.map(lambda x, y: wide(x) - wide(y), there, params)
        if proximal.linearised:
            value = optax.tree.vdot(gradient, moved)
        else:
            value = loss(there, given["batch"])
            arguments.check_loss("loss", value)
        if reference is not None:
            outputs = predict(there, given["other_batch"])
            away = proximal.discrepancy(outputs, reference)
            if not jnp.issubdtype(arguments.dtype_of(away), jnp.floating):
                raise TypeError(
                    f"`discrepancy` must return a real array; got {arguments.describe(away)}. It "
                    "is given what `predict` returns."
                )
            value += proximal.lambda_fsd * jnp.mean(wide(jnp.asarray(away)))
        if known_zero(proximal.lambda_wsd):
            return value, value
        return value + 0.5 * proximal.lambda_wsd * optax.tree.norm(moved, squared=True), value

    return objective


def _gradient(
    axis_name: Any, objective: Callable[[Any], tuple[jax.Array, jax.Array]], free: Any
) -> Any:
    """Of the objective, not finite where that is not; the mean over devices, if there are any."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    free = mesh_axes.over(frozenset(axes), free)
    gradient, value = jax.grad(objective, has_aux=True)(free)
    if apart := mesh_axes.axes((gradient, value)) - frozenset(axes):
        raise ValueError(
            f"the meta-objective differs along the mesh axes {sorted(apart)}, over which batches "
            f"are split: pass axis_name={sorted(apart)[0]!r} to average its gradient over them."
        )
    gradient = jax.tree.map(lambda x: jnp.where(jnp.isfinite(value), x, jnp.nan), gradient)
    return jax.lax.pmean(gradient, axes) if axes else gradient


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def known_zero(number: Any) -> bool:
    """Whether a number is 0, as far as is known while tracing."""
    return not isinstance(number, jax.core.Tracer) and float(number) == 0


def _check(proximal: Proximal) -> None:
    """Raises if a setting cannot be."""
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
    "batch": "that of the gradient",
    "other_batch": "another one",
}


def _check_given(name: str, proximal: Proximal, given: dict[str, Any]) -> None:
    """Raises if an argument of ``update`` is missing, or a function is none."""
    needed = ["params"]
    if not proximal.linearised:
        needed += ["loss", "batch"]
    if not known_zero(proximal.lambda_fsd):
        needed += ["predict", "other_batch"]
    missing = [key for key in needed if given[key] is None]
    if missing:
        call = ", ".join(["updates", "state", "params", *(f"{key}=..." for key in needed[1:])])
        raise ValueError(
            f"`apo.{name}` is missing "
            + "; ".join(f"`{key}` ({_GIVEN[key]})" for key in missing)
            + f". Call update({call})."
        )
    for key in ("loss", "predict"):
        if key in needed and not callable(given[key]):
            raise TypeError(
                f"`{key}` must be a function, {_GIVEN[key]}; got {arguments.describe(given[key])}."
            )
