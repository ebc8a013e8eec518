"""The stochastic bilevel algorithms on a task, as ``bilevel_benchmark`` runs and times them.

Every solver has two settings, the inner rate and the ratio of the inner to the outer rate; all
others are the library's defaults, which are the papers' (10 inner steps, 10 Neumann terms). Rates
fall as in the papers' analyses, like (k + 1)^-e with the exponents below.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments.bilevel.tasks import Task
from unrollgrad.types import GradientEstimator, Key

EXPONENTS = {
    "soba": (0.5, 0.5),
    "soba_constant": (0.0, 0.0),
    "ma_soba": (0.0, 0.0),
    "saba": (0.0, 0.0),
    "srba": (0.0, 0.0),
    "spaba": (0.0, 0.0),
    "fsla": (0.5, 0.5),
    "stocbio": (0.0, 0.0),
    "amigo": (0.0, 0.0),
    "bsa": (0.5, 0.5),
    "ttsa": (0.4, 0.6),
    "mrbo": (1 / 3, 1 / 3),
    "sustain": (1 / 3, 1 / 3),
    "f2sa": (4 / 7, 4 / 7),
    "penalty": (0.0, 0.0),
    "bome": (0.0, 0.0),
}
"""Exponents of the inner and the outer rate, by solver; the linear system has the inner one's.
"soba_constant" is SOBA with constant rates."""

FULL_BATCH = ("bome",)
"""Solvers whose batches are all rows; a gradient counts as many times."""

SHORT = 16
"""Steps of the first stretch, which tells the cost of a step."""

WINDOW = 8
"""Steps before a point over which theta's direction is averaged."""


class Carry(NamedTuple):
    """A run between two stretches.

    Attributes:
        theta: The outer variable.
        opt_state: The outer optimizer's state.
        state: The estimator's state.
        step: Steps so far.
        gradients: Gradient-equivalents of batches of the task's size so far.
        direction: The sum of theta's directions in the last stretch.
    """

    theta: Any
    opt_state: Any
    state: Any
    step: jax.Array
    gradients: jax.Array
    direction: Any


class Rates(NamedTuple):
    """The inner rate, and the ratio of the inner to the outer rate."""

    inner: Any
    ratio: Any


Build = Callable[[Rates, Any], tuple[GradientEstimator, optax.GradientTransformation]]


class Programs(NamedTuple):
    """The jitted programs of an algorithm; ``data`` are handed to ``build``, by default None.

    Attributes:
        begin: ``begin(rates, key, data) -> carry``.
        advance: ``advance(rates, key, carry, num_steps, data) -> carry``.
    """

    begin: Callable[..., Carry]
    advance: Callable[..., Carry]


class Point(NamedTuple):
    """Where a run was at some time.

    Attributes:
        theta: The outer variable.
        before: Theta ``WINDOW`` steps before.
        direction: The mean of theta's directions between the two.
        gradients: Gradient-equivalents so far.
        seconds: CPU seconds so far.
        step: Steps so far.
    """

    theta: Any
    before: Any
    direction: Any
    gradients: float
    seconds: float
    step: int


def make(
    task: Task, name: str, rates: Rates
) -> tuple[GradientEstimator, optax.GradientTransformation]:
    """The solver's estimator, and the optimizer of theta."""
    down, down_outer = EXPONENTS[name]
    sizes = [len(jax.tree.leaves(rows)[0]) for rows in (task.outer_data, task.inner_data)]
    batches = sizes if name in FULL_BATCH else [min(task.batch_size, size) for size in sizes]
    settings = {
        "init_params": lambda key: task.params,
        "outer_data": ug.bilevel.finite_sum(task.outer_data, batches[0]),
        "inner_data": ug.bilevel.finite_sum(task.inner_data, batches[1]),
        "inner_optimizer": optax.sgd(_falling(rates.inner, down)),
        "linear_rate": rates.inner,
        "touched": task.touched,
    }
    row = ug.bilevel.REGISTRY[name.removesuffix("_constant")]
    estimator = row.build(task.outer, task.inner, **settings)
    return estimator, optax.sgd(_falling(rates.inner / rates.ratio, down_outer))


