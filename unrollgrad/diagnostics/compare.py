"""Gradient estimators side by side on one problem at one theta."""

import functools
import time
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad import checks
from unrollgrad.diagnostics import statistics
from unrollgrad.diagnostics.report import Comparison
from unrollgrad.noise import wide
from unrollgrad.types import GradientEstimator, Key, Theta, UnrolledProblem


def compare(
    problem: UnrolledProblem,
    theta: Theta,
    estimators: Mapping[str, GradientEstimator],
    *,
    reference: GradientEstimator | Theta,
    num_samples: int,
    key: Key,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measures bias, variance and cost of estimators at a frozen theta.

    A sample is one episode of a fresh estimator: the mean of its ``grad`` over the T/K windows, so
    that all estimators aim at the gradient of J. Samples are independent.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Where to measure; it stays as it is.
        estimators: By name.
        reference: The gradient of J: a tree like theta, taken as exact; or an unbiased estimator,
            of which ``num_samples`` are drawn and whose noise is accounted for. Evolution
            strategies estimate the gradient of the smoothed J, so that against J's own they show
            the smoothing, O(sigma^2), as bias.
        num_samples: Samples per estimator, at least 3.
        key: Of all samples.
        batch_size: Samples per dispatch, in parallel: more is faster and takes more memory.
        progress: Called as ``progress(name, done, total)`` after each dispatch.

    Returns:
        A ``Comparison``; its ``rows`` are dicts with ``name, norm, bias, bias_se, variance,
        norm_ratio, cosine, snr, nmse, inner_steps, seconds, compile_seconds, num_nonfinite``.
        ``inner_steps`` and ``seconds`` are per sample, compilation not counted; ``num_nonfinite``
        is that of all samples, and where it is not 0 ``average`` has left workers out, which
        biases.

    Raises:
        ValueError: For a sampled horizon, fewer than 3 samples, no estimators, one of another
            problem's truncation, or a reference of another structure than theta.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=50)
        >>> comparison = ug.diagnostics.compare(
        ...     problem, theta, {"tbptt": ug.tbptt(problem, truncation=10)},
        ...     reference=ug.bptt(problem), num_samples=4, key=jax.random.key(0))
        >>> round(comparison.rows[0]["cosine"])
        1
    """
    horizon = checks.static_horizon(problem, "compare")
    num_samples = checks.positive_int("num_samples", num_samples)
    batch_size = checks.positive_int("batch_size", batch_size)
    theta, key = checks.floating_theta(theta), checks.typed_key(key)
    if num_samples < 3:
        raise ValueError(
            f"`num_samples` must be at least 3 for a variance and its error; got {num_samples}."
        )
    if not estimators:
        raise ValueError('`estimators` is empty; pass a dict such as {"pes": ug.pes(...)}.')

    chunks = -(-num_samples // batch_size)
    size = -(-num_samples // chunks)

    @functools.cache
    def compiled(estimator):
        """Draws ``size`` samples in one dispatch; and the seconds that compiling took."""

        def chunk(key, first):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(size))
            return jax.vmap(lambda k: episode_mean(estimator, k, theta, horizon))(keys)

        if horizon % (estimator.truncation or horizon):
            raise ValueError(
                f"an estimator's truncation={estimator.truncation} does not divide problem.horizon="
                f"{horizon}: it was made for another problem. Make it with this one."
            )
        begun = time.perf_counter()
        program = jax.jit(chunk).lower(key, jnp.int32(0)).compile()
        return program, time.perf_counter() - begun

    def draw(name, estimator):
        program, compile_seconds = compiled(estimator)
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))  # whatever the other names
        samples, steps, nonfinite, seconds = [], np.zeros(1), 0, 0.0
        for i in range(chunks):  # equal chunks: a last few samples too many are dropped
            begun = time.perf_counter()
            grads, steps, bad = jax.block_until_ready(program(own_key, jnp.int32(i * size)))
            nonfinite += int(np.sum(bad))
            seconds += time.perf_counter() - begun
            leaves = [np.asarray(g, np.float64).reshape(size, -1) for g in jax.tree.leaves(grads)]
            samples.append(np.concatenate(leaves, axis=1))
            if progress is not None:
                progress(name, min((i + 1) * size, num_samples), num_samples)
        cost = {
            "inner_steps": int(np.ravel(steps)[0]),
            "seconds": seconds / (chunks * size),
            "compile_seconds": compile_seconds,
            "num_nonfinite": nonfinite,
        }
        return np.concatenate(samples)[:num_samples], cost

    if isinstance(reference, GradientEstimator):
        truth, _ = draw(" reference", reference)
    else:
        truth = _flat_reference(reference, theta)
    rows, samples = [], {}
    for name, estimator in estimators.items():
        samples[name], cost = draw(name, estimator)
        rows.append({"name": name, **statistics.describe(samples[name], truth), **cost})
    return Comparison(rows, samples, truth)


def episode_mean(
    estimator: GradientEstimator, key: Key, theta: Theta, horizon: int
) -> tuple[Theta, jax.Array, jax.Array]:
    """One episode of a fresh estimator at frozen theta.

    Returns:
        The mean of its ``grad`` over the windows, at least float32; the inner steps spent; and the
        number of windows with a non-finite loss, under ``average`` of workers left out.
    """
    key_init, key_run = jax.random.split(key)
    num_windows = horizon // (estimator.truncation or horizon)

    def call(carry, i):
        state, total, steps, nonfinite = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key_run, i), theta, state)
        total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, estimate.grad)
        bad = getattr(estimate.info, "num_nonfinite", ~jnp.isfinite(estimate.loss))
        return (state, total, steps + estimate.info.inner_steps, nonfinite + bad), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), theta)
    begin = (estimator.init(key_init, theta), zero, jnp.int32(0), jnp.int32(0))
    (_, total, steps, nonfinite), _ = jax.lax.scan(call, begin, jnp.arange(num_windows))
    return jax.tree.map(lambda g: g / num_windows, total), steps, nonfinite


def _flat_reference(reference: Theta, theta: Theta) -> np.ndarray:
    same = jax.tree.structure(reference) == jax.tree.structure(theta)
    leaves, like = jax.tree.leaves(reference), jax.tree.leaves(theta)
    if not same or [np.shape(r) for r in leaves] != [np.shape(x) for x in like]:
        raise ValueError(
            "`reference` must be a gradient with theta's structure and shapes, or an estimator; "
            f"got {jax.tree.map(np.shape, reference)} for theta {jax.tree.map(np.shape, theta)}."
        )
    return np.concatenate([np.asarray(r, np.float64).ravel() for r in leaves])[None]
