"""Antithetic pairs: theta + eps and theta - eps through the same window of the same episode.

One leading axis holds theta + eps of all pairs, then theta - eps of all pairs: with an axis of its
own for the sign, XLA's loops over small states take twice as long.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, rounding
from unrollgrad._core import array_types, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators._window import estimate_of
from unrollgrad.noise import Noise, gaussian, sample
from unrollgrad.noise._laws import add, weighted_sum
from unrollgrad.types import ArrayTree, Estimate, Key, Segment, Sigma, State, Theta

Weigh = Callable[[jax.Array, jax.Array | None], Theta]
"""``weigh(ends, starts) -> theta``: the pairs' mean of noise times the differences of losses."""


class Factored(NamedTuple):
    """The perturbed thetas of a law that draws factors: each is made where it is used.

    Attributes:
        law: The perturbation law.
        theta: Outer parameters; the members of the population share their arrays.
        factors: What the law drew, leading axis ``num_pairs``.
        sigma: The standard deviation of the perturbations.
    """

    law: Noise
    theta: Theta
    factors: ArrayTree
    sigma: Sigma


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

    @property
    def factored(self) -> bool:
        """Whether the law draws factors, and not arrays like theta."""
        return self.law.perturb is not add

    def check(self, theta: Theta) -> None:
        """Raises ValueError if sigma does not fit theta, or would not move it."""
        if self.factored:  # a leaf that is never added up is not rounded
            draw = jax.eval_shape(lambda: sample(self.law, jax.random.key(0), theta, 1))
            theta = jax.tree.map(
                lambda x, f: x if hasattr(f, "shape") else jnp.zeros_like(x), theta, draw
            )
        rounding.check(self.sigma, theta)

    def whole_episode(self, segment: Segment, theta: Theta, _: None) -> tuple[Estimate, None]:
        """Runs the window of ``full_es``: every pair through the whole episode."""
        thetas = draw(self, theta, unroll.noise_key(segment.episode, 0))
        window = run(segment, thetas, None)
        unit = realised(thetas, self.sigma, window.losses)
        return estimate(window, self.sigma, theta, self.weigh(unit, unit)), None

    def from_mean(self, segment: Segment, theta: Theta, state: State) -> tuple[Estimate, State]:
        """Runs the window of ``truncated_es``: every pair starts from the state under theta."""
        period = segment.episode.t // segment.num_steps
        thetas = draw(self, theta, unroll.noise_key(segment.episode, period))
        window, thetas, state = run_from_mean(segment, thetas, theta, state)
        unit = difference(thetas, self.sigma)
        return estimate(window, self.sigma, theta, self.weigh(unit, unit), mean_pass=True), state

    def weighing(self, unit: ArrayTree) -> ArrayTree:
        """Each pair's noise as it weighs losses: ``contract`` of that pair alone.

        Sums over windows are of these, so that each window's noise is weighed by the law that drew
        it. ``summed`` weighs with them.
        """
        if self.law.contract is weighted_sum:
            return unit
        one = jnp.ones(1)
        return jax.vmap(lambda u: self.law.contract(jax.tree.map(lambda x: x[None], u), one))(unit)

    def summed(self) -> "Pairs":
        """The same pairs for noise that ``weighing`` made."""
        return self._replace(law=self.law._replace(contract=weighted_sum))

    def mean(self, noise: ArrayTree, differences: jax.Array) -> Theta:
        """Averages difference times noise over the pairs."""
        total = self.law.contract(noise, differences)
        return jax.tree.map(lambda x: x / len(differences), total)

    def weigh(self, now: ArrayTree, before: ArrayTree) -> Weigh:
        """Makes ``weigh(ends, starts)``: ``now`` weighs the ends and ``before`` the starts."""

        def weigh(ends, starts):
            mean = self.mean(now, ends)
            if starts is None:
                return mean
            return jax.tree.map(jnp.subtract, mean, self.mean(before, starts))

        return weigh


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
    if isinstance(noise, tuple) and len(noise) in (2, 4) and all(map(callable, noise)):
        return Pairs(Noise(*noise), sigma, num_pairs)
    raise TypeError(
        "`noise` must be a law, a pair of functions (init, sample) such as ug.noise.gaussian(); "
        f"got {noise!r}."
    )


def draw(pairs: Pairs, theta: Theta, key: Key) -> Theta | Factored:
    """Draws the pairs' perturbed thetas, in theta's dtypes, leading axis ``2 num_pairs``.

    Of a law that draws factors it returns these; see ``run``.
    """
    unit = sample(pairs.law, key, theta, pairs.num_pairs)
    if pairs.factored:
        return Factored(pairs.law, theta, unit, pairs.sigma)

    def perturbed(scale):
        return jax.vmap(lambda u: pairs.law.perturb(theta, u, scale))(unit)

    both = perturbed(pairs.sigma), perturbed(_negative(pairs.sigma))
    return jax.tree.map(lambda *signs: jnp.concatenate(signs), *both)


def _negative(sigma: Sigma) -> Sigma:
    return jax.tree.map(jnp.negative, sigma)


def realised(thetas: Theta | Factored, sigma: Sigma, losses: jax.Array) -> ArrayTree:
    """Computes ``difference(thetas, sigma)`` only after ``losses``.

    While the pairs' windows run, no copy of their perturbations is held in memory.
    """
    if not isinstance(thetas, Factored):
        thetas, _ = jax.lax.optimization_barrier((thetas, losses))
    return difference(thetas, sigma)


