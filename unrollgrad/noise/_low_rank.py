"""Low-rank noise: a matrix is perturbed by a product of thin factors, which is never added up."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import rounded, wide
from unrollgrad.noise._arrays import low_rank_type
from unrollgrad.noise._dense import after, in_blocks, orthogonal_rows
from unrollgrad.noise._laws import Noise, add, weighted_sum
from unrollgrad.types import ArrayTree, Key, Numeric, Sigma, Theta

Law = Literal["sign", "gaussian", "orthogonal"]
"""What the factors are made of."""


_Tree = TypeVar("_Tree")


class Factors(NamedTuple):
    """The factors of a leaf's noise, sum over r of a[..., r] b[..., r] / sqrt(rank), broadcast.

    Attributes:
        a: Leading axis ``num_pairs``, then the leaf's axes, its columns of length 1, then the rank.
        b: The same with rows of length 1.
    """

    a: jax.Array
    b: jax.Array


class _Shape(NamedTuple):
    """How a leaf's axes are divided: stacked layers, rows, columns."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@described
def low_rank(
    rank: int = 1,
    factors: Law = "sign",
    dense_below: int | None = None,
    stacked: int | ArrayTree | None = None,
) -> Noise:
    """Low-rank noise for matrices: evolution strategies at about the price of inference.

    A matrix leaf of m rows and n columns is perturbed by sigma A B^T / sqrt(rank), with factors A
    of shape (m, rank) and B of shape (n, rank), whose entries are independent with mean 0 and
    variance 1. The perturbation has the identity as covariance for every rank, so that estimates
    are unbiased for quadratic losses and O(sigma^2) from J's gradient otherwise, as with the other
    laws. No perturbed matrix is made: all pairs share one product with the matrix itself, beside
    which each has two thin products with its factors, and the gradient is one product of all A
    with all B. Vectors have dense noise, of signs unless the factors are Gaussian. ``pes`` and
    ``gpes`` draw the factors of earlier periods again and keep no noise of these leaves.

    Variance on a quadratic loss, one pair, P = dim(theta), a matrix with gradient G:
    (P - 1 + 2 (1 - 1/rank)) |G|^2 with signs, so that rank 1 is best and as good as dense signs;
    (P + 1) |G|^2 + (2/rank) (m + n + 1) |G|^2 with Gaussian factors, where dense Gaussian noise has
    (P + 1) |G|^2. "orthogonal" makes the perturbations of a worker's pairs orthogonal to each other
    in every matrix, with orthogonal vectors on the longer side and signs on the other: (P/M - 1)
    |g|^2 for M pairs, M rank <= max(m, n), if all of theta is such matrices.

    Your code stays as it is: with quax (``pip install "unrollgrad[lowrank]"``) matrix products,
    convolutions, row lookups (embeddings), scans over stacked layers, flax and equinox modules all
    take perturbed leaves. What would add one up warns, and names the leaf and its bytes.

    Time: 1 + (4 rank + 1) / (2 m) times the unperturbed products of a square matrix, in operations;
    the draws; in ``pes`` and ``gpes`` the draws of all earlier periods too, so that a long episode
    should have few periods (at most (m n) / (rank (m + n))). Memory: num_pairs (m + n) rank numbers
    in place of num_pairs m n.

    Args:
        rank: The number of columns of a factor.
        factors: "sign", "gaussian" or "orthogonal".
        dense_below: Matrices with fewer rows or columns have dense noise; 0: none has. By default
            2 rank + 3, below which thin factors save little and Gaussian ones cost variance.
        stacked: How many leading axes of a leaf count stacked layers, which have factors of their
            own: a number, or a pytree prefix of theta with numbers. By default 1 for a leaf with
            three axes, 0 otherwise. A leaf with fewer than two other axes has dense noise. Of more
            than two the first or the last is set against the rest, such that the factors are small:
            a convolution's channels out. Kernels with three axes that are not layers need 0: those
            of attention (512, 8, 64), split into heads, and of one-dimensional convolutions. A bias
            with two axes (8, 64), which is added and not multiplied, needs 1: dense noise.

    Returns:
        A law for ``noise=``. bfloat16 matrices are perturbed without rounding.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If the rank is not positive, a number is negative, the factors have another name
            or, in ``init`` or ``estimate``, ``stacked`` is not a prefix of theta.
        ImportError: In ``estimate``, if quax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.low_rank(), {"w": jnp.zeros((300, 200)), "b": jnp.zeros(200)}
        >>> drawn = law.sample(jax.random.key(0), law.init(theta), theta, 8)
        >>> drawn["w"].a.shape, drawn["w"].b.shape, drawn["b"].shape
        ((8, 300, 1, 1), (8, 1, 200, 1), (8, 200))
        >>> law.contract(drawn, jnp.ones(8))["w"].shape
        (300, 200)

    References:
        Sarkar et al., 2025, arXiv:2511.16652 (EGGROLL, without persistence, other scaling).
    """
    rank = arguments.positive_int("rank", rank)
    if factors not in ("sign", "gaussian", "orthogonal"):
        raise ValueError(f'`factors` must be "sign", "gaussian" or "orthogonal"; got {factors!r}.')
    least = 2 * rank + 3
    if dense_below is not None:
        least = _count("dense_below", dense_below, "With 0 no matrix has dense noise.")
    for path, count in jax.tree_util.tree_leaves_with_path(stacked):
        advice = "It counts leading axes of a leaf: 0 for a matrix or a convolution's kernel."
        _count(f"stacked{jax.tree_util.keystr(path)}", count, advice)

    def sample(key, _, theta, num_pairs):
        leaves, structure = jax.tree.flatten(theta)
        divided = [_divided(x.shape, n, least) for x, n in _stacked(theta, stacked)]
        own, longer = key, key
        if factors == "orthogonal":
            own, longer = jax.random.split(key)
        alike: dict[tuple, list[int]] = {}  # leaves of equal shape are drawn together
        for i, (x, d) in enumerate(zip(leaves, divided, strict=True)):
            alike.setdefault((x.shape, x.dtype, d), []).append(i)
        groups = [
            _Group(len(some), _sizes(shape, d, rank), dtype)
            for (shape, dtype, d), some in alike.items()
        ]
        drawn = (_normals if factors == "gaussian" else _signs)(own, num_pairs, groups)
        made: list[Any] = [None] * len(leaves)
        for some, parts in zip(alike.values(), drawn, strict=True):
            for place, i in enumerate(some):
                made[i] = _shaped(leaves[i], divided[i], [x[place] for x in parts], rank)
        if factors == "orthogonal":
            made = _orthogonalised(longer, made, [x.dtype for x in leaves])
        return structure.unflatten(made)

    return Noise(lambda theta: (), sample, _perturb, contract)


