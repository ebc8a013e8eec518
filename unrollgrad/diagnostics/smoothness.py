"""Whether the result of an inner loop responds smoothly to theta."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of
from unrollgrad._training.training_problem import TrainingState
from unrollgrad.diagnostics import _growth, _table
from unrollgrad.types import Key, Numeric, Segment, Theta, UnrolledProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LossSlice", "Metasmoothness", "loss_slice", "metasmoothness"]


class Metasmoothness(NamedTuple):
    """The metasmoothness of an inner loop, for every step size.

    Attributes:
        steps: The step sizes h, shape (m,) or ().
        smoothness: Between -1 and 1, of the steps' shape: 1 where the final state responds along a
            straight line, about 0 where it responds at random. NaN if it does not respond (then
            ``response`` is 0), or if a run diverged (then it is not finite).
        response: |w(theta + 2 h direction) - w(theta)| of the final floats w, the sum of absolute
            values over their number.
    """

    steps: jax.Array
    smoothness: jax.Array
    response: jax.Array

    def table(self) -> None:
        """Prints a line per step size.

        Needs rich (``pip install "unrollgrad[experiments]"``).
        """
        columns = (np.ravel(np.asarray(x)) for x in self)
        rows = [[f"{h:.3g}", f"{s:.3f}", f"{r:.3g}"] for h, s, r in zip(*columns, strict=True)]
        notes = [
            "1: the final state moves along a straight line; 0: at random. Smoothness alone is not "
            "enough: `lyapunov` sees growth that this does not."
        ]
        _table.print_table("Metasmoothness", ["step", "smoothness", "response"], rows, notes)


def metasmoothness(
    problem: UnrolledProblem,
    theta: Theta,
    direction: Theta | Numeric,
    step: float | Sequence[float],
    *,
    key: Key,
) -> Metasmoothness:
    """The sign agreement of two successive finite differences of the final state.

    Three runs of one episode, at theta, theta + h v and theta + 2 h v, end in w0, w1 and w2. With
    d = |w2 - w0|, S = sum_i d_i sign(w1 - w0)_i sign(w2 - w1)_i / sum_i d_i. No gradient is needed.
    It sees kinks and jumps of size h; growth by a derivative of one sign it does not see.

    Time: three episodes per step size, side by side. Memory: as many states.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Outer parameters.
        direction: v, a tree like theta; a leaf may be a number for all of a leaf.
        step: The step size h, or several.
        key: The episode's key.

    Returns:
        A ``Metasmoothness``. w are the floating leaves of the final state; those of the weights
        alone, ``state.params``, if the problem is from ``training_problem``.

    Raises:
        ValueError: If the horizon is sampled, a step is not positive, or ``direction`` does not fit
            theta or is zero.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=50)
        >>> linear = ug.diagnostics.metasmoothness(problem, theta, 1.0, 0.1, key=jax.random.key(0))
        >>> float(linear.smoothness)
        1.0

    References:
        Engstrom et al., Optimizing ML training with metagradient descent, 2025, arXiv:2503.13751.
    """
    horizon = inner_loop.static_horizon(problem, "metasmoothness")
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    direction = _direction(direction, theta)
    _check_sizes(step)
    begin, _ = inner_loop.check_step(problem, key, theta)
    if not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in begin.out_avals):
        raise ValueError(
            "metasmoothness compares the floating numbers of the final state, and this problem's "
            f"state has none: {', '.join(x.str_short() for x in begin.out_avals) or 'no arrays'}."
        )

    @eager.compiled
    def run(key, theta, direction, steps):
        episode = unroll.new_episode(horizon, key, horizon)

        def final(offset):
            moved = _moved(theta, direction, offset)
            state = unroll.initial_state(problem, episode, moved)
            state, _ = unroll.unroll(Segment(problem, episode, horizon), moved, state)
            weights = state.params if isinstance(state, TrainingState) else state
            return _growth.vector(floats_of(weights))

        def one(h):
            first, second, third = jax.vmap(final)(h * jnp.arange(3, dtype=h.dtype))
            d = jnp.abs(third - first)
            agree = jnp.sign(second - first) * jnp.sign(third - second)
            return jnp.sum(d * agree) / jnp.sum(d), jnp.mean(d)

        return jax.vmap(one)(steps)

    dtype = wide(*jax.tree.leaves(theta))
    steps = jnp.asarray(step, dtype)
    found = run(key, theta, direction, steps.reshape(-1))
    return Metasmoothness(steps, *(x.reshape(steps.shape) for x in found))


class LossSlice(NamedTuple):
    """The loss of one episode along a line through theta.

    Attributes:
        offsets: Shape (n,), the places theta + offset * direction.
        horizons: Three horizons T', about T/10, T/3 and T.
        loss: Shape (3, n), J of the episode cut off after T' steps.
        last: Shape (3, n), the loss of the last of these steps.
        reach: The direction's root mean square: a coordinate changes by about offset * reach.
    """

    offsets: np.ndarray
    horizons: tuple[int, ...]
    loss: np.ndarray
    last: np.ndarray
    reach: float

    @property
    def roughness(self) -> np.ndarray:
        """Shape (3,): how much of J's change from point to point is not a straight line's.

        The root mean square of second differences over sqrt(3) times that of first differences: 1
        if neighbouring points are independent, near 0 if J is smooth.
        """
        first = np.diff(np.where(np.isfinite(self.loss), self.loss, np.nan), axis=1)
        second = np.diff(first, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(np.nanmean(second**2, axis=1) / (3 * np.nanmean(first**2, axis=1)))

    def table(self) -> None:
        """Prints a line per horizon.

        Needs rich (``pip install "unrollgrad[experiments]"``).
        """
        rows = []
        for i, horizon in enumerate(self.horizons):
            values = self.loss[i][np.isfinite(self.loss[i])]
            low, high = (values.min(), values.max()) if len(values) else (np.nan, np.nan)
            best = self.offsets[np.nanargmin(self.loss[i])] if len(values) else np.nan
            lost = 1 - len(values) / len(self.offsets)
            rows.append(
                [
                    str(horizon),
                    f"{low:.4g} at {best:.3g}",
                    f"{high:.4g}",
                    f"{self.roughness[i]:.2f}",
                    f"{lost:.0%}",
                ]
            )
        headings = ["horizon", "lowest J at", "highest J", "roughness", "not finite"]
        notes = ["roughness: about 0 where J is smooth from point to point, 1 where it is noise."]
        _table.print_table("J along a line through theta", headings, rows, notes)

    def plot(self) -> "Figure":
        """Draws J and the last step's loss along the line, for every horizon.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        figure = _table.figure(11, 4.5)
        axes = figure.subplots(1, 2)
        for axis, values, title in zip(axes, (self.loss, self.last), _TITLES, strict=True):
            for i, horizon in enumerate(self.horizons):
                axis.plot(self.offsets, values[i], f"C{i}", lw=1, label=f"{horizon} steps")
            finite = values[np.isfinite(values)]
            if len(finite):  # a few huge values would flatten the rest
                low, high = np.quantile(finite, [0.1, 0.9])
                low, high = low - 2 * (high - low), high + 2 * (high - low)
                if low < high and (finite.min() < low or finite.max() > high):
                    axis.set_ylim(max(low, finite.min()), min(high, finite.max()))
            axis.axvline(0, color="0.6", lw=0.8)
            axis.set(xlabel="offset along the direction (0: the given theta)")
            axis.set_title(title, loc="left")
            axis.grid(alpha=0.3)
        axes[0].legend(frameon=False)
        return figure


