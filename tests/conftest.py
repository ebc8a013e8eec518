"""Shared by all tests: how samples are drawn and judged."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.estimators import REGISTRY


def pytest_configure(config):
    """Eight CPU devices; and compiled programs are kept: many tests compile the same one."""
    if jax.__version_info__ < (
        0,
        11,
    ):  # a program of pes: 1.0 CPU seconds, 2.8 with them
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else collectives may deadlock
    cache = str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # of the processes that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiled fast where little is computed, and forgotten at a module's end.

    Most of a test's time is XLA's, which takes much less of it without optimizations. Modules that
    are marked slow compute much, and are optimized. Every compiled program takes memory maps; Linux
    ends a process that asks for 65,530.
    """
    _optimize(request.node.get_closest_marker("slow") is not None)
    yield
    _optimize(True)
    jax.clear_caches()


def _optimize(how):
    """Sets it here and for the processes that tests start, whose numbers are to be the same."""
    jax.config.update("jax_disable_most_optimizations", not how)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not how))


@pytest.fixture
def optimized(programs):
    """Compiles as a user does."""
    before = not jax.config.read("jax_disable_most_optimizations")
    _optimize(True)
    yield
    _optimize(before)


def raises(error, *parts):
    """A context that expects ``error`` with all the parts in its message."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(p) for p in parts))


EACH_STATE = [
    "full_es",
    "truncated_es",
    "gpes",
    "es_single",
    "tbptt",
    "dodge",
    "uoro",
    "pes_analytic",
]
"""One estimator for each kind of worker state; the others share the code of one of them."""


def of_the_registry(names=REGISTRY):
    """Parameters: the names, of which the quick suite takes ``EACH_STATE``."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in EACH_STATE)) for n in names]


class Samples:
    """Independent vector samples, their mean and its standard error."""

    def __init__(self, x):
        self.x = np.asarray(x, np.float64).reshape(len(x), -1)
        self.mean = self.x.mean(axis=0)
        self.se = self.x.std(axis=0, ddof=1) / np.sqrt(len(self.x))

    def error_in_se(self, truth):
        """The largest |mean - truth| in standard errors, over the coordinates."""
        difference = np.abs(self.mean - np.ravel(truth))
        return float(np.max(difference / np.maximum(self.se, 1e-300)))

    def relative_error(self, truth):
        return float(np.linalg.norm(self.mean - np.ravel(truth)) / np.linalg.norm(truth))

    def relative_se(self, truth):
        return float(np.linalg.norm(self.se) / np.linalg.norm(truth))

    def variance(self):
        """The trace of the covariance of one sample and the standard error of that."""
        squares = np.sum((self.x - self.mean) ** 2, axis=1) * len(self.x) / (len(self.x) - 1)
        return squares.mean(), squares.std(ddof=1) / np.sqrt(len(squares))

    def mean_square(self):
        """E|x|^2 and its standard error."""
        squares = np.sum(self.x**2, axis=1)
        return squares.mean(), squares.std(ddof=1) / np.sqrt(len(squares))


def window_gradients(estimator, key, theta, num_windows, num_episodes):
    """The gradients of ``num_episodes`` fresh workers, shape (episodes, windows, P)."""

    def episode(key):
        def call(state, i):
            estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
            return state, jnp.concatenate([g.ravel() for g in jax.tree.leaves(estimate.grad)])

        return jax.lax.scan(call, estimator.init(key, theta), jnp.arange(num_windows))[1]

    draw = jax.jit(lambda keys: jax.lax.map(episode, keys, batch_size=4000))
    return np.asarray(draw(jax.random.split(key, num_episodes)))


def settings(truncation=5, sigma=0.1, noise_period=10, num_pairs=2):
    return {
        "truncation": truncation,
        "sigma": sigma,
        "noise_period": noise_period,
        "num_pairs": num_pairs,
    }


def build(name, problem, **changes):
    """The estimator; the same one for the same arguments, so that it compiles once."""
    changes = {"num_pairs": max(2, REGISTRY[name].least_pairs), **changes}
    given = tuple(settings(**changes).items())
    plain = all(isinstance(value, int | float | None) for _, value in given)
    if plain and isinstance(problem, ug.UnrolledProblem):
        return _build(name, problem, given)
    return REGISTRY[name].build(problem, **dict(given))


@functools.cache
def _build(name, problem, given):
    return REGISTRY[name].build(problem, **dict(given))


def call_steps(estimator, problem):
    """The inner steps of one call, the leading axis of streamed data."""
    return estimator.truncation or problem.horizon


@functools.cache
def quadratic(horizon=20):
    """A small nonlinear problem with data, used where any problem will do."""

    def init(key, theta):
        return {"x": jax.random.normal(key, (3,)) + theta["start"], "n": jnp.int32(0)}

    def step(key, theta, state, t):
        target = jax.random.normal(key, (3,))
        x = state["x"] - jnp.exp(theta["log_rate"]) * (state["x"] - target)
        return {"x": x, "n": state["n"] + 1}, jnp.mean((x - 1) ** 2)

    theta = {"log_rate": jnp.log(jnp.float32(0.1)), "start": jnp.zeros(3)}
    return ug.UnrolledProblem(init, step, horizon), theta
