"""Stochastic solves of H v = d outer / d params: steps on v, or a Neumann series."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._training import inner_optimizers
from unrollgrad.bilevel import _estimator, _field, _losses
from unrollgrad.bilevel._losses import PRODUCT_COST, Losses, Point
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Key, Numeric


class System(NamedTuple):
    """One linear system.

    Attributes:
        losses: The losses.
        point: Params and theta, at which H is taken, and the v before.
        a: The right-hand side, d outer / d params.
        tokens: The batches of inner, one per product; leading axis.
        key: For random numbers.
    """

    losses: Losses
    point: Point
    a: Any
    tokens: Any
    key: Key


class Solved(NamedTuple):
    """The solution, the state of v's optimizer, a Rayleigh quotient of H, the cost, the rate."""

    v: Any
    state: Any
    curvature: jax.Array
    gradients: Numeric
    rate: Numeric


class Solver(NamedTuple):
    """A stochastic solver.

    Attributes:
        label: Its name and settings.
        products: The batches of inner that it needs.
        init: ``init(theta, v) -> state``.
        solve: ``solve(system, state) -> Solved``.
    """

    label: str
    products: int
    init: Callable[[Any, Any], Any]
    solve: Callable[[System, Any], Solved]


def steps(optimizer: inner_optimizers.Optimizer, number: int) -> Solver:
    """``number`` steps of an optimizer along H v - a, from the v before."""
    number = arguments.positive_int("linear_steps", number)

    def solve(system, state):
        def step(carry, token):
            v, state = carry
            product = _product(system, v, token)
            direction = trees.add(product, system.a, -1)
            theta = system.point.theta
            new, state, updates = _estimator.moved(optimizer, theta, direction, state, v)
            rate = _estimator.rate(updates, _estimator.length(direction))
            return (new, state), (_field.rayleigh(v, product), rate)

        (v, state), seen = jax.lax.scan(step, (system.point.v, state), system.tokens)
        curvature, rate = (x[-1] for x in seen)
        return Solved(v, state, curvature, jnp.int32(number * PRODUCT_COST), rate)

    def init(theta, v):
        return _estimator.opened(optimizer, theta, v)

    return Solver(f"steps({number})", number, init, solve)


def neumann(terms: int, rate: float) -> Solver:
    """The series rate * sum_{j=0..terms} of products of (I - rate H_i), each H on a fresh batch."""
    terms = arguments.positive_int("terms", terms)
    arguments.number("linear_rate", rate)

    def solve(system, state):
        def step(carry, token):
            term, total = carry
            product = _product(system, term, token)
            seen = _field.rayleigh(term, product)
            term = trees.add(term, product, -rate)
            return (term, trees.add(total, term)), seen

        (_, total), seen = jax.lax.scan(step, (system.a, system.a), system.tokens)
        cost = jnp.int32(terms * PRODUCT_COST)
        return Solved(trees.scale(rate, total), state, seen[-1], cost, rate)

    return Solver(f"neumann(terms={terms})", terms, lambda theta, v: None, solve)


def random_neumann(terms: int, rate: float) -> Solver:
    """One term of the series in place of the sum: terms * rate * prod_{j<k} (I - rate H_j) a.

    k is uniform in 0..terms - 1, so that the mean is the series of so many terms.
    """
    terms = arguments.positive_int("terms", terms)
    arguments.number("linear_rate", rate)

    def solve(system, state):
        number = jax.random.randint(system.key, (), 0, terms, jnp.int32)

        def step(i, carry):
            term, _ = carry
            token = jax.tree.map(lambda x: x[i], system.tokens)
            product = _product(system, term, token)
            return trees.add(term, product, -rate), _field.rayleigh(term, product)

        names = mesh_axes.axes((number, *system[1:]))
        begin = mesh_axes.over(names, (system.a, jnp.float32(0)))
        term, seen = jax.lax.fori_loop(0, number, step, begin)
        cost = number * PRODUCT_COST
        return Solved(trees.scale(terms * rate, term), state, seen, cost, rate)

    return Solver(f"random_neumann(terms={terms})", terms, lambda theta, v: None, solve)


def _product(system: System, v: ArrayTree, token: Any) -> Any:
    return _losses.hessian_product(system.losses, system.point._replace(v=v), token)
