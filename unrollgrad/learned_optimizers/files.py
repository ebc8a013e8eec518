"""A learned optimizer in one small file."""

import json
import zipfile
import zlib
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

ARCHITECTURES = {
    "scheduled_sgd": scheduled_sgd,
    "scheduled_adam": scheduled_adam,
    "mlp": mlp,
    "adafactor_mlp": adafactor_mlp,
    "rnn_mlp": rnn_mlp,
}
"""By the name that stands in a file."""

_ABOUT = "about"
_FORMAT = 1


class Saved(NamedTuple):
    """What is in a file.

    Attributes:
        architecture: Its name in ``ARCHITECTURES``.
        settings: Its arguments.
        theta: The weights.
        notes: What whoever saved it says of it.
    """

    architecture: str
    settings: dict[str, Any]
    theta: Theta
    notes: dict[str, Any]

    def build(self) -> Architecture:
        """The architecture, to train it further."""
        return ARCHITECTURES[self.architecture](**self.settings)


def save(
    path: str | Path,
    theta: Theta,
    *,
    architecture: str,
    settings: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Writes a learned optimizer to one file, an ``.npz`` of theta's leaves and a JSON text.

    Leaves of 16 bits are written as float32.

    Args:
        path: Of the file; it is replaced.
        theta: Of the architecture.
        architecture: Its name in ``ARCHITECTURES``.
        settings: The arguments it was made with.
        notes: Anything that JSON can hold, such as how it was trained.

    Raises:
        ValueError: If the architecture is unknown, or theta is not like its ``init``.

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
    _check_like(leaves, _shapes(architecture, settings), "theta")
    about = {
        "format": _FORMAT,
        "architecture": architecture,
        "settings": settings,
        "notes": notes or {},
    }
    arrays: dict[str, Any] = {f"theta{name}": _widened(x) for name, x in leaves.items()}
    arrays[_ABOUT] = np.array(json.dumps(about))
    part = Path(f"{path}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)


def load(path: str | Path) -> optax.GradientTransformation:
    """A learned optimizer from a file, as an ordinary optax optimizer.

    Needs no extra. Its ``update`` takes ``params``, as optax's optimizers with weight
    decay do; combine it with others by ``optax.chain``. Its steps have the size they were trained
    for: no learning rate is to be chosen.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file that ``save`` wrote, or of an architecture that this version
            does not have.
    """
    saved = read(path)
    return saved.build().transform(saved.theta)


def read(path: str | Path) -> Saved:
    """What is in a file that ``save`` wrote, to look at it or to train it further.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As in ``load``.
    """
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as content:
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
        _check_like(found, like, "theta")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    theta = jax.tree_util.tree_map_with_path(
        lambda place, x: jnp.asarray(found[jax.tree_util.keystr(place)]), like
    )
    return Saved(architecture, settings, theta, notes)


def _widened(x: Any) -> np.ndarray:
    x = jnp.asarray(x)
    return np.asarray(x, wide(x.dtype))


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(architecture: str, settings: dict[str, Any]) -> Theta:
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


def _check_like(found: dict[str, Any], like: Theta, what: str) -> None:
    wanted = {name: x.shape for name, x in _by_path(like).items()}
    got = {name: np.shape(x) for name, x in found.items()}
    for name in dict.fromkeys([*wanted, *got]):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"{what} does not fit the architecture and its settings: at {name or 'the root'} "
                f"it has {got.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}."
            )
