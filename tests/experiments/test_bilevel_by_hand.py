"""The algorithms by hand in plain JAX are the library's, step by step, and tasks are what they say.

Programs: about 12.
"""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.bilevel import tasks
from experiments.cost import bilevel_by_hand, bilevel_cost


@pytest.fixture(scope="module")
def task():
    with jax.enable_x64(True):
        return tasks.make("ijcnn1", 0, tasks.Sizes(256, 192))


@pytest.mark.parametrize("name", ["soba", "saba"])
def test_by_hand_and_by_the_library(name, task):
    """60 steps with batches in file order: both data sets end more than ten epochs."""
    with jax.enable_x64(True):
        problem, key = bilevel_cost.problem_of(task, shuffle=False), jax.random.key(0)
        hand = getattr(bilevel_by_hand, name)
        theirs = jax.jit(lambda key: hand(problem, key, 60))(key)
        ours = jax.jit(bilevel_cost.ours(name, problem, 60))(key)
        slower = problem._replace(outer_rate=0.5)
        other = jax.jit(lambda key: hand(slower, key, 60))(key)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    assert np.max(np.abs(np.asarray(other[2]) - np.asarray(theirs[2]))) > 1e-4


@pytest.mark.parametrize("name", ["ijcnn1", "quadratics"])
def test_the_exact_gradient_is_the_derivative_of_the_exact_value(name, task):
    with jax.enable_x64(True):
        here = task if name == "ijcnn1" else tasks.make(name, 0, tasks.Sizes(32, 32))
        direction = np.random.default_rng(0).standard_normal(here.theta.shape)
        ahead, behind, at = (here.measure(here.theta + s * direction) for s in (1e-4, -1e-4, 0.0))
    slope = (float(ahead["value"]) - float(behind["value"])) / 2e-4
    np.testing.assert_allclose(np.asarray(at["grad"]) @ direction, slope, rtol=1e-5, atol=1e-9)
    assert float(at["residual"]) < 1e-10


def test_the_recipes():
    """Shapes, the shares of the classes, and 45 % of the labels wrong in the cleaning task."""
    binary = tasks.make("ijcnn1", 0, tasks.Sizes(20_000, 10))
    classes = tasks.make("covtype", 0, tasks.Sizes(5000, 10, 10))
    cleaning = tasks.make("cleaning", 0, tasks.Sizes(1000, 300, 497))
    order = np.random.default_rng(0).permutation(1797)[:1000]
    wrong = cleaning.inner_data.y != load_digits(return_X_y=True)[1][order]
    assert binary.inner_data.x.shape == (20_000, 22)
    assert abs(np.mean(binary.inner_data.y) - 0.097) < 0.01
    assert classes.inner_data.x.shape == (5000, 54)
    assert set(np.unique(classes.inner_data.y)) == set(range(7))
    assert abs(np.mean(wrong) - 0.45) < 0.05
    assert cleaning.theta.shape == (1000,)


def test_libsvm_files(tmp_path):
    (tmp_path / "ijcnn1").write_text("-1 1:0.5 22:-2\n1 3:1\n")
    (tmp_path / "ijcnn1.t").write_text("1 2:4\n-1 1:1\n")
    task = tasks.make("ijcnn1", 0, tasks.Sizes(2, 2), tmp_path)
    np.testing.assert_array_equal(task.inner_data.y, [False, True])
    assert task.inner_data.x[0, 21] == -2
    assert task.outer_data.x[0, 1] == 4
    with pytest.raises(ValueError, match=r"ijcnn1.t has 2 rows; the task needs 3"):
        tasks.make("ijcnn1", 0, tasks.Sizes(2, 3), tmp_path)
    with pytest.raises(ValueError, match="`data` is for the tasks ijcnn1 and covtype"):
        tasks.make("cleaning", 0, tasks.Sizes(2, 2), tmp_path)
    (tmp_path / "ijcnn1").write_text("-1 23:0.5\n1 0:1\n")
    with pytest.raises(ValueError, match=r"row 1: the index 23 is not in 1..22"):
        tasks.make("ijcnn1", 0, tasks.Sizes(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match="neither covtype nor"):
        tasks.make("covtype", 0, tasks.Sizes(2, 2), tmp_path)
