"""Helpers for all tests: small problems, estimators of the registry, comparison of trees."""

import functools
import re
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.estimators import REGISTRY

KINDS = (
    "full_es",
    "truncated_es",
    "gpes",
    "es_single",
    "tbptt",
    "dodge",
    "uoro",
    "pes_analytic",
)
"""One estimator for each kind of worker state; every other estimator shares one's code."""

T = TypeVar("T")


def present(x: T | None) -> T:
    """``x``, which is not None."""
    assert x is not None
    return x


def mistyped(x: object) -> Any:
    """``x``, which is deliberately not of the type that is asked for."""
    return x


def over_workers(estimate: ug.Estimate) -> ug.AverageInfo:
    """The info of an estimate by ``average``."""
    assert isinstance(estimate.info, ug.AverageInfo)
    return estimate.info


def raises(
    error: type[Exception] | tuple[type[Exception], ...], *parts: str
) -> AbstractContextManager[Any]:
    """A context that expects ``error`` with all the parts, in this order, in its message."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(p) for p in parts))


def alike(names: Iterable[str], kinds: Iterable[str]) -> list:
    """Parameters: the names; those outside ``kinds`` are marked ``same_kind``."""
    return [pytest.param(n, marks=[] if n in kinds else pytest.mark.same_kind) for n in names]


def rows(names: Iterable[str] = REGISTRY) -> list:
    """Parameters: the estimators; those outside ``KINDS`` are marked ``same_kind``."""
    return alike(names, KINDS)


def settings(
    truncation: int = 5, sigma: Any = 0.1, noise_period: int | None = 10, num_pairs: int = 2
) -> dict[str, Any]:
    """Arguments for all factories; a registry row picks its own."""
    return {
        "truncation": truncation,
        "sigma": sigma,
        "noise_period": noise_period,
        "num_pairs": num_pairs,
    }


def build(name: str, problem: ug.UnrolledProblem, **changes: Any) -> ug.GradientEstimator:
    """The estimator; equal arguments give the same object, so that it compiles once."""
    changes = {"num_pairs": max(2, REGISTRY[name].least_pairs), **changes}
    given = tuple(settings(**changes).items())
    plain = all(isinstance(value, int | float | None) for _, value in given)
    if plain and isinstance(problem, ug.UnrolledProblem):
        return _build(name, problem, given)
    return REGISTRY[name].build(problem, **dict(given))


@functools.lru_cache(maxsize=200)
def _build(name, problem, given):
    return REGISTRY[name].build(problem, **dict(given))


def call_steps(estimator: ug.GradientEstimator, problem: ug.UnrolledProblem) -> int:
    """The inner steps of one call: the length of streamed data's leading axis."""
    if estimator.truncation is not None:
        return estimator.truncation
    assert isinstance(problem.horizon, int)
    return problem.horizon


@functools.cache
def quadratic(horizon: int = 20) -> tuple[ug.UnrolledProblem, dict[str, jax.Array]]:
    """A small nonlinear problem with data, for tests in which any problem will do."""

    def init(key, theta):
        return {"x": jax.random.normal(key, (3,)) + theta["start"], "n": jnp.int32(0)}

    def step(key, theta, state, t):
        target = jax.random.normal(key, (3,))
        x = state["x"] - jnp.exp(theta["log_rate"]) * (state["x"] - target)
        return {"x": x, "n": state["n"] + 1}, jnp.mean((x - 1) ** 2)

    theta = {"log_rate": jnp.log(jnp.float32(0.1)), "start": jnp.zeros(3)}
    return ug.UnrolledProblem(init, step, horizon), theta


def numbers(tree: Any) -> Any:
    """The tree with numpy leaves: keys become their data, bfloat16 becomes float32."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(x))
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(leaf, tree)


def types(tree: Any) -> list:
    """Shape, dtype, sharding and weak type of every leaf."""
    return [(jax.typeof(x), getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]


@contextmanager
def counted() -> Generator[list[int], None, None]:
    """A list with one number: how many programs XLA compiled since the context began."""
    count = [0]

    def listener(event: str, duration_secs: float, **kwargs: str | int):
        count[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


COMPILED = "/jax/core/compile/backend_compile_duration"
