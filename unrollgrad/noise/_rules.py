"""What JAX's primitives do to a leaf with low-rank noise; see ``_arrays`` for the type."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad._core.optional_packages import need
from unrollgrad.noise._arrays import added_up, is_low_rank, materialised, of


def apply(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Applies a primitive to values of which some are leaves with low-rank noise."""
    rule = RULES.get(primitive.name)
    result = None if rule is None else rule(primitive, values, params)
    if result is not None:
        return result
    plain = [materialised(x, f"`{primitive}`") if is_low_rank(x) else x for x in values]
    return primitive.bind(*plain, **params)


def _each(change: Callable[[jax.Array, Any], jax.Array], leaf: Any) -> Any:
    """Changes each array; the rank's axis of the factors is carried along."""
    a, b = (
        jax.vmap(lambda x: change(x, leaf.w.shape), in_axes=-1, out_axes=-1)(x)
        for x in (leaf.a, leaf.b)
    )
    return of(leaf, change(leaf.w, leaf.w.shape), a, b, change(leaf.scale, leaf.w.shape))


def _moves(primitive, values, params):
    """Transposing, reversing, removing axes of length 1, copying: the same for all arrays."""
    return _each(lambda x, _: primitive.bind(x, **params), values[0])


def _barrier(primitive, values, params):
    """Holds all arrays of all leaves in one barrier."""
    arrays, structure = jax.tree.flatten(list(values))
    return structure.unflatten(primitive.bind(*arrays, **params))


def _summed(primitive, values, params):
    """A sum over rows or columns; over stacked layers the sum is not of low rank."""
    (leaf,) = values
    if any(leaf.scale.shape[i] != 1 for i in params["axes"]):
        return None
    return _moves(primitive, values, params)


def _convert(primitive, values, params):
    (leaf,) = values
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return None
    return of(leaf, primitive.bind(leaf.w, **params), leaf.a, leaf.b, leaf.scale)


def _negate(primitive, values, params):
    (leaf,) = values
    return of(leaf, -leaf.w, leaf.a, leaf.b, -leaf.scale)


def _scaled(primitive, values, params):
    """Multiplying with a number, or dividing by one."""
    leaf, other = values if is_low_rank(values[0]) else values[::-1]
    if is_low_rank(other) or jnp.size(other) != 1 or jnp.ndim(other) > leaf.w.ndim:
        return None
    if primitive.name == "div" and leaf is not values[0]:
        return None
    operands = (leaf.w, other) if leaf is values[0] else (other, leaf.w)
    factor = jnp.asarray(other).astype(leaf.scale.dtype).reshape(())
    scale = leaf.scale / factor if primitive.name == "div" else leaf.scale * factor
    return of(leaf, primitive.bind(*operands, **params), leaf.a, leaf.b, scale)


def _slice(primitive, values, params):
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(start)

    def change(x, full):
        own = [size == there for size, there in zip(x.shape, full, strict=True)]
        bounds = [
            (a, b, c) if o else (0, 1, 1)
            for o, a, b, c in zip(own, start, limit, strides, strict=True)
        ]
        return jax.lax.slice(x, *zip(*bounds, strict=True))

    return _each(change, values[0])


def _split(primitive, values, params):
    """Cuts the leaf into parts along an axis."""
    (leaf,), axis = values, params["axis"]

    def part(start, size):
        def change(x, full):
            if x.shape[axis] != full[axis]:
                return x
            return jax.lax.slice_in_dim(x, start, start + size, axis=axis)

        return _each(change, leaf)

    ends = list(itertools.accumulate(params["sizes"]))
    return [part(end - size, size) for end, size in zip(ends, params["sizes"], strict=True)]


def _dynamic_slice(primitive, values, params):
    leaf, *starts = values

    def change(x, full):
        own = [size == there for size, there in zip(x.shape, full, strict=True)]
        at = [s if o else jnp.zeros_like(s) for o, s in zip(own, starts, strict=True)]
        sizes = [s if o else 1 for o, s in zip(own, params["slice_sizes"], strict=True)]
        return jax.lax.dynamic_slice(x, at, sizes)

    return _each(change, leaf) if is_low_rank(leaf) else None


