"""Files of learned optimizers: reading returns what was written, and faults are named."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import raises
from unrollgrad import learned_optimizers
from unrollgrad.learned_optimizers import ARCHITECTURES, load, read, save

SMALL = {"hidden": (4,), "decays": (0.5,)}


@functools.cache
def theta_of(name, *settings):
    return jax.jit(ARCHITECTURES[name](**dict(settings)).init)(jax.random.key(0))


def saved(path, name="mlp", **changes):
    settings = SMALL if "mlp" in name else {"knots": (0, 10)}
    theta = theta_of(name, *settings.items())
    arguments: dict[str, Any] = {"architecture": name, "settings": settings, "notes": {"seed": 3}}
    save(path, theta, **arguments | changes)
    return theta


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_goes_in_comes_out(name, tmp_path):
    theta = saved(tmp_path / "rule.npz", name)
    back = read(tmp_path / "rule.npz")
    assert jax.tree.structure(back.theta) == jax.tree.structure(theta)
    chex.assert_trees_all_equal(theta, back.theta)
    assert back.architecture == name
    assert back.notes == {"seed": 3}
    params = {"w": np.ones((2, 3), np.float32)}
    loaded, own = load(tmp_path / "rule.npz"), back.build().transform(theta)

    @jax.jit
    def both(params):
        return [x.update(params, x.init(params), params)[0] for x in (loaded, own)]

    chex.assert_trees_all_equal(*both(params))


def test_the_name_is_kept(tmp_path):
    """The file has the given name; NumPy would append .npz."""
    saved(tmp_path / "rule")
    assert [p.name for p in tmp_path.iterdir()] == ["rule"]
    load(str(tmp_path / "rule"))


def test_files_that_are_none(tmp_path):
    with raises(FileNotFoundError, "none.npz"):
        load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    saved(tmp_path / "cut.npz")
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "other.npz", "array.npy", "cut.npz"):
        with raises(ValueError, name, "is no file that unrollgrad.learned_optimizers.save wrote"):
            load(tmp_path / name)


def test_what_does_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "rule.npz"
    with raises(ValueError, "the architecture 'mpl' is unknown", "adafactor_mlp"):
        saved(path, architecture="mpl")
    with raises(ValueError, "mlp does not take the settings", "width"):
        saved(path, settings={"width": 4})
    with raises(
        ValueError, "theta does not fit", "['layers'][0]['bias']", "it has (4,), expected (8,)"
    ):
        saved(path, settings={"hidden": (8,), "decays": (0.5,)})
    assert not path.exists()
    saved(path)
    monkeypatch.delitem(ARCHITECTURES, "mlp")
    with raises(ValueError, "rule.npz", "the architecture 'mlp' is unknown"):
        load(path)


def test_weights_of_16_bits(tmp_path):
    rule = ARCHITECTURES["mlp"](**SMALL)
    theta = jax.eval_shape(rule.init, jax.random.key(0))
    theta = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, 0.3, jnp.bfloat16)), theta)
    save(tmp_path / "rule.npz", theta, architecture="mlp", settings=SMALL)
    for a, b in zip(
        jax.tree.leaves(theta), jax.tree.leaves(read(tmp_path / "rule.npz").theta), strict=True
    ):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_a_file_of_a_later_version(tmp_path, monkeypatch):
    monkeypatch.setattr(learned_optimizers.files, "_FORMAT", 2)
    saved(tmp_path / "rule.npz")
    monkeypatch.setattr(learned_optimizers.files, "_FORMAT", 1)
    with raises(ValueError, "rule.npz has format 2, of a newer unrollgrad; this one reads 1"):
        load(tmp_path / "rule.npz")
