"""Weights that every group of a batch scales by its own rows: w + s r, which is never added up.

``w`` and ``r`` are one for all groups, and ``s`` has length 1 along every axis but the outputs'. So
a product with the weights is that with w plus s times that with r, and no group has weights of its
own: vmap over the groups batches s alone.

Along the first axis of three or more, which a scan over stacked layers cuts, ``s`` is repeated.

With ``linear`` the product with r sees no tangent of its other factor. At s = 0 that leaves the
value and the tangent exact, and saves the product of this tangent with s r, which is zero there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._core.optional_packages import need


@functools.cache
def scaled_type() -> Any:
    """Makes the type; quax, which it extends, is imported here."""
    quax = need("quax", "quax", "lowrank")
    import equinox

    class Scaled(quax.ArrayValue):
        w: jax.Array
        r: jax.Array
        s: jax.Array
        linear: bool = equinox.field(static=True)
        repeated: int = equinox.field(static=True, default=0)
        """If w has so many axes, s is constant along the first."""

        def aval(self):
            return jax.typeof(self.w)

        def materialise(self):
            return added_up(self)

        @staticmethod
        def default(primitive, values, params):
            return _apply(primitive, values, params)

    return Scaled


def scaled(w: jax.Array, r: jax.Array, s: jax.Array, linear: bool) -> Any:
    """The leaf; s has length 1 along every axis but the outputs'."""
    repeated = w.ndim if w.ndim > 2 and s.shape[0] == 1 else 0
    if repeated:
        s = jnp.broadcast_to(s, (w.shape[0], *s.shape[1:]))
    return scaled_type()(w, r, s, linear, repeated)


def _once(leaf: Any) -> Any:
    """The leaf, with s that is not repeated."""
    if leaf.w.ndim != leaf.repeated:
        return leaf
    return scaled_type()(leaf.w, leaf.r, leaf.s[:1], leaf.linear)


def added_up(leaf: Any) -> jax.Array:
    """Computes w + s r."""
    return _plus(leaf.w, leaf.s, leaf.r)


def is_scaled(x: object) -> bool:
    """Whether ``x`` is a leaf of such weights."""
    return bool(scaled_type.cache_info().currsize) and isinstance(x, scaled_type())


def _apply(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Applies a primitive to values of which some are such weights."""
    values = [_once(x) if is_scaled(x) else x for x in values]
    rule = _RULES.get(primitive.name)
    out = None if rule is None else rule(primitive, values, params)
    if out is not None:
        return out
    plain = [added_up(x) if is_scaled(x) else x for x in values]
    return primitive.bind(*plain, **params)


def _transpose(primitive, values, params):
    (leaf,) = values
    w, r, s = (primitive.bind(x, **params) for x in (leaf.w, leaf.r, leaf.s))
    return scaled(w, r, s, leaf.linear)


def _convert(primitive, values, params):
    (leaf,) = values
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return None
    w, r = (primitive.bind(x, **params) for x in (leaf.w, leaf.r))
    return scaled(w, r, leaf.s, leaf.linear)


def _plus(dense: jax.Array, s: jax.Array, moved: jax.Array) -> jax.Array:
    return dense + s.astype(dense.dtype) * moved


def _other(leaf: Any, x: jax.Array) -> jax.Array:
    """The factor of r."""
    return jax.lax.stop_gradient(x) if leaf.linear else x


def _dot(primitive, values, params):
    first = is_scaled(values[0])
    leaf, x = values if first else values[::-1]
    contracted, batch = params["dimension_numbers"]
    mine = 0 if first else 1
    if is_scaled(x) or any(leaf.s.shape[i] != 1 for i in contracted[mine]):
        return None
    used = [*batch[mine], *contracted[mine]]
    own = [i for i in range(leaf.w.ndim) if i not in used]
    others = x.ndim - len(batch[1 - mine]) - len(contracted[1 - mine])
    s = jnp.transpose(leaf.s, [*batch[mine], *own, *contracted[mine]])
    s = s.reshape(s.shape[: s.ndim - len(contracted[mine])])
    ones, begin = (1,) * others, len(batch[mine])
    shape = s.shape[:begin], s.shape[begin:]
    s = s.reshape(*shape[0], *((*shape[1], *ones) if first else (*ones, *shape[1])))

    def product(w, x):
        return primitive.bind(*((w, x) if first else (x, w)), **params)

    return _plus(product(leaf.w, x), s, product(leaf.r, _other(leaf, x)))


def _convolution(primitive, values, params):
    x, leaf = values
    spec = params["dimension_numbers"]
    if not is_scaled(leaf) or is_scaled(x) or params["batch_group_count"] != 1:
        return None
    out = spec.rhs_spec[0]
    if any(n != 1 for i, n in enumerate(leaf.s.shape) if i != out):
        return None
    shape = [1] * leaf.w.ndim
    shape[spec.out_spec[1]] = leaf.s.shape[out]
    dense = primitive.bind(x, leaf.w, **params)
    moved = primitive.bind(_other(leaf, x), leaf.r, **params)
    return _plus(dense, leaf.s.reshape(shape), moved)


def _gather(primitive, values, params):
    """Rows of an embedding: s is the same for all of them."""
    leaf, indices = values
    numbers = params["dimension_numbers"]
    looked_up = {*numbers.start_index_map, *numbers.collapsed_slice_dims}
    whole = all(
        size == n
        for i, (size, n) in enumerate(zip(params["slice_sizes"], leaf.w.shape, strict=True))
        if i not in looked_up
    )
    if not whole or any(leaf.s.shape[i] != 1 for i in looked_up) or is_scaled(indices):
        return None
    sizes = tuple(1 if i in looked_up else leaf.s.shape[i] for i in range(leaf.w.ndim))
    at = jnp.zeros_like(indices)
    s = primitive.bind(leaf.s, at, **{**params, "slice_sizes": sizes})
    dense = primitive.bind(leaf.w, indices, **params)
    moved = primitive.bind(leaf.r, indices, **{**params, "fill_value": 0})  # outside nothing moves
    return _plus(dense, s, moved)


_RULES: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
"""By the primitive's name. A rule returns None if it does not apply; the weights are added up."""