def _gather(primitive, values, params):
    """Rows of an embedding, or a layer of a stack."""
    leaf, indices = values
    numbers = params["dimension_numbers"]
    if not is_low_rank(leaf) or getattr(numbers, "operand_batching_dims", ()):
        return None

    def change(x, full):
        own = [size == there for size, there in zip(x.shape, full, strict=True)]
        mask = jnp.asarray([own[axis] for axis in numbers.start_index_map], indices.dtype)
        sizes = tuple(s if o else 1 for o, s in zip(own, params["slice_sizes"], strict=True))
        at = indices * mask.reshape((1,) * (indices.ndim - 1) + (-1,))
        new = {**params, "slice_sizes": sizes}
        if x is not leaf.w:
            new["fill_value"] = 0  # rows that are filled in are not perturbed
        return primitive.bind(x, at, **new)

    return _each(change, leaf)


def _reshape(primitive, values, params):
    """Groups of axes that are all rows, all columns or all of both may be merged or split."""
    leaf, *dynamic = values
    if dynamic or params.get("dimensions") is not None:
        return None
    groups = _groups(leaf.w.shape, params["new_sizes"])

    def sizes(x):
        new = []
        for old, wanted in groups:
            own = {x.shape[i] == leaf.w.shape[i] for i in old if leaf.w.shape[i] != 1}
            if len(own) > 1:
                return None
            new += wanted if own == {True} else [1] * len(wanted)
        return new

    new = [sizes(x) for x in (leaf.a, leaf.b, leaf.scale)]
    if None in new:
        return None
    a, b = (x.reshape(*s, x.shape[-1]) for x, s in zip((leaf.a, leaf.b), new[:2], strict=True))
    return of(leaf, leaf.w.reshape(params["new_sizes"]), a, b, leaf.scale.reshape(new[2]))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the smallest groups of neighbouring axes with equal products: (old axes, new sizes)."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        axes, sizes = [], []
        while True:
            left, right = math.prod(old[k] for k in axes), math.prod(sizes)
            if left == right and (axes or sizes):
                break
            if i < len(old) and (left <= right or j == len(new)):
                axes.append(i)
                i += 1
            else:
                sizes.append(new[j])
                j += 1
        groups.append((axes, sizes))
    return groups


def _broadcast(primitive, values, params):
    """New axes of length 1, such as ``w[None]``."""
    leaf, *dynamic = values
    kept = params["broadcast_dimensions"]
    fits = all(params["shape"][to] == size for to, size in zip(kept, leaf.w.shape, strict=True))
    if dynamic or not fits or math.prod(params["shape"]) != leaf.w.size:
        return None

    def change(x, _):
        return jax.lax.expand_dims(x, [i for i in range(len(params["shape"])) if i not in kept])

    return _each(change, leaf)


def _dot(primitive, values, params):
    """Adds two thin products to the one with w: x w + scale (x a) b'."""
    first = is_low_rank(values[0])
    leaf, x = values if first else values[::-1]
    if is_low_rank(x):  # a product of two such leaves: the smaller is added up
        leaf, x = sorted((leaf, x), key=lambda v: v.w.size)[::-1]
        first = leaf is values[0]
        x = materialised(x, "a product with another leaf of theta")
    operands = (leaf.w, x) if first else (x, leaf.w)
    dense = primitive.bind(*operands, **params)
    contracted, batch = params["dimension_numbers"]
    of_leaf, of_x = (0, 1) if first else (1, 0)
    axes = list(range(leaf.w.ndim))  # a name for each axis; those of x that meet one share it
    own = iter(range(leaf.w.ndim, leaf.w.ndim + x.ndim))
    met = dict(
        itertools.chain(
            zip(contracted[of_x], contracted[of_leaf], strict=True),
            zip(batch[of_x], batch[of_leaf], strict=True),
        )
    )
    names = [met[i] if i in met else next(own) for i in range(x.ndim)]
    used = {*contracted[of_leaf], *batch[of_leaf]}
    free = [[i for i in axes if i not in used], [i for i in names if i not in axes]]
    out = [*batch[of_leaf], *(free[0] + free[1] if first else free[1] + free[0])]
    thin = _thin(leaf, x, names, out, params.get("precision"))
    return (dense.astype(thin.dtype) + thin).astype(dense.dtype)


