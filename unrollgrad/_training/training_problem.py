"""Unrolled problems whose inner loop trains weights with an optax optimizer."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._training import inner_optimizers
from unrollgrad.types import Key, Numeric, UnrolledProblem


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
    loss: Callable[..., Numeric],
    init_params: Callable[..., Any],
    optimizer: Callable[..., optax.GradientTransformation],
    sample_batch: Callable[[Key], object] | None = None,
    meta_loss: Callable[..., Numeric] | Literal["before"] | None = None,
    horizon: int | Callable[[Key], Numeric] = 1000,
    value_and_grad: Callable[..., Callable[..., tuple[jax.Array, Any]]] = jax.value_and_grad,
) -> UnrolledProblem:
    """An unrolled problem that trains inner weights with an optimizer that theta controls.

    One inner step draws a batch, takes the gradient of ``loss`` with respect to the weights, and
    applies ``optimizer(theta, t)``; its step loss is ``meta_loss`` at the new weights. Theta may
    enter anywhere: learning rates, regularisation, data weights, augmentation, or all the weights
    of a learned optimizer, which is just such a function of (theta, t). The inner state is
    ``TrainingState(params, opt_state)``.

    Backpropagation goes through the optimizer's own arithmetic, which not every optimizer supports.
    It is tried once when the step is about to be differentiated, and a warning names the setting
    that helps: ``eps_root`` for optax.adam and its relatives; nothing helps optax.radam. Evolution
    strategies only run it forwards.

    Args:
        loss: ``loss(theta, params, batch, key) -> scalar``, the inner training loss.
        init_params: ``init_params(key) -> params``, any pytree of arrays: a dict, flax parameters,
            the arrays of an equinox module (``eqx.partition(model, eqx.is_array)[0]``). Leaves that
            are not floating (counters, keys) stay as they are. A function that requires two
            arguments is called ``init_params(key, theta)``: the gradient goes through it, as in
            MAML, where the weights begin at theta.
        optimizer: ``optimizer(theta, t) -> optax transform``, called inside every step; its state
            must have the same structure for every (theta, t) and keeps its initial dtypes. Line
            searches get ``value``, ``grad`` and ``value_fn``. Hyperparameters that
            ``optax.inject_hyperparams`` keeps in the state are computed from this step's theta and
            t (optax alone would keep the values from ``init``).
        sample_batch: ``sample_batch(key) -> batch`` from data on the device. None: batches are
            streamed through ``estimate(..., data=)``, one slice per step.
        meta_loss: ``meta_loss(theta, params, key) -> scalar``, such as the validation loss. By
            default the training loss at the new weights, on the same batch. "before" records the
            training loss at the weights before the update, whose value the gradient computes
            anyway: one forward pass less per step (learned_optimization's convention). Unless
            ``loss`` or ``init_params`` uses theta, step t then depends on theta through the updates
            before it alone, so that windows of one step have a gradient of zero with ``tbptt`` and
            ``truncated_es``.
        horizon: Inner steps in an episode, or a sampler ``horizon(key)``. Pass the length of your
            training: the default is arbitrary. ``print(problem)`` shows it.
        value_and_grad: What differentiates the inner loss; ``mixed_value_and_grad`` saves memory in
            backpropagation through deep nets whose layers are in a ``scan``.

    Raises:
        TypeError: If ``loss``, ``init_params``, ``optimizer`` or ``value_and_grad`` is not a
            function, ``optimizer`` is one of optax's own, a function cannot be called with its
            arguments, or ``meta_loss`` is neither a function nor "before".
        ValueError: When stepping, if the loss is not a scalar, or neither ``sample_batch`` nor
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
    functions = {"loss": loss, "init_params": init_params, "optimizer": optimizer}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"`{name}` must be a function; got a {type(function).__name__}. For a fixed "
                "optimizer write `optimizer=lambda theta, t: optax.adam(1e-3)`."
            )
    if not callable(value_and_grad):
        raise TypeError(
            "`value_and_grad` must be a function like jax.value_and_grad, such as "
            f"unrollgrad.mixed_value_and_grad; got a {type(value_and_grad).__name__}."
        )
    if str(getattr(optimizer, "__module__", "")).startswith("optax."):
        raise TypeError(
            "`optimizer` is called as optimizer(theta, t), but optax."
            f"{getattr(optimizer, '__name__', '...')} takes its settings. Write, for example, "
            "`optimizer=lambda theta, t: optax.sgd(jnp.exp(theta))`."
        )
    if sample_batch is not None:
        inner_loop.check_call("sample_batch", sample_batch, key=None)
    named = isinstance(meta_loss, str) and meta_loss == "before"
    if not (meta_loss is None or named or callable(meta_loss)):
        raise TypeError(
            '`meta_loss` must be a function `(theta, params, key) -> scalar`, "before" for the '
            f"training loss before the update, or None for it after the update; got {meta_loss!r}."
        )
    shapes = inner_optimizers.shapes
    # Tried once for the same shapes, not in every trace.
    try_derivatives, try_float16 = (
        functools.cache(functools.partial(warn, optimizer))
        for warn in (inner_optimizers.warn_of_derivatives, inner_optimizers.warn_of_float16)
    )

    def init(key, theta):
        with_theta = not inner_loop.takes(init_params, key)
        with_theta = with_theta and inner_loop.takes(init_params, key, theta)
        given = {"key": key, "theta": theta} if with_theta else {"key": key}
        hint = " It may also take (key, theta)."
        inner_loop.check_call("init_params", init_params, hint, **given)
        inner_loop.check_call("optimizer", optimizer, theta=theta, t=0)
        params = arguments.strong_state(init_params(*given.values()), made_by="init_params")
        trained = _trained(params)
        try_float16(shapes(theta), shapes(trained))
        return TrainingState(params, inner_optimizers.init(optimizer, theta, trained))

    def step(key, theta, state, t, batch=None):
        key_batch, key_loss, key_meta = jax.random.split(key, 3)
        if batch is None:
            if sample_batch is None:
                raise ValueError(
                    "no batch: this training_problem has `sample_batch=None`, so pass "
                    "`data=` to `estimate`, with one batch per inner step along its leading axis."
                )
            batch = sample_batch(key_batch)
        params = _trained(state.params)
        named = {"theta": theta, "params": state.params, "batch": batch, "key": key_loss}
        inner_loop.check_call("loss", loss, **named)

        def inner(params):
            value = loss(theta, _merged(params, state.params), batch, key_loss)
            arguments.check_loss("loss", value)
            return value

        value, grad = value_and_grad(inner)(params)
        # Of a complex weight JAX's gradient is the conjugate of the direction of steepest ascent.
        grad = jax.tree.map(jnp.conj, grad)
        updates, opt_state = inner_optimizers.update(
            optimizer, theta, t, grad, state.opt_state, params, value=value, value_fn=inner
        )
        report = functools.partial(try_derivatives, shapes(theta), shapes(params))
        updates = inner_optimizers.when_differentiated(updates, report)
        params = optax.apply_updates(params, updates)
        whole = _merged(params, state.params)
        if meta_loss is None:
            return TrainingState(whole, opt_state), inner(params)
        if not callable(meta_loss):
            return TrainingState(whole, opt_state), value
        inner_loop.check_call("meta_loss", meta_loss, theta=theta, params=whole, key=key_meta)
        return TrainingState(whole, opt_state), meta_loss(theta, whole, key_meta)

    return UnrolledProblem(init, step, horizon)


def _trained(params):
    """The tree with None in place of the leaves that are not trained."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(arguments.dtype_of(x), jnp.inexact) else None, params
    )


def _merged(trained, params):
    """``params`` with the trained leaves in place of their own."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda x: x is None
    )


def final_loss(problem: UnrolledProblem, evaluate: Callable[..., Numeric]) -> UnrolledProblem:
    """A problem whose J is the loss of the final state: ``evaluate``, and zero step losses.

    Windowed estimators see a telescoping sum, (T/K) (L_end - L_start) per window, with the
    evaluation's key fixed for the episode. Persistent estimators weight the two ends with their
    accumulated noise, which is unbiased and has lower variance.

    Args:
        problem: The inner loop, with a static horizon. Its step losses are dropped.
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
    inner_loop.check_call("evaluate", evaluate, key=None, theta=None, state=None)

    def step(key, theta, state, t, *data):
        result = problem.step(key, theta, state, t, *data)
        if not (isinstance(result, tuple) and len(result) == 2):
            return result  # ``inner_loop.check_step`` refuses it with its own message
        return result[0], jnp.zeros_like(result[1])

    return problem._replace(step=step, evaluate=evaluate)
