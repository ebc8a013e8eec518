"""Images by name: the split, and whole and damaged files in MNIST's format."""

import gzip
import urllib.error

import numpy as np
import pytest
from sklearn import datasets

from experiments.problems import data


def idx(array, magic):
    header = np.array([magic, *array.shape], ">i4").tobytes()
    return header + np.asarray(array, np.uint8).tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10_003, 2, 3)), rng.integers(0, 10, 10_003)


def save(folder, arrays, suffix=""):
    for file, array in zip(data.MAGIC, arrays, strict=True):
        content = idx(array, data.MAGIC[file])
        (folder / (file + suffix)).write_bytes(gzip.compress(content, 1) if suffix else content)


def test_digits():
    """Every image is in one part, scaled; loading again gives the same split."""
    images = data.load("digits")
    assert images.train.images.shape == (1200, 64)
    assert images.validation.labels.shape == (597,)
    assert images.train.images.dtype == np.float32
    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = np.concatenate([part.images for part in images])
    np.testing.assert_array_equal(np.sort(everything.sum(axis=1)), np.sort(pixels.sum(1) / 16 - 32))
    assert sum(part.labels.sum() for part in images) == np.sum(labels)
    np.testing.assert_array_equal(data.load("digits").train.images, images.train.images)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files(tmp_path, arrays, suffix):
    save(tmp_path, arrays, suffix)
    images = data.load("fashion_mnist", tmp_path)
    assert images.train.images.shape == (3, 6)
    assert images.validation.images.shape == (10_000, 6)
    found = np.concatenate([part.images for part in images])
    rows = {
        tuple(row): label
        for row, label in zip(found, np.concatenate([p.labels for p in images]), strict=True)
    }
    for pixels, label in zip(arrays[0][:20], arrays[1], strict=False):
        assert rows[tuple((pixels.ravel() / 255 - 0.5).astype(np.float32))] == label


def test_what_is_wrong_with_a_file(tmp_path, arrays):
    save(tmp_path, arrays)
    images, labels = tmp_path / data.IMAGES, tmp_path / data.LABELS
    whole = images.read_bytes()
    for content, message in {
        whole[:-1]: "header says 10003 x 2 x 3 bytes, but 60017 follow",
        whole[:10]: "ends after 10 bytes",
        whole[:3]: "ends after 3 bytes",
        labels.read_bytes(): "must begin with the magic number 2051; got 2049",
    }.items():
        images.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load("mnist", tmp_path)
    images.write_bytes(idx(arrays[0][:-1], 2051))
    with pytest.raises(ValueError, match=r"10002 images, but .* 10003 labels"):
        data.load("mnist", tmp_path)
    images.unlink()
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor"):
        data.load("mnist", tmp_path)
    compressed = tmp_path / f"{data.IMAGES}.gz"
    compressed.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match="cannot be decompressed"):
        data.load("mnist", tmp_path)


def test_too_few_images(tmp_path, arrays):
    save(tmp_path, (arrays[0][:10], arrays[1][:10]))
    with pytest.raises(ValueError, match="10 images leave none for training"):
        data.load("mnist", tmp_path)


def test_openml(tmp_path, monkeypatch, arrays):
    """OpenML is asked if there are no files; without a network the error names the files."""
    asked = {}

    def fetch(name, **settings):
        asked.update(settings, name=name)
        return arrays[0].reshape(-1, 6).astype(float), arrays[1].astype(str)

    monkeypatch.setattr(datasets, "fetch_openml", fetch)
    images = data.load("mnist", tmp_path)
    assert asked["name"] == "mnist_784"
    assert asked["data_home"] == str(tmp_path)
    assert images.train.labels.dtype == np.int32

    def refuse(name, **settings):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets, "fetch_openml", refuse)
    with pytest.raises(OSError, match=r"train-labels-idx1-ubyte\(\.gz\) in .*no route to host.*"):
        data.load("fashion_mnist", tmp_path)
    with pytest.raises(OSError, match="no --data-dir was given"):
        data.load("fashion_mnist")
