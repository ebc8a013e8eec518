"""Where a NaN or an infinity comes from: the first step, the leaf, and the direction."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.diagnostics import _table
from unrollgrad.types import Episode, Key, Segment, Theta, UnrolledProblem

__all__ = ["HUGE", "NonFinite", "locate_nonfinite"]

HUGE = 1e15
"""A value that has grown beyond this was about to overflow; below, one operation made the NaN."""


class NonFinite(NamedTuple):
    """The first number that is not finite.

    Attributes:
        direction: "forward" if it is in the states or losses, "backward" if they are finite and a
            derivative is not; None if everything is finite.
        step: The step's number, from 0; None in ``init`` and ``evaluate``, and if all is finite.
        leaf: Which number: ``loss``, ``evaluate``, ``state['x']``; backwards the derivative with
            respect to it: ``theta['lr']``, ``state['x']``.
        value: "nan" or "inf".
        before: The largest magnitude in the state (backwards: in the derivatives) just before.
    """

    direction: str | None
    step: int | None = None
    leaf: str | None = None
    value: str | None = None
    before: float = math.nan

    @property
    def reason(self) -> str:
        """What happened and what to do, in a sentence or two."""
        if self.direction is None:
            return "States, losses and derivatives are finite."
        where = "in `init` or `evaluate`" if self.step is None else f"in step {self.step}"
        what = self.leaf if self.direction == "forward" else f"the derivative for {self.leaf}"
        said = f"{what} is {self.value} {where}, {self.direction}."
        if self.before > HUGE:
            said += f" It grew to {self.before:.1e} before: an explosion, not a bug in one step."
            if self.direction == "backward":
                return said + " See `lyapunov`; evolution strategies need no derivative."
            return said + " Lower theta's learning rates, or bound what grows."
        said += f" The largest magnitude before was {self.before:.2g}: one operation made it."
        if self.direction == "backward":
            return said + (
                " Usual causes: the square root or norm of 0 (optax.adam without eps_root where a "
                "gradient is 0), a division in the branch of a `where` that is not taken."
            )
        return said + " Usual causes: a logarithm or root of a negative number, 0 / 0."

    def table(self) -> None:
        """Prints what was found. Needs rich (``pip install "unrollgrad[experiments]"``)."""
        rows = [[name, str(value)] for name, value in self._asdict().items()]
        _table.print_table("The first number that is not finite", ["", ""], rows, [self.reason])


def locate_nonfinite(problem: UnrolledProblem, theta: Theta, key: Key) -> NonFinite:
    """Finds the first NaN or infinity of an episode, forwards, or else in its backpropagation.

    Backpropagation through an episode goes from its last step to its first; "first" is then the
    first on this way, the step with the highest number.

    Time: one forward pass and one backward pass. Memory: the states of all steps.

    Args:
        problem: The inner loop, with a static horizon. If its step has no derivative, only the
            forward pass is examined.
        theta: Outer parameters; they must be finite.
        key: The key of the episode, as of ``episode_loss`` or ``bptt(problem).estimate``.

    Returns:
        A ``NonFinite``, with ``reason`` and ``table()``.

    Raises:
        ValueError: If the horizon is sampled, or theta is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.UnrolledProblem(
        ...     lambda key, theta: {"x": theta["a"]},
        ...     lambda key, theta, s, t: ({"x": jnp.sqrt(theta["b"] * abs(t - 3))}, s["x"]), 10)
        >>> theta = {"a": 1.0, "b": 2.0}
        >>> ug.diagnostics.locate_nonfinite(problem, theta, jax.random.key(0))[:4]
        ('backward', 3, "theta['b']", 'nan')
    """
    horizon = inner_loop.static_horizon(problem, "locate_nonfinite")
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    for path, x in jax.tree_util.tree_leaves_with_path(theta):
        if not np.isfinite(np.asarray(x, np.float64)).all():
            raise ValueError(f"theta{jax.tree_util.keystr(path)} is not finite. Begin elsewhere.")
    inner_loop.check_step(problem, key, theta)
    episode = unroll.new_episode(horizon, key, horizon)
    forward = eager.compiled(lambda e, theta: _forward(problem, e, theta))(episode, theta)
    names = _names("state", forward.states)
    found = _first_forward(forward, names)
    if found.direction is not None:
        return found
    backward = eager.compiled(lambda *args: _backward(problem, *args))
    try:
        loose, steps = backward(episode, theta, forward.states)
    except (TypeError, ValueError, NotImplementedError) as error:
        if not re.search("differenti|jvp|vjp", str(error), re.IGNORECASE):
            raise
        return found  # the step has no derivative
    return _first_backward(loose, steps, [*names, *_names("theta", theta)], horizon)


class _Report(NamedTuple):
    """For every number of interest whether it has a NaN, an infinity, and its largest magnitude."""

    nan: jax.Array | np.ndarray
    inf: jax.Array | np.ndarray
    largest: jax.Array | np.ndarray


class _Forward(NamedTuple):
    states: object  # before every step, and after the last: leading axis T + 1
    of_states: _Report  # (T + 1, leaves)
    of_losses: _Report  # (T, 1)
    of_end: _Report  # (1,)


def _report(leaves: list[jax.Array]) -> _Report:
    """Says of every floating leaf whether it has a NaN or an infinity, and how large it is."""
    dtype = wide(*[jnp.finfo(x.dtype).dtype for x in leaves])
    finite = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0).astype(dtype) for x in leaves]
    return _Report(
        jnp.stack([jnp.any(jnp.isnan(x)) for x in leaves]),
        jnp.stack([jnp.any(jnp.isinf(x)) for x in leaves]),
        jnp.stack([jnp.max(x, initial=0) for x in finite]),
    )


def _forward(problem: UnrolledProblem, episode: Episode, theta: Theta) -> _Forward:
    horizon = int(problem.horizon)  # type: ignore[arg-type]

    def step(state, key, t, batch) -> Any:
        new, loss = unroll.one_step(problem, key, theta, state, t, None)
        return new, (state, _report([loss]))

    first = unroll.initial_state(problem, episode, theta)
    last, (states, losses) = unroll.scan(Segment(problem, episode, horizon), step, first)
    joined = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), states, last)
    end = jnp.zeros(()) if problem.evaluate is None else None
    end = unroll.evaluate(problem, episode, theta, last) if end is None else end
    of_states = jax.vmap(lambda state: _report([jnp.zeros(()), *floats_of(state)]))(joined)
    return _Forward(joined, of_states, losses, _report([end]))


def _backward(
    problem: UnrolledProblem, episode: Episode, theta: Theta, states: object
) -> tuple[_Report, _Report]:
    """Reports of the derivatives at the end, and after going back through every step.

    A derivative with respect to theta is that of one step's own share.
    """
    horizon = int(problem.horizon)  # type: ignore[arg-type]
    keys = unroll.step_keys(episode)
    last = jax.tree.map(lambda x: x[-1], states)

    def at_end(theta, floats):
        if problem.evaluate is None:
            return jnp.zeros(())
        return unroll.evaluate(problem, episode, theta, split(last)[1](floats))

    grad, ahead = jax.grad(at_end, (0, 1))(theta, floats_of(last))
    of_end = _report([jnp.zeros(()), *ahead, *jax.tree.leaves(grad)])

    def back(ahead, t):
        state = jax.tree.map(lambda x: x[t], states)
        floats, rebuild = split(state)

        def step(theta, floats):
            key = jax.random.fold_in(keys, t)
            new, loss = unroll.one_step(problem, key, theta, rebuild(floats), t, None)
            return floats_of(new), loss

        (_, loss), pull = jax.vjp(step, theta, floats)
        grad, behind = pull((ahead, jnp.full_like(loss, 1 / horizon)))
        return behind, _report([jnp.zeros(()), *behind, *jax.tree.leaves(grad)])

    order = jnp.arange(horizon, dtype=jnp.int32)[::-1]
    return of_end, jax.lax.scan(back, ahead, order)[1]


def _first_forward(forward: _Forward, names: list[str]) -> NonFinite:
    states, losses, end = (_Report(*(np.asarray(x) for x in report)) for report in forward[1:])
    bad = np.flatnonzero((states.nan | states.inf).any(axis=1))
    bad_losses = np.flatnonzero((losses.nan | losses.inf)[:, 0])
    first = bad[0] if len(bad) else math.inf  # the state before this step
    first_loss = bad_losses[0] if len(bad_losses) else math.inf
    if first == 0:
        return NonFinite("forward", None, *_which(states, 0, ["", *names]), math.nan)
    if first_loss + 1 < first:  # a loss that is made together with such a state is not named
        value = "nan" if losses.nan[int(first_loss), 0] else "inf"
        before = float(states.largest[int(first_loss)].max())
        return NonFinite("forward", int(first_loss), "loss", value, before)
    if first < math.inf:
        before = float(states.largest[int(first) - 1].max())
        leaf, value = _which(states, int(first), ["", *names])
        return NonFinite("forward", int(first) - 1, leaf, value, before)
    if end.nan[0] or end.inf[0]:
        before = float(states.largest[-1].max())
        return NonFinite("forward", None, "evaluate", "nan" if end.nan[0] else "inf", before)
    return NonFinite(None)


def _first_backward(end: _Report, steps: _Report, names: list[str], horizon: int) -> NonFinite:
    rows = [
        np.concatenate([np.asarray(a)[None], np.asarray(b)])
        for a, b in zip(end, steps, strict=True)
    ]
    report = _Report(*rows)
    bad = np.flatnonzero((report.nan | report.inf).any(axis=1))
    if not len(bad):
        return NonFinite(None)
    i = int(bad[0])
    leaf, value = _which(report, i, ["", *names])
    before = float(report.largest[i - 1].max()) if i else math.nan
    return NonFinite("backward", horizon - i if i else None, leaf, value, before)


def _which(report: _Report, row: int, names: list[str]) -> tuple[str, str]:
    column = int(np.flatnonzero((report.nan | report.inf)[row])[0])
    return names[column], "nan" if report.nan[row, column] else "inf"


def _names(name: str, tree: object) -> list[str]:
    """The paths of the floating leaves."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [
        f"{name}{jax.tree_util.keystr(path)}"
        for path, x in named
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