def _count(name: str, value: object, advice: str) -> int:
    """Returns a whole number of at least 0.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        got = arguments.describe(value)
        raise TypeError(f"`{name}` must be a whole number; got {got}. {advice}")
    if value < 0:
        raise ValueError(f"`{name}` must be at least 0; got {value}. {advice}")
    return int(value)


def _stacked(theta: Theta, stacked: int | ArrayTree | None) -> list[tuple[jax.Array, int]]:
    """Pairs each leaf with its number of stacked axes."""
    leaves = jax.tree.leaves(theta)
    if stacked is None:
        return [(x, int(x.ndim == 3)) for x in leaves]
    try:
        full = jax.tree.broadcast(stacked, theta)
    except ValueError as error:
        raise ValueError(
            "`stacked` must be a whole number or a pytree prefix of theta with whole numbers; got "
            f"structure {jax.tree.structure(stacked)} for theta of structure "
            f"{jax.tree.structure(theta)}. Make it of theta, with jax.tree.map."
        ) from error
    return list(zip(leaves, jax.tree.leaves(full), strict=True))


def _divided(shape: tuple[int, ...], stacked: int, least: int) -> _Shape | None:
    """Divides a leaf's axes such that the factors are smallest; None: its noise is dense."""
    layers, rest = shape[:stacked], shape[stacked:]
    if len(rest) < 2:
        return None
    cuts = (1, len(rest) - 1)
    cut = min(cuts, key=lambda k: math.prod(rest[:k]) + math.prod(rest[k:]))
    rows, columns = rest[:cut], rest[cut:]
    if min(math.prod(rows), math.prod(columns)) < least:
        return None
    return _Shape(layers, rows, columns)


class _Group(NamedTuple):
    """Leaves of one shape.

    Attributes:
        count: How many leaves.
        sizes: How many numbers a pair draws for each of them, part by part.
        dtype: Their dtype.
    """

    count: int
    sizes: tuple[int, ...]
    dtype: Any


def _sizes(shape: tuple[int, ...], divided: _Shape | None, rank: int) -> tuple[int, ...]:
    """How many numbers a pair draws for a leaf, part by part."""
    if divided is None:
        return (math.prod(shape),)
    layers = math.prod(divided.layers) * rank
    return layers * math.prod(divided.rows), layers * math.prod(divided.columns)


