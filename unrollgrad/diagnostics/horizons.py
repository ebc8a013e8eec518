"""How the gradient of an episode and its spread grow with the episode's length."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad import noise
from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.diagnostics import _table
from unrollgrad.diagnostics.lyapunov import BLOCKS
from unrollgrad.noise._dense import cut
from unrollgrad.types import Episode, Key, Segment, Theta, UnrolledProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HEAVY", "OVERFLOW", "HorizonSweep", "horizon_sweep"]

OVERFLOW = math.log(3.4e38)
"""The logarithm of the largest number in float32."""

HEAVY = 1e4
"""A largest squared norm so many times the median: the mean of a few episodes says nothing."""


class HorizonSweep(NamedTuple):
    """The gradient of J as a function of the horizon T', at the given theta.

    Norms are given as natural logarithms: they may exceed every floating-point number. All arrays
    are numpy, float64.

    Attributes:
        horizons: Shape (H,), the T': 1, 2, 5, 10, ..., T.
        log_norm: Shape (H,), the mean over episodes of ln|gradient of one episode|.
        log_norm_se: Shape (H,), its standard error.
        log_deviation: Shape (H,), ln of the square root of the variance (the trace of the
            covariance over episodes); minus infinity if all episodes agree.
        heaviness: Shape (H,), the largest squared norm of an episode over the median one.
        growth: The growth of ln|gradient of the sum of losses| per step over the last three
            quarters of the episode; it equals the first Lyapunov exponent where that is positive.
        growth_se: Its standard error.
    """

    horizons: np.ndarray
    log_norm: np.ndarray
    log_norm_se: np.ndarray
    log_deviation: np.ndarray
    heaviness: np.ndarray
    growth: float
    growth_se: float

    @property
    def overflow(self) -> int | None:
        """The first horizon of the sweep at which a gradient overflows float32; None if none."""
        beyond = np.flatnonzero(self.log_norm > OVERFLOW)
        return int(self.horizons[beyond[0]]) if len(beyond) else None

    def table(self) -> None:
        """Prints a line per horizon, and the growth.

        Needs rich (``pip install "unrollgrad[experiments]"``).
        """
        columns = (self.horizons, self.log_norm, self.log_norm_se, self.log_deviation)
        rows = [
            [str(int(t)), _power(norm), f"{se:.2g}", _power(deviation), f"{heavy:.2g}"]
            for t, norm, se, deviation, heavy in zip(*columns, self.heaviness, strict=True)
        ]
        efolds = self.growth * self.horizons[-1]
        notes = [
            "The gradient of the sum of losses grows by "
            f"{self.growth:.3g} ± {self.growth_se:.1g} e-folds per step, "
            f"exp({efolds:.3g}) over {int(self.horizons[-1])} steps.",
            "|gradient|: of one episode, geometric mean. ± ln: standard error of its logarithm.",
            "deviation: over episodes. largest/median: of the squared norms of the episodes.",
        ]
        if self.overflow is not None:
            notes.insert(1, f"It overflows float32 at a horizon of {self.overflow}.")
        if np.nanmax(self.heaviness) > HEAVY:
            notes.insert(1, "A few episodes rule the mean: its variance is out of reach.")
        headings = ["horizon", "|gradient|", "± ln", "deviation", "largest/median"]
        _table.print_table("Gradient against the horizon", headings, rows, notes)

    def plot(self) -> "Figure":
        """Draws norm and deviation against the horizon, with the measured growth.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        figure = _table.figure(7.5, 4.5)
        axis = figure.subplots()
        in_tens = math.log(10)
        bar = {"capsize": 3, "marker": "o", "label": "|gradient| of one episode (geometric mean)"}
        axis.errorbar(self.horizons, self.log_norm / in_tens, self.log_norm_se / in_tens, **bar)
        seen = np.isfinite(self.log_deviation)
        label = "standard deviation over episodes"
        axis.plot(self.horizons[seen], self.log_deviation[seen] / in_tens, "C1s--", label=label)
        last = self.horizons >= self.horizons[-1] / 4
        line = self.log_norm[-1] + self.growth * (self.horizons[last] - self.horizons[-1])
        label = f"growth {self.growth:.3g} ± {self.growth_se:.1g} per step"
        axis.plot(self.horizons[last], line / in_tens, "k:", label=label)
        if self.overflow is not None:
            axis.axhline(OVERFLOW / in_tens, color="C3", lw=0.8)
            place = {"xy": (0, OVERFLOW / in_tens), "xycoords": ("axes fraction", "data")}
            offset = {"xytext": (4, 3), "textcoords": "offset points", "color": "C3"}
            axis.annotate("float32 overflows", **place, **offset)
        axis.set(xlabel="horizon T'", ylabel="log10 of the size")
        axis.set_title("gradient of J against the horizon", loc="left")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        return figure


