"""Starts next to which a small change decides where a trajectory ends, and their branches."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.diagnostics._growth import Map, from_vector, vector
from unrollgrad.diagnostics.lyapunov import lyapunov_of_map
from unrollgrad.types import State

__all__ = ["Bifurcation", "bifurcation"]

TURNS = 20
"""Power iterations for the direction; each multiplies the rest by a ratio of squared growths."""


class Bifurcation(NamedTuple):
    """A start next to which trajectories part.

    Attributes:
        state: The start with the largest exponent on the way of the climb.
        exponent: The first exponent there, per step, over ``num_steps``.
        before: The first exponent at the start that was given.
        direction: The change of the start, of length 1, that grows most over ``num_steps``, as a
            state: zeros for leaves that are not floats.
        branches: The starts on both sides, ``state`` plus and minus ``distance`` times
            ``direction``: leaves with a leading axis 2. Run the map from each.
    """

    state: State
    exponent: jax.Array
    before: jax.Array
    direction: State
    branches: State


def bifurcation(
    step: Map,
    state: Any,
    num_steps: int,
    *,
    num_updates: int = 100,
    learning_rate: float = 0.05,
    distance: float = 0.01,
) -> Bifurcation:
    """Finds a start next to which a small change decides where a trajectory ends.

    The first Lyapunov exponent over ``num_steps`` is largest on the ridge between two basins, where
    neighbours part. Adam climbs it as a function of the start, and the branches leave on both sides
    along the direction that grows most, the first right singular vector of the derivative of the
    ``num_steps`` steps. This holds for any map, also where no function is minimised: gradients of
    the players of a game, an optimizer with momentum.

    A climb finds a local maximum: a ridge nearby, or none. Give several starts by ``vmap``. The
    exponent is large, too, where the map diverges: begin where it does not.

    Time: about 6 num_updates · num_steps steps. Memory: num_steps states.

    Args:
        step: ``step(state) -> state``, twice differentiable. For gradient descent:
            ``lambda x: x - rate * jax.grad(loss)(x)``; for a problem's inner loop, ``episode_map``.
        state: The start of the climb, any pytree; ints, bools and keys stay as they are.
        num_steps: Steps over which the exponent is measured. So many that neighbours part, and not
            so many that both have long arrived: the exponent then fades.
        num_updates: Updates of the climb.
        learning_rate: Adam's learning rate, in the state's units.
        distance: Half the distance between the branches, in the state's units.

    Returns:
        A ``Bifurcation``.

    Raises:
        ValueError: If a number is out of range, or the state has no floating leaves.
        TypeError: If ``step`` changes the state's structure, or has no forward derivative.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> def step(x):                                 # gradient descent into one of two wells
        ...     return x - 0.1 * jax.grad(lambda x: (x**2 - 1) ** 2 / 4)(x)
        >>> found = ug.diagnostics.bifurcation(step, jnp.array(0.5), 20)
        >>> abs(float(found.exponent) - float(jnp.log(1.1))) < 1e-4      # log(1 + rate |V''(0)|)
        True
        >>> ends = jax.lax.fori_loop(0, 200, lambda i, x: jax.vmap(step)(x), found.branches)
        >>> sorted(round(float(x), 3) for x in ends)
        [-1.0, 1.0]

    References:
        Lorraine et al., Lyapunov exponents for diversity in differentiable games, 2022,
        arXiv:2112.14570. Parker-Holder et al., Ridge rider, 2020, arXiv:2011.06505.
    """
    state = arguments.strong_state(state, "state")
    num_steps = arguments.positive_int("num_steps", num_steps)
    num_updates = arguments.positive_int("num_updates", num_updates)
    for name, value in (("learning_rate", learning_rate), ("distance", distance)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"`{name}` must be a positive number; got {value!r}.")
    lyapunov_of_map(step, state, 1)  # its errors, before anything is compiled for long

    @eager.compiled
    def run(state):
        best, exponent, before = _climb(step, state, num_steps, num_updates, learning_rate)
        way = _direction(step, best, num_steps)
        floats, rebuild = split(best)
        here, signs = vector(floats), jnp.array([1.0, -1.0])
        sides = [rebuild(from_vector(here + s * distance * way, floats)) for s in signs]
        branches = jax.tree.map(lambda *x: jnp.stack(x), *sides)
        others = jax.tree.map(jnp.zeros_like, best)
        direction = split(others)[1](from_vector(way, floats))
        return Bifurcation(best, exponent, before, direction, branches)

    return run(state)


def _climb(
    step: Map, state: State, num_steps: int, num_updates: int, learning_rate: float
) -> tuple[State, jax.Array, jax.Array]:
    """The start with the largest exponent on the way, that exponent, and the one at the start."""
    floats, rebuild = split(state)
    optimizer = optax.adam(learning_rate)

    def exponent(here):
        start = rebuild(from_vector(here, floats))
        return lyapunov_of_map(step, start, num_steps).exponents[0]

    def update(carry, _):
        here, moments, best, most = carry
        value, slope = jax.value_and_grad(exponent)(here)
        better = value > most
        best = jnp.where(better, here, best)
        slope = jnp.where(jnp.isfinite(slope), slope, 0)  # a dead state has no way up
        change, moments = optimizer.update(-slope, moments)
        return (here + change, moments, best, jnp.maximum(most, value)), value

    here = vector(floats)
    begin = here, optimizer.init(here), here, jnp.full((), -jnp.inf, here.dtype)
    (_, _, best, most), values = jax.lax.scan(update, begin, length=num_updates + 1)
    return rebuild(from_vector(best, floats)), most, values[0]


def _direction(step: Map, state: State, num_steps: int) -> jax.Array:
    """The unit change of the start that grows most, by power iteration with M^T M."""
    floats, rebuild = split(state)

    def end(here):
        begin = rebuild(from_vector(here, floats))
        last, _ = jax.lax.scan(lambda s, _: (_like(step(s), s), None), begin, length=num_steps)
        return vector(floats_of(last))

    here = vector(floats)
    _, push = jax.linearize(end, here)
    pull = jax.linear_transpose(push, here)

    def turn(way, _):
        (new,) = pull(_unit(push(way), way))
        return _unit(new, way), None

    start = _unit(jax.random.normal(jax.random.key(0), here.shape, here.dtype), here)
    return jax.lax.scan(turn, start, length=TURNS)[0]


def _like(new: State, old: State) -> State:
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), new, old)


def _unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """The vector at length 1; ``otherwise`` where it vanishes."""
    scale = jnp.max(jnp.abs(x))
    safe = jnp.where(scale > 0, scale, 1)
    x = x / safe
    return jnp.where(scale > 0, x / jnp.where(scale > 0, jnp.linalg.norm(x), 1), otherwise)
