"""Many workers as one estimator: the mean over them, and what becomes of bad ones."""

from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad import checks
from unrollgrad.noise import wide
from unrollgrad.types import AverageInfo, Estimate, GradientEstimator, Key, Theta, WorkerState


def average(
    estimator: GradientEstimator, num_workers: int, *, nonfinite: str = "drop"
) -> GradientEstimator:
    """The mean of ``num_workers`` independent workers, each with an episode of its own.

    ``grad`` = mean over i of ``estimator.estimate(fold_in(key, i), theta, state_i)``: the same
    expectation as one worker, 1/num_workers of its variance.

    With ``nonfinite="drop"`` a worker whose loss or gradient is not finite is left out of the mean,
    begins a new episode in the next call, and is counted in ``info.num_nonfinite``. This biases the
    estimate towards the region where nothing blows up; watch the count. With ``"propagate"``
    nothing is left out: one bad worker makes the mean NaN or inf, visibly.

    Time and memory: ``num_workers`` times the estimator's, in one ``vmap``.

    Args:
        estimator: What each worker runs.
        num_workers: How many.
        nonfinite: "drop" or "propagate".

    Returns:
        An estimator whose state has a leading axis ``num_workers`` on every leaf, whose ``data``
        has leaves ``(num_workers, truncation, ...)``, and whose ``info`` is an ``AverageInfo``.

    Raises:
        TypeError: If ``estimator`` is none.
        ValueError: If num_workers is not positive, ``nonfinite`` is something else, the estimator
            is itself an average, or a leaf of ``data`` has not ``num_workers`` as its leading axis.
        FloatingPointError: Outside ``jit``, if no worker is left; inside, grad and loss are NaN.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> workers = ug.average(ug.pes(problem, truncation=10, sigma=0.1), 64)
        >>> state = workers.init(jax.random.key(0), theta)
        >>> estimate, state = jax.jit(workers.estimate)(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(estimate.info.num_nonfinite)
        (1280, 0)
    """
    if not isinstance(estimator, GradientEstimator):
        raise TypeError(
            f"`estimator` must be a GradientEstimator such as ug.pes(problem, ...); got a "
            f"{type(estimator).__name__}."
        )
    num_workers = checks.positive_int("num_workers", num_workers)
    if nonfinite not in ("drop", "propagate"):
        raise ValueError(f'`nonfinite` must be "drop" or "propagate"; got {nonfinite!r}.')

    def keys(key: Key) -> Key:
        key = checks.typed_key(key)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_workers))

    def one_worker(key: Key, theta: Theta) -> WorkerState:
        state = estimator.init(key, theta)
        if jnp.ndim(state.episode.t) != 0:
            raise ValueError(
                "`average` takes one worker, not an average: nested averages would hide which "
                "worker is which. Use one `average` with the product of the numbers of workers."
            )
        return state

    def init(key: Key, theta: Theta) -> WorkerState:
        return jax.vmap(one_worker, in_axes=(0, None))(keys(key), theta)

    def worker(key, theta, state, data):
        return estimator.estimate(key, theta, state, data=data)

    @jax.jit
    def mean(key, theta, state, data):
        checks.check_data(data, num_workers, "num_workers", what="worker")
        _check_state(state, num_workers)
        each, state = jax.vmap(worker, in_axes=(0, None, 0, 0))(keys(key), theta, state, data)
        finite = _finite(each)
        good = finite if nonfinite == "drop" else jnp.ones_like(finite)
        count = jnp.sum(good)
        grad = jax.tree.map(lambda g: _mean(g, good, count), each.grad)
        info = AverageInfo(
            inner_steps=jnp.sum(each.info.inner_steps, dtype=jnp.int32),
            num_nonfinite=jnp.sum(~finite, dtype=jnp.int32),
            grad_variance=_variance_of_mean(each.grad, grad, good, count),
        )
        grad = jax.tree.map(lambda m, g: m.astype(g.dtype), grad, each.grad)
        restarted = state.episode._replace(t=jnp.where(good, state.episode.t, 0))
        out = Estimate(grad, _mean(each.loss, good, count), info)
        return out, state._replace(episode=restarted), count, each.loss[0]

    def estimate(key: Key, theta: Theta, state: WorkerState, *, data: Any = None):
        out, state, count, first_loss = mean(key, theta, state, data)
        if not isinstance(count, jax.core.Tracer) and int(count) == 0:
            if jnp.isfinite(first_loss):
                cause = (
                    "The losses are finite, so it is the derivatives: a square root or norm at "
                    "zero, as in optax.adam without eps_root, or steps that amplify"
                )
            else:
                cause = "Lower sigma or the inner step size"
            narrow = [
                f"theta{jax.tree_util.keystr(path)} is {x.dtype}"
                for path, x in jax.tree_util.tree_leaves_with_path(theta)
                if jnp.dtype(getattr(x, "dtype", float)).itemsize < 4
            ]
            if narrow:
                cause += (
                    f", or hold theta in float32 ({narrow[0]}; a decay rate of 0.999 is 1 in "
                    "bfloat16, and Adam's bias correction then divides by zero)"
                )
            raise FloatingPointError(
                f"all {num_workers} workers returned a non-finite loss or gradient (first loss "
                f'{first_loss}). {cause}. To look at them: `average(..., nonfinite="propagate")`.'
            )
        return out, state

    return GradientEstimator(init, estimate, estimator.truncation)


def _check_state(state: WorkerState, num_workers: int) -> None:
    shape = jnp.shape(state.episode.t)
    if shape != (num_workers,):
        raise ValueError(
            f"`state` is that of {shape[0] if shape else 'one'} worker(s), but num_workers="
            f"{num_workers}. Make it with this estimator's own `init`."
        )


def _finite(each: Estimate) -> jax.Array:
    """Which workers' loss and gradient are finite, shape ``(num_workers,)``."""
    finite = jnp.isfinite(each.loss)
    for g in jax.tree.leaves(each.grad):
        finite &= jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim)))
    return finite


def _where(good: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _mean(x: jax.Array, good: jax.Array, count: jax.Array) -> jax.Array:
    """The mean over the good workers, at least float32; NaN if there are none."""
    x = x.astype(wide(x.dtype))
    return jnp.sum(_where(good, x), axis=0) / jnp.where(count > 0, count, jnp.nan).astype(x.dtype)


def _variance_of_mean(grads: Theta, mean: Theta, good: jax.Array, count: jax.Array) -> jax.Array:
    """The trace of the mean's covariance; +inf below two good workers."""

    def leaf(g, m):
        return jnp.sum(_where(good, jnp.square(g.astype(m.dtype) - m)), dtype=jnp.float32)

    total = sum(jax.tree.leaves(jax.tree.map(leaf, grads, mean)))
    pairs = jnp.float32(count) * (jnp.float32(count) - 1)
    return jnp.where(count > 1, total / jnp.where(count > 1, pairs, 1), jnp.inf)
