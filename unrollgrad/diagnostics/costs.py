"""What a call of an estimator will cost: bytes and seconds, before it runs."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad.diagnostics import _table
from unrollgrad.types import GradientEstimator, Key, Segment, Theta, UnrolledProblem

__all__ = ["Cost", "estimate_cost"]

_STEPS = 32  # the inner steps of a run that is timed
_BATCHES = (1, 64)  # and how many of them run side by side


class Cost(NamedTuple):
    """The cost of one call of an estimator; None is what cannot be told.

    Attributes:
        peak_bytes: The device memory that the call needs in all: the three below together.
        temporary_bytes: What it computes on the way, such as states that backpropagation keeps.
        argument_bytes: Theta and the worker's state.
        output_bytes: The estimate and the new state.
        seconds: The order of magnitude of one call's time, without compilation.
        compile_seconds: The time that compiling took just now.
    """

    peak_bytes: int | None
    temporary_bytes: int | None
    argument_bytes: int | None
    output_bytes: int | None
    seconds: float | None
    compile_seconds: float

    def table(self) -> None:
        """Prints the costs. Needs rich (``pip install "unrollgrad[experiments]"``)."""
        rows = []
        for name, value in self._asdict().items():
            if value is None:
                shown = "not known"
            elif name.endswith("bytes"):
                shown = _table.readable_bytes(value)
            else:
                shown = f"{value:.2g} s"
            rows.append([name.replace("_", " "), shown])
        _table.print_table("One call of the estimator", ["", ""], rows)


def estimate_cost(problem: UnrolledProblem, theta: Theta, estimator: GradientEstimator) -> Cost:
    """Estimates what one call of an estimator costs, without running it.

    Bytes are what the compiler reserves (``compiled.memory_analysis()``); where the backend does
    not say they are None. Seconds come from a model with two numbers, the time per operation and
    per element, which are measured on two short forward runs of the problem: 32 inner steps, once
    and 64 side by side. The operations and elements of both and of the estimator are counted in
    their programs; loops whose length is not known count once. It tells seconds from hours, and no
    more: on a busy machine, or where the compiler fuses a program better than the other, it is off
    by several times.

    Time: three compilations, which the estimator's own first call does not repeat if a compilation
    cache is set, and two short runs.

    Args:
        problem: The inner loop.
        theta: Outer parameters; only their shapes matter, if the step has no loops of its own.
        estimator: An estimator of this problem, also ``average(...)``.

    Returns:
        A ``Cost``, with ``table()``.

    Raises:
        TypeError: If theta is not floating, or the step does not fit it.

    Example:
        >>> import unrollgrad as ug
        >>> problem, theta = ug.problems.lorenz(horizon=2000)
        >>> whole, kept = ug.bptt(problem), ug.bptt(problem, remat="sqrt")
        >>> costs = [ug.diagnostics.estimate_cost(problem, theta, e) for e in (whole, kept)]
        >>> costs[0].temporary_bytes > 3 * costs[1].temporary_bytes
        True
    """
    inner_loop.check_problem(problem)
    key, theta = jax.random.key(0), arguments.floating_theta(theta)
    inner_loop.check_step(problem, key, theta)
    state = jax.eval_shape(estimator.init, key, theta)
    begun = time.perf_counter()
    compiled = jax.jit(estimator.estimate).lower(key, theta, state).compile()
    seconds = time.perf_counter() - begun
    peak, temporary, argument, output = _bytes(compiled)
    program = jax.make_jaxpr(estimator.estimate)(key, theta, state)
    model = _seconds(problem, key, theta, _work(program.jaxpr))
    return Cost(peak, temporary, argument, output, model, seconds)


def _bytes(compiled: jax.stages.Compiled) -> tuple[int | None, ...]:
    """All, temporary, argument and output bytes; a backend that says 0 for all does not know."""
    try:
        found: Any = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        found = None
    if found is None:
        return (None,) * 4
    names = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
    temporary, argument, output = (int(getattr(found, name, 0)) for name in names)
    if temporary + argument + output == 0:
        return (None,) * 4
    alias = int(getattr(found, "alias_size_in_bytes", 0))
    return temporary + argument + output - alias, temporary, argument, output


def _seconds(problem: UnrolledProblem, key: Key, theta: Theta, work: np.ndarray) -> float | None:
    """The time of a program with so many operations and elements."""
    rows, times = [], []
    for batch in _BATCHES:

        def run(keys, theta):
            def one(key):
                episode = unroll.new_episode(problem.horizon, key, 1)
                state = unroll.initial_state(problem, episode, theta)
                segment = Segment(problem, episode, _STEPS)
                return jnp.sum(unroll.unroll(segment, theta, state)[1])

            return jax.vmap(one)(keys)

        keys = jax.random.split(key, batch)
        rows.append(_work(jax.make_jaxpr(run)(keys, theta).jaxpr))
        compiled = jax.jit(run).lower(keys, theta).compile()
        jax.block_until_ready(compiled(keys, theta))
        found = []
        for _ in range(5):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(keys, theta))
            found.append(time.perf_counter() - begun)
        times.append(min(found))
    rates = np.linalg.solve(np.array(rows), np.array(times))
    if (rates < 0).any():  # one of the two is too small to be seen
        rates = (
            np.array([0, times[1] / rows[1][1]])
            if rates[0] < 0
            else np.array([times[0] / rows[0][0], 0])
        )
    return float(work @ rates)


def _work(jaxpr: Any) -> np.ndarray:
    """The operations that a program executes, and the elements that they compute."""
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        inner = [
            getattr(x, "jaxpr", x)
            for value in equation.params.values()
            for x in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if inner:
            parts = [_work(x) for x in inner]
            branches = equation.primitive.name == "cond"
            total += times * (np.max(parts, axis=0) if branches else np.sum(parts, axis=0))
            continue
        elements = sum(int(np.prod(x.aval.shape)) for x in equation.outvars)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            elements *= int(np.prod([shape[i] for i in contracted]))
        total += 1, elements
    return total