def _shaped(
    x: jax.Array, divided: _Shape | None, parts: Sequence[jax.Array], rank: int
) -> jax.Array | Factors:
    num_pairs = len(parts[0])
    if divided is None:
        return parts[0].reshape(num_pairs, *x.shape)
    layers, rows, columns = divided
    a = parts[0].reshape(num_pairs, *layers, *rows, *[1] * len(columns), rank)
    b = parts[1].reshape(num_pairs, *layers, *[1] * len(rows), *columns, rank)
    return Factors(a, b)


def _signs(key: Key, num_pairs: int, groups: list[_Group]) -> list[list[jax.Array]]:
    """Draws signs, 32 of them from each word of one draw; by group and part.

    Each array has the axes leaf, pair, number.
    """
    words = [[-(-n // 32) for n in group.sizes] for group in groups]
    lengths = [group.count * sum(own) for group, own in zip(groups, words, strict=True)]
    drawn = jax.random.bits(key, (num_pairs, sum(lengths)), jnp.uint32)

    def unpacked(word, size, dtype):
        bits = (word[..., None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, None]) & 1
        return 1 - 2 * bits.reshape(*word.shape[:2], -1)[..., :size].astype(dtype)

    def make(drawn):
        return [
            [
                unpacked(word, n, wide(group.dtype))
                for word, n in zip(_parts(some, group.count, own), group.sizes, strict=True)
            ]
            for group, own, some in zip(groups, words, _split(drawn, lengths), strict=True)
        ]

    return _held(make, drawn)


def _normals(key: Key, num_pairs: int, groups: list[_Group]) -> list[list[jax.Array]]:
    """Draws normal numbers, those of a dtype together; factors are rounded to the leaf's dtype.

    By group and part, as ``_signs``.
    """
    drawn: list[list[jax.Array]] = [[] for _ in groups]
    dtypes = list(dict.fromkeys(wide(group.dtype) for group in groups))
    for index, dtype in enumerate(dtypes):
        some = [i for i, group in enumerate(groups) if wide(group.dtype) == dtype]
        lengths = [groups[i].count * sum(groups[i].sizes) for i in some]
        own = jax.random.fold_in(key, index) if len(dtypes) > 1 else key
        numbers = in_blocks(jax.random.normal, own, (num_pairs, sum(lengths)), dtype)

        def make(numbers, some=some, lengths=lengths):
            flat = zip(some, _split(numbers, lengths), strict=True)
            return [_parts(x, groups[i].count, list(groups[i].sizes)) for i, x in flat]

        for i, parts in zip(some, _held(make, numbers), strict=True):
            coarse = len(parts) > 1 and groups[i].dtype != dtype
            drawn[i] = [rounded(x, groups[i].dtype) for x in parts] if coarse else parts
    return drawn


def _parts(x: jax.Array, count: int, lengths: list[int]) -> list[jax.Array]:
    """Cuts what each pair has for ``count`` leaves into the leaves' parts."""
    each = x.reshape(len(x), count, sum(lengths)).swapaxes(0, 1)
    return _split(each, lengths)


def _split(x: jax.Array, lengths: list[int]) -> list[jax.Array]:
    return jnp.split(x, list(itertools.accumulate(lengths))[:-1], axis=-1)


def _held(make: Callable[[jax.Array], _Tree], drawn: jax.Array) -> _Tree:
    """Computes ``make(drawn)`` in two halves of the pairs: drawn's first axis, the results' second.

    XLA fuses what it can into its uses, and would unpack a factor again for every row of every
    product that it is in. It does not fuse a loop.
    """
    num_pairs = len(drawn)
    if num_pairs == 1:
        return make(drawn)
    half = -(-num_pairs // 2)
    zeros: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, drawn))

    def body(i, held):  # with an odd number of pairs, the middle one is in both halves
        first = i * (num_pairs - half)
        part = make(jax.lax.dynamic_slice_in_dim(drawn, first, half))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 1), held, part
        )

    return jax.lax.fori_loop(0, 2, body, mesh_axes.over(mesh_axes.axes(drawn), zeros))


def _orthogonalised(
    key: Key, made: list[jax.Array | Factors], dtypes: list[Any]
) -> list[jax.Array | Factors]:
    """Replaces the signs of every matrix's longer side; equal shapes are drawn together.

    They are rounded to the leaves' dtypes, as products with a leaf of low precision round them.
    """
    made, drawn = list(made), None
    for index, (shape, some) in enumerate(_alike(made)):
        num_pairs, layers, *sides, rank = shape
        side, dim = int(sides[1] > sides[0]), max(sides)
        place = index if drawn is None else after(index, drawn)
        keys = jax.random.split(jax.random.fold_in(key, place), (len(some), layers))
        dtype = _factors(made[some[0]]).a.dtype
        draw = functools.partial(orthogonal_rows, count=num_pairs * rank, dim=dim, dtype=dtype)
        drawn = jax.vmap(jax.vmap(draw))(keys).reshape(len(some), layers, num_pairs, rank, dim)
        for i, x in zip(some, drawn.transpose(0, 2, 1, 4, 3), strict=True):
            parts = list(_factors(made[i]))
            exact = x.reshape(parts[side].shape)
            parts[side] = exact if dtypes[i] == dtype else rounded(exact, dtypes[i])
            made[i] = Factors(*parts)
    return made


