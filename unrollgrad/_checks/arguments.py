"""Checks of arguments, before anything compiles.

Every message names the argument, its values, the leaf, and one way out.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from unrollgrad.types import ArrayTree, Key, Numeric, Sigma, State, Theta


def typed_key(key: Key) -> Key:
    """Returns ``key`` as a typed key of JAX's default implementation, threefry.

    A raw uint32 key is wrapped, and a key of another implementation becomes the threefry key that
    its bits determine: under ``vmap`` JAX draws for a batch of rbg keys from the first one alone,
    so that a worker's noise, which is drawn again in every call, would depend on its neighbours.

    Raises:
        TypeError: If ``key`` is neither.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise TypeError(
                f"`key` must be a single PRNG key; got an array of keys of shape {key.shape}. "
                "Split it and vmap, or pass one of them."
            )
        return _threefry(key)
    if getattr(key, "dtype", None) == np.uint32 and np.ndim(key) == 1:
        try:
            return _threefry(jax.random.wrap_key_data(jnp.asarray(key)))
        except TypeError as error:
            raise TypeError(
                f"`key` is raw key data, {describe(key)}, of another implementation than the "
                "default; wrap it yourself: jax.random.wrap_key_data(key, impl=...)."
            ) from error
    raise TypeError(f"`key` must be a PRNG key such as jax.random.key(0); got {describe(key)}.")


def _threefry(key: Key) -> Key:
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    words = jax.random.key_data(key).ravel()
    start = jax.random.key(0, impl="threefry2x32")
    return functools.reduce(jax.random.fold_in, (words[i] for i in range(words.size)), start)


def floating_theta(theta: Theta) -> Theta:
    """Returns theta with every leaf a strongly typed floating array.

    Raises:
        ValueError: If theta has no leaves, or an empty one.
        TypeError: If a leaf is not floating.
    """
    return floating(
        "theta",
        theta,
        "Move it out of theta (into the problem's closure or the inner state), or make it "
        "floating.",
        what="outer parameters",
    )


def floating(name: str, tree: object, advice: str, what: str = "they") -> ArrayTree:
    """Does the work of ``floating_theta`` for another tree, which the messages call ``name``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(
            f"`{name}` has no floating leaves; got {tree!r}. Pass the parameters to be tuned."
        )
    for path, leaf in leaves:
        if jnp.issubdtype(dtype_of(leaf), jnp.floating) and np.size(leaf) == 0:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is empty: {describe(leaf)}. Remove the leaf."
            )
    return floating_leaves(name, tree, advice, what)


def floating_leaves(name: str, tree: object, advice: str, what: str = "they") -> ArrayTree:
    """Returns the tree, which may be empty, with strongly typed floating arrays as leaves.

    Raises:
        TypeError: If a leaf is not floating.
    """

    def leaf(path, x):
        if not jnp.issubdtype(dtype_of(x), jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {describe(x)}; {what} must be "
                f"real floating-point arrays. {advice}"
            )
        return strong(x)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def strong_state(state: State | Numeric, made_by: str) -> State:
    """Returns the inner state with every leaf a strongly typed array.

    Raises:
        TypeError: If a leaf is not an array (a function in an equinox module, a string).
    """

    def leaf(path, x):
        try:
            return strong(x)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`{made_by}` put {describe(x)} at state{jax.tree_util.keystr(path)}; the inner "
                "state may hold arrays and PRNG keys only. Keep the rest in a closure (equinox: "
                "`eqx.partition(model, eqx.is_array)`; flax: keep the module outside, its params "
                "inside)."
            ) from error

    return jax.tree_util.tree_map_with_path(leaf, state)


def strong(x: ArrayLike) -> jax.Array:
    """Returns ``x`` as an array whose dtype is not weak."""
    if isinstance(x, jax.Array) and getattr(x, "weak_type", True) is False:
        return x
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype)


def dtype_of(x: object) -> Any:
    """Returns the dtype that ``x`` has, or would have as an array; object if it cannot be one."""
    if hasattr(x, "dtype"):
        return x.dtype
    return jnp.result_type(x) if isinstance(x, bool | int | float | complex) else np.dtype(object)


def describe(x: object) -> str:
    """Describes a leaf: ``float32[3,2]``, or value and type if it is not an array."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{x!r} ({type(x).__name__})"


def positive_int(name: str, value: object, note: str = "") -> int:
    """Returns ``value`` as an int; ``note`` is appended to the error message.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is below one.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"`{name}` must be a whole number; got {value!r} ({type(value).__name__}).{note}"
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {name}={value}.{note}")
    return int(value)


def number(name: str, value: Numeric) -> Numeric:
    """Returns ``value``; the value of a traced number is not known, and not checked.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if np.ndim(value) != 0 or not jnp.issubdtype(dtype_of(value), np.number):
        raise TypeError(f"`{name}` must be a number; got {describe(value)}.")
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be at least 0 and finite; got {value}.")
    return value


def num_devices(devices: object) -> int:
    """Returns the requested number of devices as an int, as ``positive_int`` does.

    Raises:
        ValueError: If jax sees fewer devices.
    """
    devices = positive_int("devices", devices)
    if devices > jax.device_count():
        raise ValueError(
            f"`devices` is {devices}, but jax sees {jax.device_count()}. For more CPU devices call "
            f'jax.config.update("jax_num_cpu_devices", {devices}) before anything is computed.'
        )
    return devices


