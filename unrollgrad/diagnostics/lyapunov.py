"""Lyapunov exponents: how fast the state of an inner loop forgets or magnifies a small change."""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad.diagnostics import _growth, _table
from unrollgrad.diagnostics._growth import BLOCKS, Map, Push
from unrollgrad.types import Episode, Key, Numeric, State, Theta, UnrolledProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLOCKS",
    "DIGITS",
    "Lyapunov",
    "Map",
    "episode_map",
    "lyapunov",
    "lyapunov_by_distance",
    "lyapunov_of_map",
]

DIGITS = {"float64": 53, "float32": 24, "tf32": 11, "bfloat16": 8}
"""The binary digits of a number; rounding errs by at most 2^-digits."""


class Lyapunov(NamedTuple):
    """Lyapunov exponents of one trajectory, in natural logarithms per step.

    After n steps a small change of the state is about exp(n exponents[0]) times as large, and the
    volume of a box of k small changes exp(n (exponents[0] + ... + exponents[k - 1])) times.

    Attributes:
        exponents: Shape (k,), the largest first. Minus infinity if a step forgets a direction
            altogether; NaN if the state became non-finite.
        se: Shape (k,), their standard errors, from the means of 20 blocks of consecutive steps;
            infinite where they cannot be told: fewer than two steps, or an infinite exponent.
        per_step: Shape (num_steps, k), the growth in every step; their means are ``exponents``.
        horizon_efolds: The episode's length times the first exponent: a small change at its start
            is exp(horizon_efolds) times as large at its end. Of a map: over ``num_steps``.
    """

    exponents: jax.Array
    se: jax.Array
    per_step: jax.Array
    horizon_efolds: jax.Array

    @property
    def peak_efolds(self) -> jax.Array:
        """The largest logarithm by which a small change has grown at any time, at least 0.

        Where all exponents are negative, changes may grow for long before they decay.
        """
        return jnp.maximum(jnp.max(jnp.cumsum(self.per_step[..., 0], axis=-1), axis=-1), 0)

    @property
    def reproducible_steps(self) -> dict[str, jax.Array]:
        """The steps after which two machines give unrelated states, by the numbers' precision.

        Rounding errs by 2^-24 in float32 (2^-53, 2^-11 and 2^-8 in float64, TF32 and bfloat16),
        relative to the state, and reaches its size after 24 ln 2 / exponents[0] = 16.6 /
        exponents[0] steps. Infinite where the first exponent is not positive.
        """
        first = self.exponents[..., 0]
        rate = jnp.where(first > 0, first, 1)
        return {
            name: jnp.where(first > 0, digits * math.log(2) / rate, jnp.inf)
            for name, digits in DIGITS.items()
        }

    def table(self) -> None:
        """Prints the exponents, what they do to an episode, and the reproducible steps.

        Needs rich (``pip install "unrollgrad[experiments]"``).
        """
        values, errors = self._single()
        rows = [
            [f"{i + 1}", f"{x:.4g}", f"{e:.1g}", _length(x)]
            for i, (x, e) in enumerate(zip(values, errors, strict=True))
        ]
        steps = {name: float(x) for name, x in self.reproducible_steps.items()}
        peak, measured = _g(self.peak_efolds), len(self.per_step)
        notes = [
            f"Over an episode a small change of the state grows by exp({_g(self.horizon_efolds)}); "
            f"at most by exp({peak}) within the {measured} steps measured.",
            "Two machines agree for about "
            + ", ".join(f"{x:.0f} steps in {name}" for name, x in steps.items())
            + "."
            if math.isfinite(steps["float32"])
            else "Rounding errors do not grow without limit: runs on two machines stay close.",
        ]
        headings = ["exponent", "per step", "± se", "steps for a factor e"]
        _table.print_table("Lyapunov exponents", headings, rows, notes)

    def plot(self) -> "Figure":
        """Draws the growth of small changes against the steps, and the float32 limit.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        values, errors = self._single()
        figure = _table.figure(7.5, 4.5)
        axis = figure.subplots()
        growth = np.cumsum(np.asarray(self.per_step, np.float64), axis=0)
        steps = np.arange(1, len(growth) + 1)
        for i, (x, e) in enumerate(zip(values, errors, strict=True)):
            finite = np.isfinite(growth[:, i])
            label = f"exponent {i + 1}: {x:.3g} ± {e:.1g} per step"
            axis.plot(steps[finite], growth[finite, i], f"C{i}", label=label)
            if math.isfinite(x):
                axis.plot(steps, x * steps, f"C{i}", lw=0.8, ls=":")
        if values[0] > 0:
            limit = DIGITS["float32"] * math.log(2)
            axis.axhline(limit, color="0.4", lw=0.8, ls="--")
            place = {"xy": (1, limit), "xycoords": ("axes fraction", "data"), "ha": "right"}
            text = "a rounding error of float32 is as large as the state"
            axis.annotate(text, xytext=(0, 3), textcoords="offset points", color="0.4", **place)
        axis.set(xlabel="steps", ylabel="ln(size of a small change / size at the start)")
        axis.set_title("growth of small changes (dotted: the exponents)", loc="left")
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False)
        return figure

    def _single(self) -> tuple[np.ndarray, np.ndarray]:
        values, errors = (np.asarray(x, np.float64) for x in (self.exponents, self.se))
        if values.ndim != 1:
            raise ValueError(
                f"`exponents` has shape {values.shape}, that is several trajectories. Take one: "
                "jax.tree.map(lambda x: x[0], result)."
            )
        return values, errors


def lyapunov(
    problem: UnrolledProblem,
    theta: Theta,
    *,
    key: Key,
    num_exponents: int = 1,
    num_steps: int | None = None,
    discard: int = 0,
) -> Lyapunov:
    """Lyapunov exponents of an inner loop along one episode.

    Backpropagated gradients grow like exp(t exponents[0]), and their variance like its square,
    unless they are zero: an explosion is then a property of the exact gradient, and of every
    estimator of it that does not smooth. With a negative first exponent they fade; at zero they
    grow at most like a power of t.

    Every step is differentiated in the directions of k small changes of the state (one ``jvp``
    each), which a QR decomposition makes orthonormal again; an exponent is the mean of log |R_ii|.
    Only floating leaves of the state enter; theta, the step's number and its random draws are those
    of the episode. The first change is random: it takes about log(dim(state)) / (the difference of
    the first exponents) steps to align, which ``discard`` leaves out.

    Differentiable with respect to theta by ``jax.grad`` and ``jax.jvp`` (use float64); works under
    ``jit`` and, over keys or thetas, under ``vmap``, which gives the spread over episodes.

    Time: k + 1 forward passes and a QR decomposition per step. Memory: k + 1 states, nothing for a
    backward pass.

    Args:
        problem: The inner loop; its step must be differentiable forwards. If it is not:
            ``lyapunov_by_distance(*episode_map(problem, theta, key=key), num_steps)``.
        theta: Outer parameters.
        key: The episode's key.
        num_exponents: k, at most the number of floats in the state.
        num_steps: Inner steps that are measured; by default the horizon less ``discard``. After the
            horizon the loop goes on with higher step numbers.
        discard: Inner steps before them, which are run and not counted.

    Returns:
        A ``Lyapunov``, with ``table()`` and ``plot()``.

    Raises:
        ValueError: If a number is out of range, or ``num_steps`` is needed: the horizon is sampled.
        TypeError: If the step has no forward derivative.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map(horizon=2000)
        >>> chaos = ug.diagnostics.lyapunov(problem, theta, key=jax.random.key(0))
        >>> 0.4 < float(chaos.exponents[0]) < 0.6                # 0.495 per step
        True
        >>> round(float(chaos.reproducible_steps["float32"]), -1)
        30.0

    References:
        Benettin et al., Meccanica 15, 1980. On gradients: Metz et al., 2021, arXiv:2111.05803.
    """
    inner_loop.check_problem(problem)
    steps = _steps_of(problem, num_steps, discard)
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    inner_loop.check_step(problem, key, theta)

    @eager.compiled
    def run(key, theta):
        episode = unroll.new_episode(problem.horizon, key, 1)
        step, state = _map_of(problem, theta, episode)
        found = _growth.measure(_growth.by_derivatives, step, state, num_exponents, steps)
        return Lyapunov(*found, episode.horizon.astype(found[0].dtype) * found[0][0])

    with _derivatives_needed():
        return run(key, theta)


def lyapunov_of_map(
    step: Map, state: State | Numeric, num_steps: int, *, num_exponents: int = 1, discard: int = 0
) -> Lyapunov:
    """Lyapunov exponents of any map, along the trajectory that starts at ``state``.

    See ``lyapunov``. Differentiable with respect to ``state`` and what ``step`` closes over.

    Args:
        step: ``step(state) -> state``, differentiable forwards.
        state: The first state, any pytree; its ints, bools and keys are carried along.
        num_steps: Steps that are measured.
        num_exponents: k, at most the number of floats in the state.
        discard: Steps before them, which are run and not counted.

    Returns:
        A ``Lyapunov``; its ``horizon_efolds`` is for ``num_steps``.

    Raises:
        ValueError: If a number is out of range, or the state has no floating leaves.
        TypeError: If ``step`` changes the state's structure, or has no forward derivative.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> cat = jnp.array([[2.0, 1.0], [1.0, 1.0]])
        >>> result = ug.diagnostics.lyapunov_of_map(
        ...     lambda s: cat @ s % 1, jnp.array([0.2, 0.7]), 100, num_exponents=2, discard=20)
        >>> [round(float(x), 4) for x in result.exponents]      # +- ln((3 + sqrt 5) / 2)
        [0.9624, -0.9624]
    """
    with _derivatives_needed():
        steps = _steps(num_steps, discard)
        return _run_map(_growth.by_derivatives, step, state, num_exponents, steps)


def lyapunov_by_distance(
    step: Map,
    state: State | Numeric,
    num_steps: int,
    *,
    num_exponents: int = 1,
    distance: float | None = None,
    discard: int = 0,
) -> Lyapunov:
    """Lyapunov exponents from the distance of nearby trajectories, without derivatives.

    k neighbours of the trajectory, at ``distance`` times the norm of the state, take every step
    with it; their differences are then made orthogonal and as small again. For steps that have no
    derivative: callbacks, ``jax.custom_vjp``. Each exponent errs by O(distance) and by rounding /
    distance; what shrinks in a step by more than eps / (2 distance), 1e-7 in float64 and 6e-4 in
    float32, counts as shrinking by that much; a neighbour on the other side of a jump counts as
    huge growth.

    Time: k + 1 forward passes per step. Memory: k + 1 states.

    Args:
        step: ``step(state) -> state``; for a problem: ``episode_map(problem, theta, key=key)``.
        state: The first state, any pytree; ints, bools and keys are the same in all neighbours.
        num_steps: Steps that are measured.
        num_exponents: k, at most the number of floats in the state.
        distance: The relative distance; the default is eps^0.57: 1e-9 in float64, 1e-4 in float32.
        discard: Steps before them, which are run and not counted.

    Returns:
        A ``Lyapunov``; its ``horizon_efolds`` is for ``num_steps``.

    Raises:
        ValueError: If a number is out of range, or the state has no floating leaves.
        TypeError: If ``step`` changes the state's structure.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map()
        >>> step, state = ug.diagnostics.episode_map(problem, theta, key=jax.random.key(0))
        >>> chaos = ug.diagnostics.lyapunov_by_distance(step, state, 2000)
        >>> 0.4 < float(chaos.exponents[0]) < 0.6
        True

    References:
        Benettin, Galgani, Strelcyn, Physical Review A 14, 1976.
    """
    if distance is not None and not (0 < distance < 1):
        raise ValueError(f"`distance` must be between 0 and 1; got {distance}.")
    push = _growth.by_differences(distance)
    return _run_map(push, step, state, num_exponents, _steps(num_steps, discard))


def episode_map(
    problem: UnrolledProblem, theta: Theta, *, key: Key
) -> tuple[Map, tuple[State, jax.Array]]:
    """An episode of a problem as a map and its first state, which contains the step's number.

    Args:
        problem: The inner loop.
        theta: Outer parameters.
        key: The episode's key.

    Returns:
        ``step((inner state, t)) -> (inner state, t + 1)``, and (first inner state, 0).

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing()
        >>> step, state = ug.diagnostics.episode_map(problem, theta, key=jax.random.key(0))
        >>> int(step(state)[1])
        1
    """
    inner_loop.check_problem(problem)
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    inner_loop.check_step(problem, key, theta)
    return _map_of(problem, theta, unroll.new_episode(problem.horizon, key, 1))


def _map_of(
    problem: UnrolledProblem, theta: Theta, episode: Episode
) -> tuple[Map, tuple[State, jax.Array]]:
    keys = unroll.step_keys(episode)

    def step(state):
        inner, t = state
        key = jax.random.fold_in(keys, t)
        return unroll.one_step(problem, key, theta, inner, t, None)[0], t + 1

    return step, (unroll.initial_state(problem, episode, theta), episode.t)


def _steps_of(problem: UnrolledProblem, num_steps: int | None, discard: int) -> _growth.Steps:
    if num_steps is not None:
        return _steps(num_steps, discard)
    if callable(problem.horizon):
        raise ValueError("`num_steps` is needed: the problem's horizon is sampled. Pass a number.")
    horizon = arguments.positive_int("problem.horizon", problem.horizon)
    if _not_negative("discard", discard) >= horizon:
        raise ValueError(
            f"`discard`={discard} leaves nothing of the horizon of {horizon} steps. Lower it, or "
            "pass `num_steps`."
        )
    return _growth.Steps(horizon - discard, discard)


def _not_negative(name: str, value: object) -> int:
    return 0 if isinstance(value, int) and value == 0 else arguments.positive_int(name, value)


def _steps(num_steps: int, discard: int) -> _growth.Steps:
    num_steps = arguments.positive_int("num_steps", num_steps)
    return _growth.Steps(num_steps, _not_negative("discard", discard))


def _run_map(
    push: Push, step: Map, state: Any, num_exponents: int, steps: _growth.Steps
) -> Lyapunov:
    state = arguments.strong_state(state, "state")

    @eager.compiled
    def run(state):
        found = _growth.measure(push, step, state, num_exponents, steps)
        return Lyapunov(*found, steps.measured * found[0][0])

    return run(state)


@contextlib.contextmanager
def _derivatives_needed() -> Iterator[None]:
    """Says what to do where a step has no forward derivative."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error).lower()
        if "jvp" not in text and "forward-mode" not in text:
            raise
        raise TypeError(
            "`step` has no forward derivative (it contains jax.custom_vjp or a callback). Use "
            "lyapunov_by_distance(step, state, num_steps); for a problem: step, state = "
            "episode_map(problem, theta, key=key)."
        ) from error


def _length(exponent: float) -> str:
    return f"{1 / abs(exponent):.3g}" if exponent and math.isfinite(exponent) else "-"


def _g(x: jax.Array) -> str:
    return f"{float(x):.3g}"