def contract(factors: ArrayTree, weights: jax.Array) -> Theta:
    """Sums weight times perturbation over the pairs; equal shapes in one product."""
    leaves, structure = jax.tree.flatten(factors, is_leaf=lambda x: isinstance(x, Factors))
    out: list[Any] = list(leaves)
    arrays: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if not isinstance(x, Factors):
            arrays.setdefault((x.shape, x.dtype), []).append(i)
    for some in arrays.values():
        added: Any = weighted_sum(jnp.stack([leaves[i] for i in some], axis=1), weights)
        for i, x in zip(some, added, strict=True):
            out[i] = x
    for (num_pairs, layers, m, n, rank), some in _alike(leaves):
        own = [_factors(leaves[i]) for i in some]
        a = _together([x.a.reshape(num_pairs, layers, m, rank) for x in own])
        b = _together([x.b.reshape(num_pairs, layers, n, rank) for x in own])
        weighted = a * (weights.astype(a.dtype) / math.sqrt(rank)).reshape(-1, 1, 1, 1)
        numbers = (((0, 3), (0, 3)), ((1,), (1,)))
        precision = jax.lax.Precision.HIGHEST
        total = jax.lax.dot_general(weighted, b, numbers, precision=precision)
        for i, x in zip(some, jnp.split(total, len(some)), strict=True):
            out[i] = x.reshape(_leaf_shape(_factors(leaves[i])))
    return structure.unflatten(out)


def _together(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _alike(leaves: list[jax.Array | Factors]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Groups factors of one dtype by (num_pairs, layers, rows, columns, rank).

    A convolution's kernel and a matrix, whose axes differ, may be in one group.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Factors):
            groups.setdefault((_compact(x), x.a.dtype), []).append(i)
    return [(compact, some) for (compact, _), some in groups.items()]


def _factors(x: jax.Array | Factors) -> Factors:
    assert isinstance(x, Factors)
    return x


def _leaf_shape(factors: Factors) -> tuple[int, ...]:
    return np.broadcast_shapes(factors.a.shape[1:-1], factors.b.shape[1:-1])


def _compact(factors: Factors) -> tuple[int, int, int, int, int]:
    """Counts pairs, layers, rows, columns and the rank."""
    (num_pairs, *a, rank), b = factors.a.shape, factors.b.shape[1:-1]
    layers = math.prod(x for x, y in zip(a, b, strict=True) if x == y)
    return num_pairs, layers, math.prod(a) // layers, math.prod(b) // layers, rank


def _perturb(theta: Theta, factors: ArrayTree, scale: Sigma) -> Theta:
    """Perturbs theta with one pair's factors."""
    named, structure = jax.tree_util.tree_flatten_with_path(theta)
    own = structure.flatten_up_to(factors)
    scales = jax.tree.leaves(arguments.broadcast_sigma(scale, theta))

    def leaf(path, x, f, s):
        if not isinstance(f, Factors):
            return add(x, f, s)
        return low_rank_type()(x, f.a, f.b, _scale(path, f, s), path)

    paths = [jax.tree_util.keystr(path) for path, _ in named]
    leaves = zip(paths, [x for _, x in named], own, scales, strict=True)
    return structure.unflatten(leaf(*each) for each in leaves)


def _scale(path: str, factors: Factors, sigma: Numeric) -> jax.Array:
    """Returns sigma / sqrt(rank), one number per layer, with the axes of the leaf."""
    a, b = factors.a.shape[:-1], factors.b.shape[:-1]
    shape = tuple(x if x == y else 1 for x, y in zip(a, b, strict=True))
    given = jnp.asarray(sigma, factors.a.dtype)
    aligned = given.shape[::-1], shape[::-1]
    if not all(n in (1, m) for n, m in zip(*aligned, strict=False)):
        raise ValueError(
            f"sigma{path} has shape {given.shape}, but the noise of theta{path} is of low rank: it "
            "takes one sigma, or one for each stacked layer. Pass a number for this leaf, or raise "
            "`dense_below`."
        )
    return jnp.broadcast_to(given, shape) / math.sqrt(factors.a.shape[-1])