def check_sigma(sigma: Sigma) -> None:
    """Raises ValueError or TypeError if a known value in ``sigma`` is not a positive number."""
    leaves = jax.tree_util.tree_leaves_with_path(sigma)
    if not leaves:
        raise ValueError(f"`sigma` has no leaves; got {sigma!r}. Pass a float such as 0.1.")
    for path, leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            continue
        where = f"sigma{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(dtype_of(leaf), np.number) or np.iscomplexobj(leaf):
            raise TypeError(f"`sigma` must be real numbers; got {where}={describe(leaf)}.")
        value = np.asarray(leaf, dtype=np.float64)
        if not (np.all(np.isfinite(value)) and np.all(value > 0)):
            raise ValueError(
                f"`sigma` must be positive and finite; got {where}={leaf}. It is the standard "
                "deviation of the perturbation in theta's units."
            )


def broadcast_sigma(sigma: Sigma, theta: Theta) -> Theta:
    """Returns ``sigma`` as a tree with theta's structure.

    Raises:
        ValueError: If ``sigma`` is not a pytree prefix of theta, or a leaf does not broadcast.
    """
    try:
        full = jax.tree.broadcast(sigma, theta)
    except ValueError as error:
        raise ValueError(
            "`sigma` must be a number or a pytree prefix of theta; got structure "
            f"{jax.tree.structure(sigma)} for theta of structure {jax.tree.structure(theta)}."
        ) from error

    def check(path, s, x):
        shape = np.shape(s)
        aligned = zip(shape[::-1], x.shape[::-1], strict=False)
        if len(shape) > x.ndim or not all(a in (1, b) for a, b in aligned):
            raise ValueError(
                f"sigma{jax.tree_util.keystr(path)} has shape {shape}, which does not "
                f"broadcast to theta's {describe(x)} there. Use a scalar or the leaf's shape."
            )

    jax.tree_util.tree_map_with_path(check, full, theta)
    return full


def check_data(data: object, size: int, axis: str, what: str = "inner step") -> None:
    """Raises ValueError if the leading axis of a leaf of ``data`` does not have length ``size``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != size:
            raise ValueError(
                f"data{jax.tree_util.keystr(path)} is {describe(leaf)}; its leading axis must be "
                f"{axis}={size}, one slice per {what}. Reshape or stack the batches."
            )


def check_worker_state(state: object, like: Any) -> None:
    """Raises TypeError if a worker's state and ``like`` differ in maker, structure or shapes."""
    held = getattr(getattr(state, "episode", None), "key", like.episode.key)
    if held.dtype != like.episode.key.dtype:
        raise TypeError(
            f"`key` is of dtype {like.episode.key.dtype} but the worker state holds {held.dtype}; "
            "use one PRNG implementation throughout."
        )
    theirs = getattr(state, "made_by", None)
    differences = state_differences(like._replace(made_by=theirs), state)
    if differences or theirs != like.made_by:
        origin = f"was made by {theirs}" if theirs else f"is a {type(state).__name__}"
        details = f" Expected -> got:\n{differences}\n" if differences else " "
        raise TypeError(
            f"`state` is not this estimator's for this theta: it {origin}; this is {like.made_by}."
            f"{details}Make it with `estimator.init(key, theta)` of the same estimator."
        )


def check_loss(made_by: str, loss: Any) -> None:
    """Raises ValueError if ``loss`` is not a real scalar."""
    if isinstance(loss, tuple | list | dict):
        raise ValueError(
            f"the loss of `{made_by}` must be a scalar; got a {type(loss).__name__}. Return the "
            "loss alone, without what comes beside it."
        )
    if np.shape(loss) != ():
        raise ValueError(
            f"the loss of `{made_by}` must be a scalar; got shape {np.shape(loss)}. Take its mean."
        )
    if not jnp.issubdtype(dtype_of(loss), np.number) and dtype_of(loss) != np.bool_:
        raise ValueError(f"the loss of `{made_by}` must be a number; got {describe(loss)}.")
    if jnp.issubdtype(dtype_of(loss), jnp.complexfloating):
        raise ValueError(f"the loss of `{made_by}` must be real; got {describe(loss)}.")


def shape_difference(expected: object, got: object) -> str | None:
    """Describes the first difference between the shapes of two trees, or returns None."""
    for path, a, b in _differences(expected, got, np.shape, "nothing"):
        return f"{path}: expected {a}, got {b}"
    return None


def leaf_differences(old: object, new: object, name: str = "state") -> list[str]:
    """Describes the leaves in which two trees differ, in one line each."""
    differences = _differences(old, new, describe, "absent")
    return [f"  {name}{path}: {a} -> {b}" for path, a, b in differences]


def _differences(
    old: object, new: object, show: Callable[[Any], object], absent: str
) -> list[tuple[str, object, object]]:
    """Lists (path, shown old leaf, shown new leaf) where the two differ."""

    def leaves(tree):
        named = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): show(x) for path, x in named}

    a, b = leaves(old), leaves(new)
    pairs = [(path, a.get(path, absent), b.get(path, absent)) for path in a | b]
    return [(path, x, y) for path, x, y in pairs if x != y]


def state_differences(old: object, new: object) -> str:
    """Describes the leaves in which two states differ, or else their structures; "" if equal."""
    lines = leaf_differences(old, new)
    if not lines and jax.tree.structure(old) != jax.tree.structure(new):
        lines = [f"  {jax.tree.structure(old)} -> {jax.tree.structure(new)}"]
    return "\n".join(lines)
