"""Antithetic pairs: theta + eps and theta - eps through the same window of the same episode.

One leading axis holds theta + eps of all pairs, then theta - eps of all pairs: with an axis of its
own for the sign, XLA's loops over small states take twice as long.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, rounding
from unrollgrad._core import unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators._window import estimate_of
from unrollgrad.noise import Noise, gaussian, sample
from unrollgrad.types import ArrayDType, Estimate, Key, Segment, Sigma, State, Theta


class Pairs(NamedTuple):
    """How theta is perturbed, and the windows of pairs that do not persist.

    Attributes:
        law: The perturbation law.
        sigma: The standard deviation of the perturbations.
        num_pairs: The number of antithetic pairs.
    """

    law: Noise
    sigma: Sigma
    num_pairs: int

    def check(self, theta: Theta) -> None:
        """Raises ValueError if sigma does not fit theta, or would not move it."""
        rounding.check(self.sigma, theta)

    def whole_episode(self, segment: Segment, theta: Theta, _: None) -> tuple[Estimate, None]:
        """Runs the window of ``full_es``: every pair through the whole episode."""
        thetas = draw(self, theta, unroll.noise_key(segment.episode, 0))
        window = run(segment, thetas, None)
        unit = realised(thetas, self.sigma, window.losses)
        return estimate(window, self.sigma, theta, unit, unit), None

    def from_mean(self, segment: Segment, theta: Theta, state: State) -> tuple[Estimate, State]:
        """Runs the window of ``truncated_es``: every pair starts from the state under theta."""
        period = segment.episode.t // segment.num_steps
        thetas = draw(self, theta, unroll.noise_key(segment.episode, period))
        window, thetas, state = run_from_mean(segment, thetas, theta, state)
        unit = difference(thetas, self.sigma)
        return estimate(window, self.sigma, theta, unit, unit, mean_pass=True), state


def pairs(sigma: Sigma, num_pairs: int, noise: Noise | None = None) -> Pairs:
    """Checks the arguments that every evolution-strategies factory has.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If sigma or num_pairs is not positive.
    """
    arguments.check_sigma(sigma)
    note = " It counts antithetic pairs, both signs: 8 pairs are 16 perturbed thetas."
    arguments.positive_int("num_pairs", num_pairs, note)
    if noise is None:
        return Pairs(gaussian(), sigma, num_pairs)
    if isinstance(noise, tuple) and len(noise) == 2 and all(map(callable, noise)):
        return Pairs(Noise(*noise), sigma, num_pairs)
    raise TypeError(
        "`noise` must be a law, a pair of functions (init, sample) such as ug.noise.gaussian(); "
        f"got {noise!r}."
    )


def draw(pairs: Pairs, theta: Theta, key: Key) -> Theta:
    """Draws the pairs' perturbed thetas, in theta's dtypes, leading axis ``2 num_pairs``."""
    unit = sample(pairs.law, key, theta, pairs.num_pairs)

    def perturb(x, s, u):
        eps = jnp.asarray(s, wide(x.dtype)) * u
        center = x.astype(eps.dtype)[None]
        both = [_round(center + eps, x.dtype), _round(center - eps, x.dtype)]
        return jnp.concatenate(both).astype(x.dtype)

    return jax.tree.map(perturb, theta, arguments.broadcast_sigma(pairs.sigma, theta), unit)


def realised(thetas: Theta, sigma: Sigma, losses: jax.Array) -> Theta:
    """Computes ``difference(thetas, sigma)`` only after ``losses``.

    While the pairs' windows run, no copy of their perturbations is held in memory.
    """
    thetas, _ = jax.lax.optimization_barrier((thetas, losses))
    return difference(thetas, sigma)


def difference(thetas: Theta, sigma: Sigma) -> Theta:
    """(theta_plus - theta_minus) / (2 sigma): unit-variance noise, leading axis ``num_pairs``.

    The thetas are those after rounding to theta's dtype, and the result is in at least float32. In
    bfloat16 rounding loses much of a small eps; weighing with the rest keeps the estimate unbiased.
    """

    def leaf(s, both):
        both = both.astype(wide(both.dtype))
        return (_plus(both) - _minus(both)) / (2 * jnp.asarray(s, both.dtype))

    return jax.tree.map(leaf, arguments.broadcast_sigma(sigma, thetas), thetas)


def _round(x: jax.Array, dtype: ArrayDType) -> jax.Array:
    """Rounds to the precision of ``dtype``; XLA may drop a cast there and back, but not this."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def run(
    segment: Segment, thetas: Theta, states: State | None, starts: jax.Array | None = None
) -> unroll.Window:
    """Runs one window of every pair; leading axis ``2 num_pairs`` in and out."""

    def one(theta, state, start):
        state = unroll.enter(segment, theta, state)
        return unroll.window(segment, theta, state, start)

    return jax.vmap(one)(thetas, states, starts)


