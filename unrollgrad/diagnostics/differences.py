"""An estimator's gradient against finite differences, leaf by leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.diagnostics import _table
from unrollgrad.diagnostics.compare import episode_mean
from unrollgrad.types import GradientEstimator, Key, Segment, Theta, UnrolledProblem

__all__ = ["GradientCheck", "check_grad"]

_HALVINGS = 12
_RELATIVE = 1e-3  # a difference below this share of the derivative is rounding


class GradientCheck(NamedTuple):
    """Derivatives of J along one random direction in every leaf of theta.

    Attributes:
        leaves: The L leaves' paths, ``theta['w']``.
        estimated: Shape (L,), by the estimator, the mean over samples.
        expected: Shape (L,), by finite differences of the same episodes' losses.
        error: Shape (L,), the standard error of estimated - expected over the samples, plus the
            error of the finite differences.
        verdicts: For every leaf "agrees", "differs" or "cannot tell": the error is as large as the
            derivative, since the loss is not smooth or the estimator is noisy.
    """

    leaves: tuple[str, ...]
    estimated: np.ndarray
    expected: np.ndarray
    error: np.ndarray
    verdicts: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every leaf agrees."""
        return all(verdict == "agrees" for verdict in self.verdicts)

    @property
    def relative(self) -> np.ndarray:
        """Shape (L,), |estimated - expected| / |expected|."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(self.estimated - self.expected) / np.abs(self.expected)

    def table(self) -> None:
        """Prints a line per leaf. Needs rich (``pip install "unrollgrad[experiments]"``)."""
        columns = (self.leaves, self.estimated, self.expected, self.relative, self.error)
        rows = [
            [leaf, f"{a:.5g}", f"{b:.5g}", f"{r:.1g}", f"{e:.1g}", verdict]
            for leaf, a, b, r, e, verdict in zip(*columns, self.verdicts, strict=True)
        ]
        headings = ["leaf", "estimated", "differences", "relative", "± error", "verdict"]
        notes = [
            "Derivatives of J along a random direction in each leaf. relative: to the finite "
            "difference. error: standard error over samples, and of the finite difference."
        ]
        _table.print_table("The gradient against finite differences", headings, rows, notes)


def check_grad(
    problem: UnrolledProblem,
    theta: Theta,
    estimator: GradientEstimator,
    key: Key,
    *,
    num_samples: int = 16,
) -> GradientCheck:
    """Compares an estimator with finite differences of the losses of the same episodes.

    In each leaf theta is moved along a random direction v (normal). Central differences with 12
    steps from 0.1 times the leaf's size down are extrapolated to zero (Ridders' method), which also
    tells their error. The estimator's side is the mean over an episode's windows of v . grad. Both
    are averaged over ``num_samples`` episodes; their differences, paired, give the standard error.

    Evolution strategies estimate the gradient of a smoothed J, which departs by O(sigma^2); raise
    ``num_samples`` until their error is small. For more digits use float64 (``jax_enable_x64`` and
    a float64 theta).

    Time: 24 episodes per leaf and sample, and an episode's estimates per sample. Memory: twice
    num_samples states, and what the estimator takes, times num_samples.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Outer parameters.
        estimator: An estimator of this problem.
        key: The key of samples and directions.
        num_samples: Episodes, at least 2.

    Returns:
        A ``GradientCheck``, with ``passed``, ``verdicts`` and ``table()``.

    Raises:
        ValueError: If the horizon is sampled, the estimator's truncation does not divide it, or
            there are fewer than 2 samples.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=50)
        >>> key, whole, cut = jax.random.key(0), ug.bptt(problem), ug.tbptt(problem, truncation=10)
        >>> [ug.diagnostics.check_grad(problem, theta, e, key).verdicts[0] for e in (whole, cut)]
        ['agrees', 'differs']

    References:
        Ridders, Accurate computation of F'(x) and F'(x) F''(x), 1982.
    """
    horizon = inner_loop.static_horizon(problem, "check_grad")
    if arguments.positive_int("num_samples", num_samples) < 2:
        raise ValueError("`num_samples` must be at least 2 for a standard error; got 1.")
    if estimator.truncation is not None:
        inner_loop.check_truncation(problem, estimator.truncation)
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    named = jax.tree_util.tree_leaves_with_path(theta)
    names = tuple(f"theta{jax.tree_util.keystr(path)}" for path, _ in named)
    sizes = [float(np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))) for _, x in named]
    first = 0.1 * np.array([size if size > 0 else 1.0 for size in sizes])
    steps = first[:, None] * 0.5 ** np.arange(_HALVINGS)

    @eager.compiled
    def run(key, theta, steps):
        for_directions, for_samples = jax.random.split(key)
        leaves, structure = jax.tree.flatten(theta)
        keys = jax.random.split(for_directions, len(leaves))
        directions = [
            jax.random.normal(k, x.shape, wide(x.dtype)) for k, x in zip(keys, leaves, strict=True)
        ]
        samples = jax.random.split(for_samples, num_samples)

        def moved(which, offset):
            return structure.unflatten(
                (x.astype(v.dtype) + (which == i) * offset.astype(v.dtype) * v).astype(x.dtype)
                for i, (x, v) in enumerate(zip(leaves, directions, strict=True))
            )

        def difference(place):
            which, step = place
            up, down = moved(which, step), moved(which, -step)

            def one(key):
                losses = [_losses(problem, key, x) for x in (up, down)]
                return losses[0] - losses[1]

            return jax.vmap(one)(samples)

        def estimate(key):
            state = estimator.init(key, theta)
            grad = episode_mean(estimator, key, theta, state, horizon)[0].grad
            pairs = zip(jax.tree.leaves(grad), directions, strict=True)
            return jnp.stack([jnp.sum(g * v.astype(g.dtype)) for g, v in pairs])

        which = jnp.repeat(jnp.arange(len(leaves)), _HALVINGS)
        differences = jax.lax.map(difference, (which, steps.ravel()))
        return differences, jax.vmap(estimate)(samples)

    steps = np.asarray(jnp.asarray(steps, wide(*[x for _, x in named])))
    differences, estimates = (np.asarray(x, np.float64) for x in run(key, theta, steps))
    slopes = differences.reshape(len(names), _HALVINGS, num_samples) / (2 * steps[:, :, None])
    return _compare(names, estimates.T, slopes)


def _losses(problem: UnrolledProblem, key: Key, theta: Theta) -> jax.Array:
    """The loss of the episode that a worker begins in its first call with ``key``."""
    horizon = int(problem.horizon)  # type: ignore[arg-type]
    episode = unroll.new_episode(horizon, jax.random.fold_in(key, 0), horizon)
    segment = Segment(problem, episode, horizon)
    return unroll.window(segment, theta, unroll.enter(segment, theta, None)).loss()


def _compare(names: tuple[str, ...], estimates: np.ndarray, slopes: np.ndarray) -> GradientCheck:
    """From (leaves, samples) of estimates, and (leaves, halvings, samples) of differences."""
    found = [_extrapolated(of_leaf) for of_leaf in slopes]
    expected = np.array([value for value, _ in found])
    away = estimates - expected
    spread = away.std(axis=1, ddof=1) / np.sqrt(estimates.shape[1])
    error = spread + np.array([error for _, error in found])
    estimated, expected = estimates.mean(axis=1), expected.mean(axis=1)
    verdicts = []
    for a, b, e in zip(estimated, expected, error, strict=True):
        size = max(abs(a), abs(b))
        if not np.isfinite([a, b, e]).all():
            verdicts.append("cannot tell" if np.isfinite(a) else "differs")
        elif abs(a - b) > 4 * e + _RELATIVE * size:
            verdicts.append("differs")
        else:
            verdicts.append("cannot tell" if e > 0.25 * size > 0 else "agrees")
    return GradientCheck(names, estimated, expected, error, tuple(verdicts))


def _extrapolated(slopes: np.ndarray) -> tuple[np.ndarray, float]:
    """Ridders' method on central differences (halvings, samples): the limits, and their error."""
    best, error = slopes[0], np.inf
    column = [slopes[0]]
    for row in slopes[1:]:
        new = [row]
        for order, before in enumerate(column):
            factor = 4.0 ** (order + 1)
            new.append((factor * new[-1] - before) / (factor - 1))
            off = max(_rms(new[-1] - new[-2]), _rms(new[-1] - before))
            if off <= error:
                best, error = new[-1], off
        column = new
    return best, float(error)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