def difference(thetas: Theta | Factored, sigma: Sigma) -> ArrayTree:
    """(theta_plus - theta_minus) / (2 sigma): unit-variance noise, leading axis ``num_pairs``.

    The thetas are those after rounding to theta's dtype, and the result is in at least float32. In
    bfloat16 rounding loses much of a small eps; weighing with the rest keeps the estimate unbiased.
    Of factors it is the factors: only leaves of noise that is added are rounded.
    """
    if isinstance(thetas, Factored):
        return _realised_factors(thetas)

    def leaf(s, both):
        both = both.astype(wide(both.dtype))
        return (_plus(both) - _minus(both)) / (2 * jnp.asarray(s, both.dtype))

    return jax.tree.map(leaf, arguments.broadcast_sigma(sigma, thetas), thetas)


def _realised_factors(members: Factored) -> ArrayTree:
    """Replaces the noise that is added to leaves of low precision with what rounding leaves."""
    law, theta, factors, sigma = members
    leaves, structure = jax.tree.flatten(theta)
    drawn = structure.flatten_up_to(factors)
    coarse = [
        i
        for i, (x, f) in enumerate(zip(leaves, drawn, strict=True))
        if hasattr(f, "shape") and x.dtype != wide(x.dtype)
    ]
    if not coarse:
        return factors

    def some(scale):
        def one(f):
            perturbed = structure.flatten_up_to(law.perturb(theta, f, scale))
            return [perturbed[i] for i in coarse]

        return jax.vmap(one)(factors)

    up, down = some(sigma), some(_negative(sigma))
    scales = jax.tree.leaves(arguments.broadcast_sigma(sigma, theta))
    for i, plus, minus in zip(coarse, up, down, strict=True):
        drawn[i] = difference(jnp.concatenate([plus, minus]), scales[i])
    return structure.unflatten(drawn)


def run(
    segment: Segment,
    thetas: Theta | Factored,
    states: State | None,
    starts: jax.Array | None = None,
) -> unroll.Window:
    """Runs one window of every pair; leading axis ``2 num_pairs`` in and out."""

    def one(theta, state, start):
        own = segment._replace(problem=array_types.understood(segment.problem, theta))
        state = unroll.enter(own, theta, state)
        return unroll.window(own, theta, state, start)

    return _of_everyone(one, thetas, states, starts)


def _of_everyone(one: Callable[..., unroll.Window], thetas: Theta | Factored, *args: Any):
    """Maps ``one`` over perturbed thetas and arguments; leading axis ``2 num_pairs``.

    Of factors, both signs of a pair share theirs and all pairs share theta: a product with an
    array of theta is then one product for the whole population.
    """
    if not isinstance(thetas, Factored):
        return jax.vmap(one)(thetas, *args)
    law, theta, factors, sigma = thetas

    def pair(scale, drawn, *args):
        return one(law.perturb(theta, drawn, scale), *args)

    rest = (0,) * len(args)
    both = jax.vmap(jax.vmap(pair, in_axes=(None, 0, *rest)), in_axes=(0, None, *rest))
    scales = jax.tree.map(lambda s: jnp.stack([jnp.asarray(s), -jnp.asarray(s)]), sigma)
    apart = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), args)
    out = both(scales, factors, *apart)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def run_from_mean(
    segment: Segment, thetas: Theta | Factored, theta: Theta, state: State
) -> tuple[unroll.Window, Theta | Factored, State]:
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
        own = segment._replace(problem=array_types.understood(segment.problem, theta))
        return unroll.window(own, theta, unroll.enter(own, theta, state))

    if isinstance(thetas, Factored):
        return _of_everyone(one, thetas)._replace(state=()), thetas, one(theta).state
    everyone = jax.tree.map(join, thetas, theta)
    windows = jax.vmap(one)(everyone)
    # The pairs' thetas are cut out after the run: no second copy of them is held during the run.
    everyone, _ = jax.lax.optimization_barrier((everyone, windows.losses))
    mean = jax.tree.map(lambda x: x[-1], windows.state)
    window, thetas = jax.tree.map(of_pairs, (windows._replace(state=()), everyone))
    return window, thetas, mean


def estimate(
    window: unroll.Window, sigma: Sigma, theta: Theta, weigh: Weigh, mean_pass: bool = False
) -> Estimate:
    """Weighs the pairs' loss differences with their noise.

    ``grad`` = mean over pairs of (now (D + D_end) - before D_start) / sigma, where D, D_end and
    D_start are half the difference between the signs of the window's mean loss and of
    (T/K) ``evaluate`` at its end and start; now and before are the noise accumulated up to this
    window and up to the previous one. The losses are subtracted step by step, before they are
    averaged, so that small differences keep their digits.

    Args:
        window: The pairs' window.
        sigma: The standard deviation of the perturbations.
        theta: Outer parameters; only their structure and dtypes are used.
        weigh: Averages unit-variance noise times D + D_end, less noise times D_start.
        mean_pass: Whether the window was also run once with theta itself.
    """
    ends = jnp.mean(half_difference(window.losses), axis=1)
    if window.end is not None:
        ends = ends + half_difference(window.end)
    starts = None if window.start is None else half_difference(window.start)

    def leaf(x, s, g):
        return (g / jnp.asarray(s, g.dtype)).astype(x.dtype)

    mean = weigh(ends, starts)
    grad = jax.tree.map(leaf, theta, arguments.broadcast_sigma(sigma, theta), mean)
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