def horizon_sweep(
    problem: UnrolledProblem,
    theta: Theta,
    *,
    key: Key,
    num_episodes: int = 16,
    num_directions: int = 8,
) -> HorizonSweep:
    """Measures how the exact gradient of J and its variance depend on the horizon.

    The gradient that ``bptt`` would give at every horizon T' up to T, from one forward pass:
    tangents along directions v of theta are carried through every episode, and scaled whenever they
    have grown, so that nothing overflows. With num_directions >= dim(theta) the directions are the
    coordinates and the norms are exact; otherwise they are random signs, and the mean square of
    v . gradient estimates |gradient|^2 without bias.

    Time: num_episodes (1 + directions) forward passes. Memory: as many states, nothing for a
    backward pass, and three numbers per inner step, episode and direction. Where the problem has
    ``evaluate``, it is called after every step.

    Args:
        problem: The inner loop, with a static horizon; its step must be differentiable forwards.
        theta: Outer parameters.
        key: The key of the episodes and directions.
        num_episodes: Independent episodes.
        num_directions: The most directions of theta.

    Returns:
        A ``HorizonSweep``, with ``table()`` and ``plot()``.

    Raises:
        ValueError: If the horizon is sampled, or a number is below one.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map(horizon=200)
        >>> sweep = ug.diagnostics.horizon_sweep(problem, theta, key=jax.random.key(0))
        >>> 0.4 < sweep.growth < 0.6, sweep.overflow              # the exponent is 0.495
        (True, 200)
    """
    horizon = inner_loop.static_horizon(problem, "horizon_sweep")
    num_episodes = arguments.positive_int("num_episodes", num_episodes)
    num_directions = arguments.positive_int("num_directions", num_directions)
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    inner_loop.check_step(problem, key, theta)
    dim = sum(x.size for x in jax.tree.leaves(theta))
    exact = dim <= num_directions

    @eager.compiled
    def run(key, theta):
        for_directions, for_episodes = jax.random.split(key)
        if exact:
            rows = cut(jnp.eye(dim), jax.tree.leaves(theta))
            directions = jax.tree.unflatten(jax.tree.structure(theta), rows)
        else:
            law = noise.rademacher()
            directions = noise.sample(law, for_directions, theta, num_directions)

        def one(key):
            episode = unroll.new_episode(horizon, key, horizon)
            return _sensitivities(problem, episode, theta, directions)

        return jax.vmap(one)(jax.random.split(for_episodes, num_episodes))

    total, evaluated, log_scale = (np.asarray(x, np.float64) for x in run(key, theta))
    return _summary(total, evaluated, log_scale, exact)


