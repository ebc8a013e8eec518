"""Which sigma to perturb theta with: the noise wall, the plateau and the bias of smoothing."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad import noise
from unrollgrad._checks import arguments, inner_loop, rounding
from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.diagnostics import _table
from unrollgrad.estimators import _pairs
from unrollgrad.types import Key, Segment, Sigma, Theta, UnrolledProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TOLERANCE", "SigmaSweep", "sigma_sweep"]

TOLERANCE = 0.1
"""The relative change of the gradient from one sigma to the next that still counts as a plateau."""

_ROUNDED = 0.01  # the share of perturbations that may round to zero


class SigmaSweep(NamedTuple):
    """Evolution strategies at several sigmas, with the same random numbers at each.

    All arrays are numpy, float64, of shape (S,).

    Attributes:
        sigmas: The sigmas, ascending; a perturbation is sigma times ``unit`` times a normal draw.
        loss: The smoothed loss J_sigma.
        loss_se: Its standard error.
        norm: |gradient of J_sigma|, without the noise of the estimate; 0 where noise hides it.
        norm_se: Its standard error.
        variance: The trace of the covariance of one antithetic pair's estimate.
        change: |difference of this gradient and the one at the sigma before| / |that one|, again
            without noise; NaN at the first.
        change_se: Its standard error.
        steepness: d ln|L(theta + eps) - L(theta - eps)| / d ln sigma (root mean squares): 1 where
            the loss is smooth at this scale, 0 in the noise wall, where it is as rough as noise.
        lost: The fraction of pairs with a loss that is not finite; they are left out above.
        rounded: The fraction of perturbations that round to zero in theta's dtype.
        num_pairs: The number of pairs.
    """

    sigmas: np.ndarray
    loss: np.ndarray
    loss_se: np.ndarray
    norm: np.ndarray
    norm_se: np.ndarray
    variance: np.ndarray
    change: np.ndarray
    change_se: np.ndarray
    steepness: np.ndarray
    lost: np.ndarray
    rounded: np.ndarray
    num_pairs: int

    @property
    def snr(self) -> np.ndarray:
        """The signal to noise ratio of one pair: norm / sqrt(variance)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.norm / np.sqrt(self.variance)

    @property
    def noise_wall(self) -> float | None:
        """The largest sigma at which the loss is as rough as noise; None if it is at none."""
        rough = np.flatnonzero(self.steepness < 0.5)
        return float(self.sigmas[rough[-1]]) if len(rough) else None

    @property
    def plateau(self) -> float | None:
        """The largest sigma at which smoothing has not begun to change the gradient, or None.

        The gradient is seen (twice its standard error) there and at the sigma before, and changes
        between the two by no more than 10 %, or than two standard errors if those are below 50 %;
        all losses are finite, and theta's dtype resolves sigma.
        """
        seen = self._seen()
        calm = self.change <= np.maximum(TOLERANCE, 2 * self.change_se)
        settled = np.append(False, seen[:-1]) & calm & (self.change_se <= 0.25)
        settled[0] = self.steepness[0] >= 0.5
        fit = np.flatnonzero(self._safe() & seen & settled)
        return float(self.sigmas[fit[-1]]) if len(fit) else None

    @property
    def suggestion(self) -> float | None:
        """``plateau``; without one a safe sigma at which the gradient is seen, or None.

        Among the safe ones the smallest beyond the noise wall is taken, and if all are within the
        wall, the one with the best signal to noise ratio.
        """
        if self.plateau is not None:
            return self.plateau
        fit = np.flatnonzero(self._safe() & self._seen())
        beyond = fit[self.sigmas[fit] > (self.noise_wall or 0)]
        if len(beyond):
            return float(self.sigmas[beyond[0]])
        return float(self.sigmas[fit[np.argmax(self.snr[fit])]]) if len(fit) else None

    def _safe(self) -> np.ndarray:
        return (self.lost == 0) & (self.rounded < _ROUNDED)

    def _seen(self) -> np.ndarray:
        return self.norm > 2 * self.norm_se

    def table(self) -> None:
        """Prints a line per sigma, and the suggestion.

        Needs rich (``pip install "unrollgrad[experiments]"``).
        """
        rows = []
        for i, sigma in enumerate(self.sigmas):
            mark = " *" if sigma == self.suggestion else ""
            known = math.isfinite(self.change[i])
            change = f"{self.change[i]:.2g} ± {self.change_se[i]:.1g}" if known else "-"
            rows.append(
                [
                    f"{sigma:.3g}{mark}",
                    f"{self.norm[i]:.3g} ± {self.norm_se[i]:.1g}",
                    change,
                    f"{self.snr[i]:.2g}",
                    f"{self.steepness[i]:.2f}",
                    f"{self.loss[i]:.4g} ± {self.loss_se[i]:.1g}",
                    f"{self.lost[i]:.0%}",
                    f"{self.rounded[i]:.0%}",
                ]
            )
        headings = ["sigma", "|gradient|", "change", "SNR", "steepness", "loss", "lost", "rounded"]
        notes = [
            *self.reasons(),
            "change: from the sigma before, relative. SNR: of one pair. steepness: 1 smooth, 0 as "
            "rough as noise.",
            "lost: pairs with a loss that is not finite. rounded: perturbations that round to 0.",
        ]
        _table.print_table("Evolution strategies against sigma", headings, rows, notes)

    def reasons(self) -> list[str]:
        """The suggestion and what limits it, in sentences."""
        best, safe = self.suggestion, self._safe()
        wall = self.noise_wall
        said = []
        if best is None:
            said.append("No suggestion: " + self._obstacle())
        elif best != self.plateau:
            where = "the smallest beyond the noise" if best > (wall or 0) else "with the best SNR"
            said.append(
                f"Suggestion: sigma = {best:.3g}, {where}. No plateau was seen: the gradient "
                "depends on sigma at every scale, or needs more `num_pairs`."
            )
        else:
            i = int(np.flatnonzero(self.sigmas == best)[0])
            said.append(f"Suggestion: sigma = {best:.3g}; up to it smoothing changes nothing.")
            if i + 1 == len(self.sigmas):
                said.append("It is the largest that was tried.")
            elif not safe[i + 1]:
                said.append(
                    f"At {self.sigmas[i + 1]:.3g}, {self.lost[i + 1]:.0%} of pairs are lost."
                )
            else:
                said.append(
                    f"At {self.sigmas[i + 1]:.3g} the gradient has changed by "
                    f"{self.change[i + 1]:.0%} ± {self.change_se[i + 1]:.0%}."
                )
        if wall is not None:
            said.append(f"Up to {wall:.3g} the loss is as rough as noise.")
        return said

    def _obstacle(self) -> str:
        if not self._safe().any():
            return "at every sigma pairs are lost, or perturbations round to zero."
        return "the gradient is hidden by noise at every safe sigma. Raise `num_pairs`."

    def plot(self) -> "Figure":
        """Draws the gradient and its noise, and the smoothed loss, against sigma.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        figure = _table.figure(11, 4.5)
        left, right = figure.subplots(1, 2)
        seen = self.norm > 0
        error = np.minimum(self.norm_se, 0.9 * self.norm)[seen]
        bar = {"capsize": 3, "marker": "o", "label": "|gradient of the smoothed loss|"}
        left.errorbar(self.sigmas[seen], self.norm[seen], error, **bar)
        noisy = np.sqrt(self.variance / self.num_pairs)
        left.plot(self.sigmas, noisy, "C1--", label=f"noise of {self.num_pairs} pairs")
        left.set(xscale="log", yscale="log", xlabel="sigma")
        left.set_title("gradient", loc="left")
        right.errorbar(self.sigmas, self.loss, self.loss_se, capsize=3, marker="o")
        right.set(xscale="log", xlabel="sigma")
        right.set_title("smoothed loss", loc="left")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.set_xlim(self.sigmas[0] / 1.3, self.sigmas[-1] * 1.3)
            if self.noise_wall is not None:
                shade = {"color": "0.85", "zorder": 0, "label": "as rough as noise"}
                axis.axvspan(self.sigmas[0] / 1.3, self.noise_wall, **shade)
            losing = self.sigmas[self.lost > 0]
            if len(losing):
                shade = {"color": "C3", "alpha": 0.15, "label": "loses particles"}
                axis.axvspan(losing[0], self.sigmas[-1] * 1.3, **shade)
            if self.suggestion is not None:
                label = f"suggestion {self.suggestion:.2g}"
                axis.axvline(self.suggestion, color="C2", label=label)
        left.legend(frameon=False)
        return figure


def sigma_sweep(
    problem: UnrolledProblem,
    theta: Theta,
    *,
    key: Key,
    sigmas: Sequence[float] | np.ndarray | None = None,
    unit: Sigma = 1.0,
    num_pairs: int = 64,
) -> SigmaSweep:
    """Runs antithetic pairs through whole episodes at several sigmas, and suggests one.

    A small sigma shows the loss as it is; in chaos that is noise, and the estimate has a variance
    of dim(theta) v / (2 sigma^2), v the variance of the loss. A large sigma averages the noise, and
    what one wants to see with it: the gradient of the smoothed loss departs from J's by O(sigma^2).
    In between there may be a plateau, where the gradient does not depend on sigma.

    Each pair has an episode of its own; all sigmas see the same episodes and the same normal draws,
    so that differences between sigmas are far more exact than each gradient.

    Time: 2 num_pairs episodes per sigma, one sigma after the other. Memory: 2 num_pairs states and
    thetas.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Outer parameters.
        key: The key of episodes and perturbations.
        sigmas: The sigmas; by default 8 from 0.001 to 0.1 times the root mean square of theta /
            ``unit``.
        unit: What sigma multiplies, a number or a pytree prefix of theta, if theta's leaves have
            different scales: ``sigma * unit`` is an estimator's ``sigma``.
        num_pairs: Antithetic pairs per sigma, at least 3.

    Returns:
        A ``SigmaSweep``, with ``suggestion``, ``table()`` and ``plot()``.

    Raises:
        ValueError: If the horizon is sampled, a sigma is not positive, or there are too few pairs.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map(horizon=50)
        >>> sweep = ug.diagnostics.sigma_sweep(
        ...     problem, theta, key=jax.random.key(0), sigmas=[1e-4, 1e-3, 1e-2, 1e-1])
        >>> sweep.noise_wall, bool(sweep.lost[-1] > 0)            # beyond theta = 4 it diverges
        (0.001, True)
    """
    horizon = inner_loop.static_horizon(problem, "sigma_sweep")
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    arguments.check_sigma(unit)
    scales = arguments.broadcast_sigma(unit, theta)
    if arguments.positive_int("num_pairs", num_pairs) < 3:
        raise ValueError(f"`num_pairs` must be at least 3 for standard errors; got {num_pairs}.")
    sigmas = _default(theta, scales) if sigmas is None else sigmas
    arguments.check_sigma(list(sigmas))
    inner_loop.check_step(problem, key, theta)
    values = np.sort(np.asarray(sigmas, np.float64))

    @eager.compiled
    def run(key, theta, values):
        for_episodes, for_noise = jax.random.split(key)
        episodes, draws = (jax.random.split(k, num_pairs) for k in (for_episodes, for_noise))
        widened = jax.tree.map(lambda s, x: jnp.asarray(s, wide(x.dtype)), scales, theta)

        def pair(episode_key, noise_key, sigma):
            spread = jax.tree.map(lambda s: s * sigma.astype(s.dtype), widened)
            pairs = _pairs.Pairs(noise.gaussian(), spread, 1)
            thetas = _pairs.draw(pairs, theta, noise_key)
            episode = unroll.new_episode(horizon, episode_key, horizon)
            window = _pairs.run(Segment(problem, episode, horizon), thetas, None)
            half = jnp.mean(_pairs.half_difference(window.losses))
            if window.end is not None:
                half = half + _pairs.half_difference(window.end)[0]
            return half, jnp.mean(jax.vmap(unroll.Window.loss)(window))

        def one(sigma):
            return jax.vmap(pair, in_axes=(0, 0, None))(episodes, draws, sigma)

        def unit_noise(noise_key):
            drawn = noise.sample(noise.gaussian(), noise_key, theta, 1)
            rows = jax.tree.map(lambda u, s: (u[0] / s).ravel(), drawn, widened)
            return jnp.concatenate(jax.tree.leaves(rows))

        rows = jax.vmap(unit_noise)(draws)
        gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
        return *jax.lax.map(one, values), gram

    half, loss, gram = (
        np.asarray(x, np.float64)
        for x in run(key, theta, jnp.asarray(values, wide(*jax.tree.leaves(theta))))
    )
    rounded = np.array([_rounded(theta, scales, sigma) for sigma in values])
    return _summary(values, half, loss, gram, rounded)


def _summary(
    sigmas: np.ndarray, half: np.ndarray, loss: np.ndarray, gram: np.ndarray, rounded: np.ndarray
) -> SigmaSweep:
    """From (sigmas, pairs) of half differences and losses, and the inner products of the noise."""
    finite = np.isfinite(half) & np.isfinite(loss)
    rows, rms, weights = [], [], half / sigmas[:, None]
    for i, kept in enumerate(finite):
        n = max(int(kept.sum()), 1)
        losses, weight = loss[i, kept], weights[i, kept]
        products = gram[np.ix_(kept, kept)]
        norm, norm_se = _root(*_squared_norm(products * np.outer(weight, weight)))
        squares = products.diagonal() * weight**2
        total = weight @ products @ weight
        variance = (squares.sum() - total / n) / (n - 1) if n > 1 else math.nan
        change, change_se = math.nan, math.nan
        if i:
            both = kept & finite[i - 1]
            away = weights[i, both] - weights[i - 1, both]
            squared = _squared_norm(gram[np.ix_(both, both)] * np.outer(away, away))
            before = weights[i - 1, both]
            size, _ = _root(*_squared_norm(gram[np.ix_(both, both)] * np.outer(before, before)))
            if size > 0:
                change, change_se = np.array(_root(*squared)) / size
        mean = losses.mean() if len(losses) else math.nan
        error = losses.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
        rows.append([mean, error, norm, norm_se, variance, change, change_se])
        rms.append(math.sqrt(np.mean(half[i, kept] ** 2)) if len(losses) else math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(rms)
    steepness = np.ones(len(sigmas))
    if len(sigmas) > 1:
        steepness = np.gradient(logs, np.log(sigmas))
    loss, loss_se, norm, norm_se, variance, change, change_se = np.array(rows).T
    lost, num_pairs = 1 - finite.mean(axis=1), half.shape[1]
    return SigmaSweep(
        *(sigmas, loss, loss_se, norm, norm_se, variance),
        *(change, change_se, steepness, lost, rounded, num_pairs),
    )


def _squared_norm(products: np.ndarray) -> tuple[float, float]:
    """|mean|^2 of vectors with these inner products, without noise, and its jackknife error."""
    n = len(products)
    if n < 3:
        return math.nan, math.inf
    total, squares = products.sum(), products.diagonal()
    value = (total - squares.sum()) / (n * (n - 1))
    without = total - 2 * products.sum(axis=1) + squares  # the sum without each vector
    others = (without - (squares.sum() - squares)) / ((n - 1) * (n - 2))
    return float(value), float(np.sqrt((n - 1) / n * np.sum((others - others.mean()) ** 2)))


def _root(square: float, se: float) -> tuple[float, float]:
    """The square root of an estimated square, 0 if that is negative, and its standard error."""
    root = math.sqrt(max(square, 0.0)) if not math.isnan(square) else math.nan
    return root, se / (2 * root) if root**2 > se else math.sqrt(max(se, 0.0))


def _default(theta: Theta, scales: Theta) -> np.ndarray:
    pairs = zip(jax.tree.leaves(theta), jax.tree.leaves(scales), strict=True)
    parts = [np.ravel(np.asarray(x, np.float64) / np.asarray(s, np.float64)) for x, s in pairs]
    size = math.sqrt(np.mean(np.concatenate(parts) ** 2))
    return np.geomspace(1e-3, 1e-1, 8) * (size if size > 0 else 1.0)


def _rounded(theta: Theta, scales: Theta, sigma: float) -> float:
    """The fraction of all perturbations that round to zero."""
    leaves, spread = jax.tree.leaves(theta), jax.tree.leaves(scales)
    lost = [
        x.size * rounding.fraction_lost(sigma * np.asarray(s, np.float64), x)
        for x, s in zip(leaves, spread, strict=True)
    ]
    return sum(lost) / sum(x.size for x in leaves)
