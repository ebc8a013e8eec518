"""One file for the result of a run: arrays by their place in it, and what they are, as JSON."""

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments

T = TypeVar("T")
_ABOUT = "about"


def save(path: str | Path, tree: object, write: Callable[..., None] = np.savez_compressed) -> Path:
    """Writes the leaves of a tree, by path, into one ``.npz`` file, whole or not at all.

    ``write`` is numpy's function for it; ``np.savez`` takes less time and more space.
    """
    path, dtypes = Path(path), {}
    arrays: dict[str, Any] = {}
    for name, x in _by_path(tree).items():
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            dtypes[name], x = f"key<{jax.random.key_impl(x)}>", jax.random.key_data(x)
        else:
            dtypes[name] = str(jnp.result_type(x))
        x = np.asarray(x)
        arrays[name] = x if x.dtype.isbuiltin else x.view(f"u{x.dtype.itemsize}")  # bfloat16
    arrays[_ABOUT] = np.array(json.dumps(dtypes))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file, **arrays)
    return part.replace(path)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a file that ``save`` wrote: its leaves by path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``save`` did not write it.
    """
    try:
        with Path(path).open("rb") as file, np.load(file) as content:
            arrays = dict(content)
        dtypes = json.loads(str(arrays.pop(_ABOUT)))
        return {name: _typed(x, dtypes[name]) for name, x in arrays.items()}
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a result that `save` wrote: {error}.") from error


def like(tree: T, leaves: dict[str, Any], name: str) -> T:
    """A tree with the structure of ``tree`` and these leaves, found by ``name`` and path.

    Raises:
        ValueError: If a leaf is missing or has another shape or dtype.
    """
    places = [name + place for place in _by_path(tree)]
    found = jax.tree.unflatten(jax.tree.structure(tree), [leaves.get(place) for place in places])
    if lines := arguments.leaf_differences(tree, found, name):
        raise ValueError(
            "the file holds another result than `like`; expected -> found:\n" + "\n".join(lines)
        )
    return found


def _by_path(tree: object) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(place): x for place, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _typed(x: np.ndarray, dtype: str) -> Any:
    if dtype.startswith("key<"):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=dtype[4:-1])
    wanted = jnp.dtype(dtype)
    return x if x.dtype == wanted else x.view(wanted)