_TITLES = ("J of one episode", "loss of the last step")


def loss_slice(
    problem: UnrolledProblem,
    theta: Theta,
    direction: Theta | Numeric | None = None,
    *,
    key: Key,
    offsets: Sequence[float] | np.ndarray | None = None,
) -> LossSlice:
    """Computes the loss of one episode along a line through theta, at three horizons.

    Everywhere the same episode, that is the same initial draws and data: what is rough in the
    picture is the loss, not the noise. With theta a logarithm, the line is a logarithmic axis.

    Time: as many episodes as offsets, side by side. Memory: as many states.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Outer parameters.
        direction: A tree like theta; a leaf may be a number for all of a leaf: ``{"log_lr": 1.0,
            "decay": 0.0}`` is a coordinate. The default is a random normal direction.
        key: The episode's key, and the random direction's.
        offsets: The places along the direction; by default 201 from -0.1 to 0.1 times the size of
            theta, its root mean square.

    Returns:
        A ``LossSlice``, with ``table()`` and ``plot()``.

    Raises:
        ValueError: If the horizon is sampled, or ``direction`` does not fit theta or is zero.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map(horizon=100)
        >>> line = ug.diagnostics.loss_slice(problem, theta, 1.0, key=jax.random.key(0))
        >>> line.horizons, bool(line.roughness[0] < line.roughness[2])
        ((10, 33, 100), True)
    """
    horizon = inner_loop.static_horizon(problem, "loss_slice")
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    if direction is None:
        leaves, structure = jax.tree.flatten(theta)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        direction = structure.unflatten(drawn)
    direction = _direction(direction, theta)
    inner_loop.check_step(problem, key, theta)
    size = _size(theta)
    if offsets is None:
        offsets = np.linspace(-0.1, 0.1, 201) * (size if size > 0 else 1.0)
    places = np.asarray(offsets, np.float64)
    horizons = tuple(sorted({max(horizon // 10, 1), max(horizon // 3, 1), horizon}))

    @eager.compiled
    def run(key, theta, direction, places):
        episode = unroll.new_episode(horizon, key, horizon)

        def one(offset):
            moved = _moved(theta, direction, offset)

            def step(carry, key, t, batch):
                state, total = carry
                state, loss = unroll.one_step(problem, key, moved, state, t, None)
                total = total + loss.astype(total.dtype)
                mean = total / (t + 1).astype(total.dtype)
                if problem.evaluate is not None:
                    mean = mean + unroll.evaluate(problem, episode, moved, state).astype(mean.dtype)
                return (state, total), jnp.stack([mean, loss.astype(mean.dtype)])

            state = unroll.initial_state(problem, episode, moved)
            begin = state, jnp.zeros((), wide(*jax.tree.leaves(theta)))
            _, rows = unroll.scan(Segment(problem, episode, horizon), step, begin)
            return rows[np.array(horizons) - 1]

        return jax.vmap(one)(places)

    dtype = wide(*jax.tree.leaves(theta))
    found = np.asarray(run(key, theta, direction, jnp.asarray(places, dtype)), np.float64)
    loss, last = np.moveaxis(found, 2, 0)
    return LossSlice(places, horizons, loss.T, last.T, _size(direction))


def _check_sizes(step: float | Sequence[float]) -> None:
    try:
        sizes = np.asarray(step, np.float64)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"`step` must be a positive number such as 1e-3, or several; got {step!r}."
        ) from error
    if not sizes.size or not np.all(np.isfinite(sizes) & (sizes > 0)):
        raise ValueError(
            f"`step` must be positive and finite: the size of a change of theta; got {step!r}. Use "
            "1e-3, for example."
        )


def _direction(direction: Theta | Numeric, theta: Theta) -> Theta:
    """The direction as a tree like theta; numbers are for whole leaves.

    Raises:
        ValueError: If it does not fit theta, or is zero.
    """
    try:
        full = jax.tree.map(
            lambda v, x: jnp.broadcast_to(jnp.asarray(v, wide(x.dtype)), x.shape),
            jax.tree.broadcast(direction, theta),
            theta,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`direction` must be a tree like theta, with numbers or arrays of its leaves' shapes; "
            f"got {jax.tree.map(arguments.describe, direction)} for "
            f"{jax.tree.map(arguments.describe, theta)}."
        ) from error
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(full))
    size = 1.0 if traced else float(_size(full))
    if not 0 < size < math.inf:
        text = "zero" if size == 0 else "not finite"
        raise ValueError(f"`direction` is {text}. Pass a direction in which theta is to be moved.")
    return full


def _moved(theta: Theta, direction: Theta, offset: jax.Array) -> Theta:
    def leaf(x, v):
        return (x.astype(v.dtype) + offset.astype(v.dtype) * v).astype(x.dtype)

    return jax.tree.map(leaf, theta, direction)


def _size(tree: Theta) -> float:
    """The root mean square of all numbers in the tree."""
    parts = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))