def _falling(rate: Any, exponent: float) -> Any:
    return (lambda count: rate / (count + 1.0) ** exponent) if exponent else rate


def of_task(task: Task, name: str, cells: bool = False) -> Programs:
    """The programs of a solver on a task; with ``cells`` for a grid of rates."""
    rows = len(jax.tree.leaves(task.inner_data)[0])
    unit = rows / task.batch_size if name in FULL_BATCH else 1.0
    return programs(lambda rates, data: make(task, name, rates), task.theta, unit, cells)


def programs(build: Build, theta: Any, unit: float = 1.0, cells: bool = False) -> Programs:
    """The jitted programs of an algorithm.

    The cells of a grid share the key, so that they read the same batches.

    Args:
        build: ``build(rates, data)`` returns the estimator, and the optimizer of theta.
        theta: The first theta.
        unit: Gradient-equivalents that one of the estimator's counts.
        cells: Whether rates have a leading axis, over which the programs are mapped.
    """

    def begin(rates, key, data=None):
        estimator, optimizer = build(rates, data)
        state, opt_state = estimator.init(key, theta), optimizer.init(theta)
        return Carry(theta, opt_state, state, jnp.int32(0), jnp.zeros(()), 0 * theta)

    def advance(rates, key, carry, num_steps, data=None):
        estimator, optimizer = build(rates, data)

        def step(_, carry):
            own = jax.random.fold_in(key, carry.step)
            estimate, state = estimator.estimate(own, carry.theta, carry.state)
            info: Any = estimate.info
            updates, opt_state = optimizer.update(estimate.grad, carry.opt_state)
            return Carry(
                optax.apply_updates(carry.theta, updates),
                opt_state,
                state,
                carry.step + 1,
                carry.gradients + unit * info.gradients,
                carry.direction + estimate.grad,
            )

        fresh = carry._replace(direction=0 * carry.direction)
        return jax.lax.fori_loop(0, num_steps, step, fresh)

    if cells:
        begin = jax.vmap(begin, (0, None, None))
        advance = jax.vmap(advance, (0, None, 0, None, None))
    return Programs(jax.jit(begin), jax.jit(advance))


def run(
    ready: Programs, rates: Rates, key: Key, budgets: list[float], data: Any = None
) -> list[Point]:
    """Runs until each of the budgets, in gradient-equivalents, is spent; one point for each.

    The seconds are CPU seconds of the steps, over all threads, so that other programs on the
    machine count little: compiling, the first state and the points are left out.
    """
    carry, seconds = ready.begin(rates, key, data), 0.0
    jax.block_until_ready(ready.advance(rates, key, carry, 0, data))

    def advanced(carry, num):
        nonlocal seconds
        begun = cpu_seconds()
        carry = jax.block_until_ready(ready.advance(rates, key, carry, num, data))
        seconds += cpu_seconds() - begun
        return carry

    points: list[Point] = []
    before, num = carry.theta, 1
    for budget in budgets:
        while (spent := float(jnp.max(carry.gradients))) < budget:
            step = int(jnp.max(carry.step))
            num = max(1, round((budget - spent) / (spent / step))) if step else SHORT
            if num > WINDOW:
                carry = advanced(carry, num - WINDOW)
            before, num = carry.theta, min(num, WINDOW)
            carry = advanced(carry, num)
        cost, step = float(jnp.max(carry.gradients)), int(jnp.max(carry.step))
        mean = carry.direction / num
        points.append(Point(carry.theta, before, mean, cost, seconds, step))
    return points


def cpu_seconds() -> float:
    """The CPU seconds of this process, over all threads."""
    return time.process_time()


def names() -> tuple[str, ...]:
    """The library's single-block algorithms, and SOBA with constant rates."""
    ours = [name for name, row in ug.bilevel.REGISTRY.items() if not row.blocks]
    return tuple(name for name in EXPONENTS if name.removesuffix("_constant") in ours)