def run_from_mean(
    segment: Segment, thetas: Theta, theta: Theta, state: State
) -> tuple[unroll.Window, Theta, State]:
    """Runs one window of every pair, and of theta itself, side by side from one state.

    Returns:
        The pairs' windows (without states) and thetas, leading axis ``2 num_pairs``; the state at
        the end of the window under theta itself.
    """

    def join(both, x):
        return jnp.concatenate([both, x[None]])

    def of_pairs(x):
        return x[:-1]

    def one(theta):
        return unroll.window(segment, theta, unroll.enter(segment, theta, state))

    everyone = jax.tree.map(join, thetas, theta)
    windows = jax.vmap(one)(everyone)
    # The pairs' thetas are cut out after the run: no second copy of them is held during the run.
    everyone, _ = jax.lax.optimization_barrier((everyone, windows.losses))
    mean = jax.tree.map(lambda x: x[-1], windows.state)
    window, thetas = jax.tree.map(of_pairs, (windows._replace(state=()), everyone))
    return window, thetas, mean


def estimate(
    window: unroll.Window,
    sigma: Sigma,
    theta: Theta,
    weight: Theta,
    before: Theta,
    mean_pass: bool = False,
) -> Estimate:
    """Weighs the pairs' loss differences with their noise.

    ``grad`` = mean over pairs of (weight (D + D_end) - before D_start) / sigma, where D, D_end and
    D_start are half the difference between the signs of the window's mean loss and of
    (T/K) ``evaluate`` at its end and start. The losses are subtracted step by step, before they
    are averaged, so that small differences keep their digits.

    Args:
        window: The pairs' window.
        sigma: The standard deviation of the perturbations.
        theta: Outer parameters; only their structure and dtypes are used.
        weight: Unit-variance noise accumulated up to this window, leading axis ``num_pairs``.
        before: Noise accumulated up to the previous window; it weighs the evaluation at the start.
        mean_pass: Whether the window was also run once with theta itself.
    """
    ends = jnp.mean(half_difference(window.losses), axis=1)
    if window.end is not None:
        ends = ends + half_difference(window.end)

    def leaf(x, s, w, b):
        g = weighted_mean(ends, w)
        if window.start is not None:
            g = g - weighted_mean(half_difference(window.start), b)
        return (g / jnp.asarray(s, g.dtype)).astype(x.dtype)

    grad = jax.tree.map(leaf, theta, arguments.broadcast_sigma(sigma, theta), weight, before)
    loss = jnp.mean(jax.vmap(unroll.Window.loss)(window))
    inner_steps = window.losses.size + (window.losses.shape[-1] if mean_pass else 0)
    return estimate_of(grad, loss, inner_steps)


def half_difference(x: jax.Array) -> jax.Array:
    """Halves the difference between the signs of every pair; leading axis ``num_pairs``."""
    return (_plus(x) - _minus(x)) / 2


def mean_of_signs(x: jax.Array) -> jax.Array:
    """Averages the signs of every pair; leading axis ``num_pairs``."""
    return (_plus(x) + _minus(x)) / 2


def _plus(x: jax.Array) -> jax.Array:
    return x[: len(x) // 2]


def _minus(x: jax.Array) -> jax.Array:
    return x[len(x) // 2 :]


def weighted_mean(differences: jax.Array, noise: jax.Array) -> jax.Array:
    """Averages difference times noise over the pairs."""
    # Full precision: TF32 or bfloat16 products would cost digits where the differences are small.
    differences, precision = differences.astype(noise.dtype), jax.lax.Precision.HIGHEST
    return jnp.tensordot(differences, noise, axes=1, precision=precision) / len(differences)