def _sensitivities(
    problem: UnrolledProblem, episode: Episode, theta: Theta, directions: Theta
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives along directions of theta, for every step and direction, as scaled numbers.

    Returns:
        The derivative of the sum of losses so far, that of ``evaluate`` of the state, and the
        logarithm of the factor that both lack; shape (T, directions).
    """
    horizon = int(problem.horizon)  # type: ignore[arg-type]
    dtype = wide(*jax.tree.leaves(theta))

    def begin(direction):
        def first(theta):
            state = unroll.initial_state(problem, episode, theta)
            return floats_of(state), state

        direction = jax.tree.map(lambda v, x: v.astype(x.dtype), direction, theta)
        _, tangent, state = jax.jvp(first, (theta,), (direction,), has_aux=True)
        return state, tangent

    def step(carry, key, t, batch) -> Any:
        state, *scaled = carry
        floats, rebuild = split(state)

        def after(theta, floats):
            new, loss = unroll.one_step(problem, key, theta, rebuild(floats), t, None)
            if problem.evaluate is None:
                return (floats_of(new), loss, jnp.zeros_like(loss)), new
            return (floats_of(new), loss, unroll.evaluate(problem, episode, theta, new)), new

        def one(direction, tangent, total, log_scale):
            small = jax.tree.map(
                lambda v, x: (v * jnp.exp(-log_scale).astype(v.dtype)).astype(x.dtype),
                direction,
                theta,
            )
            _, moved, new = jax.jvp(after, (theta, floats), (small, tangent), has_aux=True)
            tangent, loss, evaluated = moved
            total = total + loss.astype(dtype)
            sizes = [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in tangent]
            size = jnp.max(jnp.stack([*sizes, jnp.abs(total)]))
            size = jnp.maximum(size, jnp.exp(-log_scale))  # the factor is at least one
            tangent = [(x / size.astype(x.real.dtype)).astype(x.dtype) for x in tangent]
            total, evaluated = total / size, evaluated.astype(dtype) / size
            log_scale = jnp.maximum(log_scale + jnp.log(size), 0)
            return new, tangent, total, log_scale, evaluated

        new, *scaled, evaluated = jax.vmap(one)(directions, *scaled)
        new = jax.tree.map(lambda x: x[0], new)  # the same along every direction
        return (new, *scaled), (scaled[1], evaluated, scaled[2])

    states, tangents = jax.vmap(begin)(directions)
    zero = jnp.zeros(len(jax.tree.leaves(directions)[0]), dtype)
    carry = jax.tree.map(lambda x: x[0], states), tangents, zero, zero
    found: Any = unroll.scan(Segment(problem, episode, horizon), step, carry)[1]
    return found


def _summary(
    total: np.ndarray, evaluated: np.ndarray, log_scale: np.ndarray, exact: bool
) -> HorizonSweep:
    """From arrays of shape (episodes, T, directions)."""
    num_episodes, length, num_directions = total.shape
    steps = np.arange(1, length + 1)
    horizons = np.array(_one_two_five(length))
    gradient = total / steps[None, :, None] + evaluated
    share = 1 if exact else num_directions  # |g|^2 is the sum, or the mean, of squares
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        top = log_scale.max(axis=2, keepdims=True)
        squares = np.sum((gradient * np.exp(log_scale - top)) ** 2, axis=2) / share
        log_norms = 0.5 * np.log(squares) + top[:, :, 0]  # (episodes, T)
        picked = log_norms[:, horizons - 1]
        top = log_scale.max(axis=(0, 2), keepdims=True)
        scaled = (gradient * np.exp(log_scale - top))[:, horizons - 1]
        one = num_episodes == 1
        away = scaled - scaled[:1]  # episodes that are alike have a variance of exactly 0
        variance = np.sum(np.var(away, axis=0, ddof=0 if one else 1), axis=1) / share
        deviation = 0.5 * np.log(variance) + top[0, horizons - 1, 0]
        heaviness = np.exp(2 * (picked.max(axis=0) - np.median(picked, axis=0)))
        spread = np.full(len(horizons), np.inf)
        if not one:
            spread = picked.std(axis=0, ddof=1) / math.sqrt(num_episodes)
        growth, growth_se = _growth(log_norms + np.log(steps))
    return HorizonSweep(
        horizons, picked.mean(axis=0), spread, deviation, heaviness, growth, growth_se
    )


def _growth(logs: np.ndarray) -> tuple[float, float]:
    """The mean growth per step over the last three quarters, of every episode, and its error.

    The error is from the spread over the episodes, or if they are all alike from blocks of steps.
    """
    first = logs.shape[1] // 4
    steps = np.arange(first, logs.shape[1])
    if len(steps) < 2:
        return math.nan, math.inf
    away = steps - steps.mean()
    slopes = logs[:, first:] @ away / (away @ away)  # least squares
    ends = np.linspace(first, logs.shape[1] - 1, min(BLOCKS, len(steps) - 1) + 1).astype(int)
    blocks = np.diff(logs[:, ends], axis=1) / np.diff(ends)
    within = np.mean(np.var(blocks, axis=1)) / blocks.shape[1]
    between = np.var(slopes, ddof=1) if len(slopes) > 1 else 0.0
    alike = between < 1e-3 * within
    return float(slopes.mean()), float(math.sqrt(within if alike else between / len(slopes)))


def _one_two_five(length: int) -> list[int]:
    numbers = [m * 10**e for e in range(len(str(length))) for m in (1, 2, 5)]
    return [n for n in numbers if n < length] + [length]


def _power(log: float) -> str:
    """The number with this natural logarithm, which may be too large for a float."""
    if not math.isfinite(log):
        return "0" if log < 0 else str(log)
    tens = log / math.log(10)
    if -3 <= tens < 4:
        return f"{math.exp(log):.3g}"
    whole = math.floor(tens)
    return f"{10 ** (tens - whole):.1f}e{whole:+d}"