def _thin(leaf: Any, x: jax.Array, names: list[int], out: list[int], precision: Any) -> jax.Array:
    """Contracts x with one factor and then with the other."""
    rank = leaf.w.ndim + x.ndim
    # As in the dense product: x as w if it has no fractions, the factors at least as exact as w.
    with standard_promotion():
        common = jnp.promote_types(x.dtype, leaf.w.dtype)
    total = wide(common, leaf.scale.dtype)
    factors = [_named(leaf, leaf.a, rank), _named(leaf, leaf.b, rank)]
    # The first factor is the one with more of the axes that are summed over.
    summed = {i for i in names if i not in out}
    factors.sort(key=lambda f: -len(summed & set(f[1])))
    (first, of_first), (second, of_second) = factors
    kept = {*of_second, *out, rank}
    between = [i for i in dict.fromkeys([*names, *of_first]) if i in kept]
    t = jnp.einsum(
        *(x.astype(common), names, first.astype(common), of_first, between),
        precision=precision,
        preferred_element_type=total,
    )
    scale, of_scale = _named(leaf, leaf.scale[..., None], rank)
    scale = scale[..., 0].transpose([of_scale.index(i) for i in between if i in of_scale[:-1]])
    t = t * jnp.expand_dims(scale, [k for k, i in enumerate(between) if i not in of_scale[:-1]])
    return jnp.einsum(t, between, second.astype(total), of_second, out, precision=precision)


def _named(leaf: Any, factor: jax.Array, rank: int) -> tuple[jax.Array, list[int]]:
    """Drops the factor's axes that are shorter than w's, and names the others.

    Axes of w of length 1 count as rows, which ``a`` has.
    """
    least = 1 if factor is leaf.a else 2
    lengths = zip(factor.shape, leaf.w.shape, strict=False)
    kept = [i for i, (size, there) in enumerate(lengths) if size == there and size >= least]
    return factor.reshape([factor.shape[i] for i in kept] + [factor.shape[-1]]), [*kept, rank]


def _convolution(primitive, values, params):
    """Convolves with one factor, which leaves few channels, and mixes them with the other."""
    x, leaf = values
    spec = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if not is_low_rank(leaf) or is_low_rank(x) or params["batch_group_count"] != 1:
        return None
    out_axis = spec.rhs_spec[0]

    def is_mixing(factor):
        rest = [n for i, n in enumerate(factor.shape[:-1]) if i != out_axis]
        return all(n == 1 for n in rest)

    kernel, mixing = (leaf.a, leaf.b) if is_mixing(leaf.b) else (leaf.b, leaf.a)
    if not is_mixing(mixing) or kernel.shape[out_axis] != 1:
        return None
    rank, channels = kernel.shape[-1], leaf.w.shape[out_axis]
    thin = jnp.moveaxis(jnp.squeeze(kernel, out_axis), -1, out_axis).astype(x.dtype)
    thin = jnp.concatenate([thin] * groups, axis=out_axis)  # the outputs of every group
    t = primitive.bind(x, thin, **params)
    last = jnp.moveaxis(t, spec.out_spec[1], -1)
    last = last.reshape(*last.shape[:-1], groups, rank)
    mixing = (mixing * leaf.scale[..., None]).reshape(groups, channels // groups, rank)
    total = wide(last.dtype, mixing.dtype)
    mixed = jnp.einsum("...gr,gcr->...gc", last.astype(total), mixing.astype(total))
    mixed = jnp.moveaxis(mixed.reshape(*mixed.shape[:-2], channels), -1, spec.out_spec[1])
    dense = primitive.bind(x, leaf.w, **params)
    return (dense.astype(mixed.dtype) + mixed).astype(dense.dtype)


def _checkpoint(primitive, values, params):
    """The body sees the leaf itself."""
    body = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(params["jaxpr"], ()))
    through = need("quax", "quax", "lowrank").quaxify(body)
    kept = {key: params[key] for key in ("prevent_cse", "policy") if key in params}
    out = jax.checkpoint(lambda *args: through(*args), **kept)(*values)
    return [added_up(x) if is_low_rank(x) else x for x in out]


RULES: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "transpose": _moves,
    "squeeze": _moves,
    "copy": _moves,
    "copy_p": _moves,
    "name": _moves,
    "rev": _moves,
    "stop_gradient": _moves,
    "pvary": _moves,
    "pcast": _moves,
    "reduce_sum": _summed,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "optimization_barrier": _barrier,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "convert_element_type": _convert,
    "neg": _negate,
    "mul": _scaled,
    "div": _scaled,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "remat": _checkpoint,
}
"""By the primitive's name. A rule returns None if it does not apply; the leaf is materialised."""
