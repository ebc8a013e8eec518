"""Laws whose perturbations are arrays like theta: Gaussian, signs, orthogonal directions."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unrollgrad._core import mesh_axes
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import wide
from unrollgrad.noise._laws import Noise
from unrollgrad.types import Key


@described
def gaussian() -> Noise:
    """Independent standard normal perturbations: the law that smooths J by a Gaussian.

    The first pairs' draws stay the same if pairs are added: in JAX's threefry (as it is by default,
    ``jax_threefry_partitionable``) a number depends on the key and on its place alone.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.gaussian(), {"w": jnp.zeros(3)}
        >>> law.sample(jax.random.key(0), law.init(theta), theta, 4)["w"].shape
        (4, 3)
    """
    return _independent(jax.random.normal)


@described
def rademacher() -> Noise:
    """Independent signs: each coordinate of a perturbation is +1 or -1.

    For quadratic losses the estimate is unbiased with variance (P - 1) |g|^2 / num_pairs; the
    Gaussian's has P + 1. For others it is O(sigma^2) from J's gradient, as with the Gaussian, but
    it is not the gradient of a smoothed J. ``full_es`` with this law is SPSA.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.rademacher(), {"w": jnp.zeros(3)}
        >>> unit = law.sample(jax.random.key(0), law.init(theta), theta, 4)["w"]
        >>> bool(jnp.all(jnp.abs(unit) == 1))
        True

    References:
        Spall, IEEE Transactions on Automatic Control, 1992.
    """
    return _independent(jax.random.rademacher)


@described
def orthogonal() -> Noise:
    """Directions that are orthogonal to one another among the pairs of a worker.

    Pairs come in blocks of P = dim(theta), the last may be smaller. Directions are uniformly random
    orthogonal vectors of length sqrt(P) in a block, and independent across blocks. For quadratic
    losses and num_pairs = M <= P the estimate is unbiased with variance (P/M - 1) |g|^2, so M = P
    gives the exact gradient. For others it is O(sigma^2) from J's gradient. Time and memory: a QR
    decomposition of (P, min(M, P)) per block, O(P M min(M, P)); it suits a theta of up to some
    thousands of numbers.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.orthogonal(), jnp.zeros(3)
        >>> unit = law.sample(jax.random.key(0), law.init(theta), theta, 3)
        >>> bool(jnp.allclose(unit @ unit.T, 3 * jnp.eye(3), atol=1e-5))
        True

    References:
        Choromanski et al., ICML 2018.
    """

    def sample(key, _, theta, num_pairs):
        leaves, structure = jax.tree.flatten(theta)
        dim = sum(x.size for x in leaves)
        rows = orthogonal_rows(key, num_pairs, dim, wide(*leaves))
        parts = zip(cut(rows, leaves), leaves, strict=True)
        return structure.unflatten(part.astype(wide(x.dtype)) for part, x in parts)

    return Noise(init=lambda theta: (), sample=sample)


def orthogonal_rows(key: Key, count: int, dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Draws vectors of length sqrt(dim), orthogonal in blocks of ``dim``; shape (count, dim)."""

    def block(index, count):
        normal = jax.random.normal(jax.random.fold_in(key, index), (dim, count), dtype)
        q, r = jnp.linalg.qr(normal)
        # With r's signs the directions are uniform, whatever signs the decomposition chose.
        signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
        return (q * signs[None]).T * jnp.sqrt(jnp.asarray(dim, dtype))

    rows: list[jax.Array] = []
    for i, first in enumerate(range(0, count, dim)):
        rows.append(block(after(i, rows[-1]) if rows else i, min(dim, count - first)))
    return jnp.concatenate(rows)


def after(index: int, rows: jax.Array) -> jax.Array:
    """The index, as a number that waits for the rows, whose numbers are finite.

    Of two batched calls of LAPACK that do not depend on each other, both may run at once on a CPU;
    each then waits for threads that the other holds, and with two cores both wait for ever (jaxlib
    0.10). XLA removes barriers and products with zero, but does not know that no number is inf.
    """
    return jnp.int32(index) + jnp.isinf(rows.ravel()[0]).astype(jnp.int32)


def _independent(draw: Callable[..., jax.Array]) -> Noise:
    """Makes a law with independent coordinates; ``draw(key, shape, dtype)`` has unit variance."""

    def sample(key, _, theta, num_pairs):
        leaves, structure = jax.tree.flatten(theta)
        groups = _drawn_together(leaves)
        keys = [key]
        if len(groups) > 1:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(groups)))

        def together(key, group):
            size, dtype = sum(x.size for x in group), wide(group[0].dtype)
            return cut(in_blocks(draw, key, (num_pairs, size), dtype), group)

        drawn = [together(k, g) for k, g in zip(keys, groups, strict=True)]
        return structure.unflatten(itertools.chain.from_iterable(drawn))

    return Noise(init=lambda theta: (), sample=sample)


def cut(flat: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    """Cuts the last axis into arrays with the shapes of the leaves."""
    ends = list(itertools.accumulate(x.size for x in leaves))[:-1]
    parts = zip(jnp.split(flat, ends, axis=-1), leaves, strict=True)
    return [part.reshape(*flat.shape[:-1], *x.shape) for part, x in parts]


def _drawn_together(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Groups neighbours of one dtype that fit a block: every draw is a program to compile."""
    groups: list[list[jax.Array]] = []
    size = 0
    for x in leaves:
        size += x.size
        if groups and size <= _BLOCK and wide(groups[-1][0].dtype) == wide(x.dtype):
            groups[-1].append(x)
        else:
            groups.append([x])
            size = x.size
    return groups


def in_blocks(
    draw: Callable, key: Key, shape: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Draws numbers of the shape (rows, columns), block of columns by block of columns.

    Random bits take twice the memory of the numbers, and drawing is faster inside the cache.
    """
    rows, columns = shape
    if columns <= _BLOCK:
        return draw(key, shape, dtype)
    count = -(-columns // _BLOCK)
    length = -(-columns // count)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

    def body(i, drawn):  # the last block overlaps the one before it, and the later draw counts
        block = draw(keys[i], (rows, length), dtype)
        return jax.lax.dynamic_update_slice(drawn, block, (0, i * length))

    zeros = mesh_axes.over(mesh_axes.axes(key), jnp.zeros(shape, dtype))
    return jax.lax.fori_loop(0, count, body, zeros)


_BLOCK = 2**15
