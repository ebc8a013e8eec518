"""Images by name, split for training and validation: scikit-learn's digits, MNIST, FashionMNIST."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from unrollgrad.running import need

Name = Literal["digits", "mnist", "fashion_mnist"]

VALIDATION = {"digits": 597, "mnist": 10_000, "fashion_mnist": 10_000}
"""Number of images for validation, out of 1797 digits or the 60,000 training images of the
others."""

OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
"""Names at OpenML; the first 60,000 of its 70,000 images are the training images."""

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
MAGIC = {IMAGES: 2051, LABELS: 2049}
"""Magic numbers, the first four bytes: unsigned bytes in three dimensions, and in one."""


class Split(NamedTuple):
    """Some of the images.

    Attributes:
        images: float32 between -0.5 and 0.5; one row of pixels for each image.
        labels: int32, from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """Two disjoint parts, which are the same for every load."""

    train: Split
    validation: Split


def load(name: Name, data_dir: Path | None = None) -> Images:
    """Images of 10 classes.

    Args:
        name: ``"digits"`` comes with scikit-learn. The others are read from IDX files in
            ``data_dir`` if it has them, and from OpenML otherwise.
        data_dir: A folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, with or
            without ``.gz``; or the folder for downloads. Default: scikit-learn's folder.

    Raises:
        FileNotFoundError: If ``data_dir`` has only one of the two files.
        OSError: If the download fails.
        ValueError: If a file is damaged, or is not the file that its name says.
    """
    if name == "digits":
        pixels, labels = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
        return _split(np.asarray(pixels) / 16, np.asarray(labels), VALIDATION[name])
    found = {file: path for file in MAGIC if (path := _find(data_dir, file))}
    if len(found) == 1:
        missing = next(file for file in MAGIC if file not in found)
        raise FileNotFoundError(
            f"{data_dir} has {next(iter(found.values())).name}, but neither {missing} nor "
            f"{missing}.gz."
        )
    pixels, labels = _from_files(found) if found else _from_openml(name, data_dir)
    return _split(pixels / 255, labels, VALIDATION[name])


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads the unsigned bytes of an IDX file, which may be compressed (``.gz``).

    Args:
        path: The file.
        magic: The required first four bytes; the last of them is the number of dimensions.

    Raises:
        ValueError: If the magic number differs, or the number of bytes is not the one in the
            header.
    """
    content = _content(path)
    dims = magic % 256
    start = 4 * (1 + dims)
    if len(content) < start:
        raise ValueError(f"{path} is damaged: it ends after {len(content)} bytes, in its header.")
    first, *shape = (int(n) for n in np.frombuffer(content, ">u4", count=1 + dims))
    if first != magic:
        raise ValueError(f"{path} must begin with the magic number {magic}; got {first}.")
    if math.prod(shape) != len(content) - start:
        raise ValueError(
            f"{path} is damaged: its header says {' x '.join(map(str, shape))} bytes, but "
            f"{len(content) - start} follow."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}.") from error


def _find(folder: Path | None, file: str) -> Path | None:
    """The path of the file or of its compressed form, if one exists."""
    candidates = [folder / file, folder / f"{file}.gz"] if folder else []
    return next((path for path in candidates if path.is_file()), None)


def _from_files(found: dict[str, Path]) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = (read_idx(found[file], MAGIC[file]) for file in (IMAGES, LABELS))
    if len(pixels) != len(labels):
        raise ValueError(
            f"{found[IMAGES]} has {len(pixels)} images, but {found[LABELS]} {len(labels)} labels."
        )
    return pixels.reshape(len(pixels), -1), labels


def _from_openml(name: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        pixels, labels = need("sklearn.datasets", "scikit-learn").fetch_openml(
            OPENML[name],
            version=1,
            return_X_y=True,
            as_frame=False,
            parser="liac-arff",
            data_home=str(data_dir) if data_dir else None,
        )
    except OSError as error:
        where = f"in {data_dir}" if data_dir else "(no --data-dir was given)"
        raise OSError(
            f"{name} cannot be had: no {IMAGES}(.gz) and {LABELS}(.gz) {where}, and downloading it "
            f"from OpenML failed: {error}. Put the two files into a folder and give it as "
            "--data-dir, or run once with a network, or use --data digits, which needs neither."
        ) from error
    return np.asarray(pixels)[:60_000], np.asarray(labels)[:60_000]


def _split(pixels: np.ndarray, labels: np.ndarray, validation: int) -> Images:
    if len(pixels) <= validation:
        raise ValueError(
            f"{len(pixels)} images leave none for training: {validation} are for validation."
        )
    order = np.random.default_rng(0).permutation(len(pixels))
    images = np.asarray(pixels[order] - 0.5, np.float32)
    labels = np.asarray(labels[order], np.int32)
    train = len(images) - validation
    return Images(Split(images[:train], labels[:train]), Split(images[train:], labels[train:]))
