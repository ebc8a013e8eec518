"""Saves a learned optimizer to one small file, and loads it."""

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._core.dtypes import wide
from unrollgrad.learned_optimizers.architecture import Architecture
from unrollgrad.learned_optimizers.mlps import adafactor_mlp, mlp, rnn_mlp
from unrollgrad.learned_optimizers.schedules import scheduled_adam, scheduled_sgd
from unrollgrad.types import Theta

__all__ = ["ARCHITECTURES", "TRAINED", "Saved", "load", "read", "save"]

ARCHITECTURES: dict[str, Callable[..., Architecture]] = {
    "scheduled_sgd": scheduled_sgd,
    "scheduled_adam": scheduled_adam,
    "mlp": mlp,
    "adafactor_mlp": adafactor_mlp,
    "rnn_mlp": rnn_mlp,
}
"""Architectures by the name that files contain."""

TRAINED = {path.stem: path for path in sorted((Path(__file__).parent / "trained").glob("*.npz"))}
"""The files of the trained optimizers that come with the package, by name."""

_ABOUT = "about"
_FORMAT = 1
_Json = dict[str, Any]


class Saved(NamedTuple):
    """The content of a file.

    Attributes:
        architecture: Its name in ``ARCHITECTURES``.
        settings: Its arguments.
        theta: The weights.
        notes: The notes passed to ``save``.
    """

    architecture: str
    settings: _Json
    theta: Any
    notes: _Json

    def build(self) -> Architecture:
        """Returns the architecture, to train it further."""
        return ARCHITECTURES[self.architecture](**self.settings)


def save(
    path: str | Path,
    theta: Theta,
    *,
    architecture: str,
    settings: _Json | None = None,
    notes: _Json | None = None,
) -> None:
    """Writes a learned optimizer to one file, an ``.npz`` of theta's leaves and a JSON text.

    Leaves of 16 bits are written as float32.

    Args:
        path: Path of the file; an existing file is replaced.
        theta: Weights of the architecture.
        architecture: Its name in ``ARCHITECTURES``.
        settings: The arguments with which the architecture was made.
        notes: Anything that JSON can represent, such as how theta was trained.

    Raises:
        ValueError: If the architecture is unknown, or theta's shapes differ from its ``init``.

    Example:
        >>> import jax, jax.numpy as jnp, tempfile, unrollgrad as ug
        >>> rule = ug.learned_optimizers.scheduled_adam(rate=0.01)
        >>> theta = rule.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ug.learned_optimizers.save(f"{folder}/a.npz", theta, architecture="scheduled_adam")
        ...     optimizer = ug.learned_optimizers.load(f"{folder}/a.npz")
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> [round(float(u), 4) for u in updates]
        [-0.01, -0.01]
    """
    settings = settings or {}
    leaves = _by_path(theta)
    _check_like(leaves, _shapes(architecture, settings))
    about = {
        "format": _FORMAT,
        "architecture": architecture,
        "settings": settings,
        "notes": notes or {},
    }
    arrays: dict[str, Any] = {_ABOUT: np.array(json.dumps(about))}
    for name, x in leaves.items():
        arrays[f"theta{name}"] = np.asarray(x, wide(jnp.result_type(x)))
    part = Path(f"{path}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)


def load(path: str | Path) -> optax.GradientTransformation:
    """Loads a learned optimizer, as an ordinary optax optimizer.

    Two come with the package: ``scheduled_adam``, a schedule of Adam that was trained on small
    MLPs, conv nets and LSTMs, and ``scheduled_adam_mlps``, trained on MLPs alone. Loading needs no
    optional package. ``update`` needs ``params``, as for optax's optimizers with weight decay;
    combine it with others by ``optax.chain``. Its steps have the trained size: do not choose a
    learning rate.

    Args:
        path: A name in ``TRAINED``, or the path of a file that ``save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``save`` did not write the file, or this version does not have its
            architecture.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> optimizer = ug.learned_optimizers.load("scheduled_adam")
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> all(-0.1 < u < 0 for u in updates.tolist())
        True
    """
    saved = read(path)
    return saved.build().transform(saved.theta)


def read(path: str | Path) -> Saved:
    """Reads a file that ``save`` wrote, to inspect the optimizer or to train it further.

    Args:
        path: A name in ``TRAINED``, or the path of a file that ``save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As in ``load``.
    """
    path = TRAINED[path] if isinstance(path, str) and path in TRAINED else Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}; the optimizers that come with the package are "
            f"{', '.join(TRAINED)}."
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as content:
            arrays = {name: np.load(content.open(name)) for name in content.namelist()}
        about = json.loads(str(arrays.pop(f"{_ABOUT}.npy")))
        architecture, settings, notes = (about[k] for k in ("architecture", "settings", "notes"))
        form = int(about["format"])
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no file that unrollgrad.learned_optimizers.save wrote: {error}."
        ) from error
    if form > _FORMAT:
        raise ValueError(
            f"{path} has format {form}, of a newer unrollgrad; this one reads {_FORMAT}."
        )
    found = {name.removeprefix("theta").removesuffix(".npy"): x for name, x in arrays.items()}
    try:
        like = _shapes(architecture, settings)
        _check_like(found, like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    theta = jax.tree_util.tree_map_with_path(
        lambda place, x: jnp.asarray(found[jax.tree_util.keystr(place)]), like
    )
    return Saved(architecture, settings, theta, notes)


def _by_path(tree: Theta) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(architecture: str, settings: _Json) -> Theta:
    """Theta of an architecture, with a ``jax.ShapeDtypeStruct`` for every leaf."""
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"the architecture {architecture!r} is unknown; this version has "
            f"{', '.join(ARCHITECTURES)}."
        )
    try:
        made = ARCHITECTURES[architecture](**settings)
    except TypeError as error:
        raise ValueError(
            f"{architecture} does not take the settings {settings}: {error}."
        ) from None
    return jax.eval_shape(made.init, jax.random.key(0))


def _check_like(theta: dict[str, Any], like: Theta) -> None:
    """Raises if the leaves of theta, by path, do not have the shapes of ``like``."""
    wanted = {name: x.shape for name, x in _by_path(like).items()}
    got = {name: np.shape(x) for name, x in theta.items()}
    for name in dict.fromkeys([*wanted, *got]):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"theta does not fit the architecture and its settings: at {name or 'the root'} "
                f"it has {got.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}."
            )
