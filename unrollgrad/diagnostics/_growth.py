"""How small changes of a state grow under a map, and the means of it: Lyapunov exponents."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.types import ArrayDType, State

Map = Callable[[Any], Any]
"""One step of a dynamical system: ``step(state) -> state``, with equal shapes and dtypes."""

Push = Callable[[Map, State, jax.Array], tuple[State, jax.Array, jax.Array | float]]
"""``push(step, state, frame)``: the state, and the small changes in the frame, one step later, and
the size below which those are rounding."""

BLOCKS = 20
"""The number of blocks whose means give the standard errors."""


class Steps(NamedTuple):
    """The steps of a run: those that are measured, and those that are discarded before them."""

    measured: int
    discarded: int


def measure(
    push: Push, step: Map, state: State, num_exponents: int, steps: Steps
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the map with orthonormal small changes, one column of floats for each exponent.

    Returns:
        The exponents, the largest first, their standard errors, and the growth in every step.

    Raises:
        TypeError: If ``step`` changes the state's structure, shapes or dtypes.
        ValueError: If the state has fewer floats than there are exponents.
    """

    def moved(state):
        return arguments.strong_state(step(state), "step")

    differences = arguments.state_differences(state, jax.eval_shape(moved, state))
    if differences:
        raise TypeError(
            "`step` must return a state with the structure, shapes and dtypes that it was given; "
            f"it changed:\n{differences}\nCast or reshape in `step`, or begin with the final form."
        )
    floats = floats_of(state)
    dim = sum(vector([x]).size for x in floats)
    k = arguments.positive_int("num_exponents", num_exponents)
    if not 1 <= k <= dim:
        raise ValueError(
            f"`num_exponents` must be at most the number of floats in the state; got {k} for {dim} "
            f"in {jax.tree.map(arguments.describe, state)}."
        )
    start = jax.random.normal(jax.random.key(0), (dim, k), _dtype(floats))

    def body(carry, _):
        state, frame = carry
        state, image, least = push(moved, state, frame)
        frame, sizes = _orthonormal(image, frame)
        growth = jnp.log(jnp.maximum(sizes, least))
        return (state, frame), growth

    carry = state, _orthonormal(start, start)[0]
    _, growth = jax.lax.scan(body, carry, length=steps.discarded + steps.measured)
    return _exponents(growth[steps.discarded :])


def _exponents(growth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The means of the growth per step, sorted, with their errors from the means of blocks."""
    means = jnp.mean(growth, axis=0)
    blocks = min(BLOCKS, len(growth))
    rest = len(growth) % blocks
    of_blocks = jnp.mean(growth[rest:].reshape(blocks, -1, growth.shape[1]), axis=1)
    se = jnp.full_like(means, jnp.inf)
    if blocks > 1:
        spread = jnp.std(of_blocks, axis=0, ddof=1) / math.sqrt(blocks)
        se = jnp.where(jnp.isfinite(means), spread, jnp.inf)
    order = jnp.argsort(-means)
    return means[order], se[order], growth[:, order]


def _orthonormal(image: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The orthonormal columns that span the image, and the lengths |R_ii|.

    ``frame`` is kept where a single column vanishes.
    """
    if image.shape[1] > 1:
        frame, triangle = jnp.linalg.qr(image)
        return frame, jnp.abs(jnp.diagonal(triangle))
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(image)))  # its square may overflow
    scale = jnp.where(scale > 0, scale, 1)
    size = jnp.linalg.norm(image / scale) * scale
    gone = size == 0
    return jnp.where(gone, frame, image / jnp.where(gone, 1, size)), size[None]


def by_derivatives(step: Map, state: State, frame: jax.Array) -> tuple[State, jax.Array, float]:
    """Moves the state, and the small changes by the step's derivative."""
    floats, rebuild = split(state)

    def after(leaves):
        new = step(rebuild(leaves))
        return floats_of(new), new

    def one(column):
        tangents = from_vector(column, floats)
        _, image, new = jax.jvp(after, (floats,), (tangents,), has_aux=True)
        return new, vector(image)

    # The new state is the same for all columns; XLA keeps one.
    new, images = jax.vmap(one, in_axes=1, out_axes=(0, 1))(frame)
    return jax.tree.map(lambda x: x[0], new), images, 0.0


def by_differences(distance: float | None) -> Push:
    """The same by the differences of neighbours at this relative distance."""

    def push(step, state, frame):
        floats, rebuild = split(state)
        here, new = vector(floats), step(state)
        eps = max(float(jnp.finfo(x.dtype).eps) for x in floats)
        relative = distance or eps**0.57
        size = jnp.linalg.norm(here)
        length = relative * jnp.where(size > 0, size, 1)

        def one(column):
            neighbour = from_vector(here + length * column, floats)
            image = vector(floats_of(step(rebuild(neighbour)))) - vector(floats_of(new))
            return image / jnp.linalg.norm(vector(neighbour) - here)  # as far as it really was

        least = eps / 2 * jnp.linalg.norm(vector(floats_of(new))) / length
        return new, jax.vmap(one, in_axes=1, out_axes=1)(frame), least

    return push


def _dtype(floats: list[jax.Array]) -> ArrayDType:
    return wide(*[jnp.finfo(x.dtype).dtype for x in floats])  # of a complex leaf: its real part's


def vector(floats: list[jax.Array]) -> jax.Array:
    """All floats in one vector; a complex leaf is its real, then its imaginary part."""
    parts = [y for x in floats for y in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    return jnp.concatenate([y.ravel().astype(_dtype(floats)) for y in parts])


def from_vector(vector: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """The inverse of ``vector``: leaves with the shapes and dtypes of ``like``."""
    out, place = [], 0

    def take(x):
        nonlocal place
        place += x.size
        return vector[place - x.size : place].reshape(x.shape)

    for x in like:
        part = jax.lax.complex(take(x), take(x)) if jnp.iscomplexobj(x) else take(x)
        out.append(part.astype(x.dtype))
    return out
