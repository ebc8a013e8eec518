"""Random configurations of estimators, each against the closed form of a linear-quadratic problem.

A configuration is a structure (which estimator, law, stagger, dtypes, ...), which compiles to one
program, and numbers (the problem's matrices, scales and sigma), which are the program's arguments:
so each structure is tried with several problems. The suite tries 200 configurations. By hand, for
as many as there is time for::

    python -m tests.random_configurations --num 10000 --first 200

Configuration n is a function of n alone, so that a failure is kept as its number.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from unrollgrad.estimators import REGISTRY

DIM, BLOCKS, CYCLES_PER_BLOCK = 2, 32, 8
PER_STRUCTURE = 5
"""Configurations that share a structure, and so a program."""
LAWS = {"gaussian": ug.noise.gaussian, "rademacher": ug.noise.rademacher}
LAWS["orthogonal"] = ug.noise.orthogonal
QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""XLA's options: a program that runs for milliseconds need not be optimised."""
THETA = np.array([0.5, -0.25, 1.0])
"""Numbers that bfloat16 holds exactly."""


class Numbers(NamedTuple):
    """The arguments of a structure's program: x' = decay x + matrix theta + noise + data."""

    seed: chex.Numeric
    decay: chex.Numeric
    matrix: chex.Numeric
    start: chex.Numeric
    target: chex.Numeric
    final: chex.Numeric
    noise: chex.Numeric
    data: chex.Numeric
    sigma: chex.Numeric


@dataclasses.dataclass(frozen=True)
class Structure:
    """One way to use one estimator; every field is drawn independently of the others."""

    estimator: str
    truncation: int
    num_windows: int
    horizon: str
    evaluate: bool
    data: bool
    noisy: bool
    start: bool
    state: tuple[str, ...]
    dtypes: tuple[str, str]
    sigma: str
    law: str
    num_pairs: int
    noise_periods: int | None
    num_workers: int
    stagger: str
    batch_size: int | None
    keys: str

    @property
    def episode(self) -> int:
        return self.truncation * self.num_windows

    @property
    def whole(self) -> bool:
        """Whether every call of the estimator runs a whole episode."""
        return not REGISTRY[self.estimator].takes("truncation")

    @property
    def refused(self) -> bool:
        """Whether the library says that this cannot be done."""
        sampled = self.horizon == "sampled"
        return (
            (sampled and (self.whole or self.evaluate))
            or (self.stagger != "lockstep" and (self.whole or self.num_workers == 0))
            or (self.stagger == "burn_in" and self.data)
        ) and not (self.num_workers == 0 and not (sampled and (self.whole or self.evaluate)))


def numbers(number: int, structure: Structure) -> Numbers:
    """The numbers of configuration ``number``."""
    rng = np.random.default_rng([1, number])
    return Numbers(
        seed=np.int32(number),
        decay=np.float32(rng.uniform(-0.9, 0.9)),
        matrix=rng.normal(size=(DIM, 3)).astype(np.float32) / 2,
        start=rng.normal(size=(DIM, 3)).astype(np.float32) / 2 * structure.start,
        target=rng.normal(size=DIM).astype(np.float32),
        final=rng.normal(size=DIM).astype(np.float32),
        noise=np.float32(rng.uniform(0, 0.5) * structure.noisy),
        data=np.float32(rng.uniform(0, 0.5)),
        sigma=np.float32(rng.uniform(0.1, 0.5)),
    )


def structure(number: int) -> Structure:
    """Structure ``number``: one draw from the product of all settings."""
    rng = np.random.default_rng([0, number])

    def one(*choices):
        return choices[rng.integers(len(choices))]

    num_workers = one(0, 4, 6)
    return Structure(
        estimator=one(*REGISTRY),
        truncation=one(1, 2, 3),
        num_windows=one(1, 2, 3),
        horizon=one("static", "static", "sampled"),
        evaluate=one(False, False, True),
        data=one(False, True),
        noisy=one(False, True),
        start=one(False, True),
        state=tuple(x for x in ("int", "bool", "key", "empty") if rng.random() < 0.4),
        dtypes=(one("float32", "bfloat16"), one("float32", "bfloat16")),
        sigma=one("float", "prefix", "traced"),
        law=one(*LAWS),
        num_pairs=one(1, 2, 3),
        noise_periods=one(None, 1, 2),
        num_workers=num_workers,
        stagger=one("lockstep", "lockstep", "breakstep", "burn_in"),
        batch_size=one(None, 2) if num_workers else None,
        keys=one("threefry2x32", "raw", "rbg", "unsafe_rbg"),
    )


def flat(theta: dict[str, jax.Array]) -> jax.Array:
    """Theta's three numbers as one vector, in float32."""
    return jnp.concatenate([theta["a"].astype(jnp.float32), theta["b"].astype(jnp.float32)[None]])


def problem(config: Structure, given: Numbers) -> ug.UnrolledProblem:
    """The linear-quadratic problem with the structure's extra leaves in its state."""
    extras = {
        "int": lambda key: jnp.int32(3),
        "bool": lambda key: jnp.bool_(True),
        "key": lambda key: jax.random.split(key)[0],
        "empty": lambda key: jnp.zeros((0, 3)),
    }

    def init(key, theta):
        x = given.start @ flat(theta) if config.start else jnp.zeros(DIM)
        return {"x": x, **{name: extras[name](key) for name in config.state}}

    def step(key, theta, state, t, *data):
        x = given.decay * state["x"] + given.matrix @ flat(theta)
        if config.noisy:
            x = x + given.noise * jax.random.normal(key, (DIM,))
        for batch in data:
            x = x + batch
        moved = {"x": x}
        if "int" in state:
            moved["int"] = state["int"] + 1
        if "bool" in state:
            moved["bool"] = ~state["bool"]
        if "key" in state:
            moved["key"] = jax.random.fold_in(state["key"], t)
        return state | moved, jnp.sum((x - given.target) ** 2) / 2

    def evaluate(key, theta, state):
        return jnp.sum((state["x"] - given.final) ** 2) / 2

    def horizon(key):
        return jnp.where(jax.random.bernoulli(key), config.episode, config.truncation)

    return ug.UnrolledProblem(
        init,
        step,
        config.episode if config.horizon == "static" else horizon,
        evaluate if config.evaluate else None,
    )


def closed_form(config: Structure, given: Numbers) -> np.ndarray:
    """The expectation of ``grad``, averaged over windows, in float64."""
    decay, matrix, start, target, final = (
        np.asarray(x, np.float64)
        for x in (given.decay, given.matrix, given.start, given.target, given.final)
    )
    cut = REGISTRY[config.estimator].unbiased_for == "biased"
    mean, sensitivity = start @ THETA, start
    steps, evaluated = [], np.zeros(3)
    for t in range(config.episode):
        if cut and t and t % config.truncation == 0:
            sensitivity = np.zeros((DIM, 3))
        mean = decay * mean + matrix @ THETA
        sensitivity = decay * sensitivity + matrix
        steps.append(sensitivity.T @ (mean - target))
        if (t + 1) % config.truncation == 0:
            at_end = sensitivity.T @ (mean - final)
            # A window that cuts the gradient at its start sees the whole evaluation at its end.
            evaluated = evaluated + at_end if cut else at_end
    if config.horizon == "sampled":
        both = np.sum(steps, axis=0) + np.sum(steps[: config.truncation], axis=0)
        return both / (config.episode + config.truncation)
    return np.mean(steps, axis=0) + (evaluated if config.evaluate else 0)


def estimator(config: Structure, given: Numbers, sigma: Any) -> ug.GradientEstimator:
    """The estimator, alone or averaged, as the configuration says."""
    row = REGISTRY[config.estimator]
    if config.noise_periods is None:
        noise_period = None
    else:
        noise_period = config.noise_periods * config.truncation
    one = row.build(
        problem(config, given),
        truncation=config.truncation,
        sigma=sigma,
        num_pairs=max(config.num_pairs, row.least_pairs),
        noise_period=noise_period,
        noise=LAWS[config.law](),
    )
    if not config.num_workers:
        return one
    return ug.average(one, config.num_workers, stagger=config.stagger, batch_size=config.batch_size)


def gradients(config: Structure) -> Callable[[Numbers], jax.Array]:
    """``run(numbers)``: the gradients of all calls, ``(calls, 3)``; one program."""
    windows = 1 if config.whole else config.num_windows
    num_calls = BLOCKS * CYCLES_PER_BLOCK * windows
    length = config.episode if config.whole else config.truncation
    shape = (length, DIM) if not config.num_workers else (config.num_workers, length, DIM)
    theta = {
        "a": jnp.asarray(THETA[:2], config.dtypes[0]),
        "b": jnp.asarray(THETA[2], config.dtypes[1]),
    }

    def run(given):
        impl = "threefry2x32" if config.keys == "raw" else config.keys
        key = jax.random.key(given.seed, impl=impl)
        if config.keys == "raw":
            key = jax.random.key_data(key)
        sigma = {"float": 0.3, "prefix": {"a": 0.3, "b": 0.2}, "traced": given.sigma}
        many = estimator(config, given, sigma[config.sigma])

        def call(state, number):
            drawn = jax.random.fold_in(key, number)
            data = None
            if config.data:
                data = given.data * jax.random.normal(jax.random.fold_in(drawn, 1), shape)
            out, state = many.estimate(drawn, theta, state, data=data)
            return state, flat(out.grad)

        skipped = 10 * windows
        _, grads = jax.lax.scan(call, many.init(key, theta), jnp.arange(skipped + num_calls))
        return grads[skipped:]

    return run


def failures(first: int) -> list[str]:
    """What is wrong with the ``PER_STRUCTURE`` configurations from ``first`` on.

    A mean over calls has to be within 6.5 standard errors of the closed form, estimated from 32
    blocks of calls, and 0.4 % of its size (3 % where a leaf is bfloat16). What the library refuses
    it has to refuse while tracing, with a message that names an argument.
    """
    config = structure(first // PER_STRUCTURE)
    members = range(first, first + PER_STRUCTURE)
    given = [numbers(number, config) for number in members]
    try:
        lowered = jax.jit(gradients(config)).lower(given[0])
    except (TypeError, ValueError) as error:
        if not config.refused:
            return [f"{first}: refused: {error}\n  {config}"]
        clear = "`" in str(error) or "=" in str(error)
        return [] if clear else [f"{first}: an unclear message: {error}\n  {config}"]
    if config.refused:
        return [f"{first}: not refused\n  {config}"]
    compiled = lowered.compile(compiler_options=QUICK)
    found = [difference(config, one, np.asarray(compiled(one), np.float64)) for one in given]
    return [
        f"{number}: {text}\n  {config}\n  {one}"
        for number, one, text in zip(members, given, found, strict=True)
        if text
    ]


def difference(config: Structure, given: Numbers, grads: np.ndarray) -> str:
    """How the mean of the gradients differs from the closed form; empty if it does not."""
    blocks = grads.reshape(BLOCKS, -1, 3).mean(1)
    expected = closed_form(config, given)
    off = np.abs(blocks.mean(0) - expected)
    error = blocks.std(0, ddof=1) / np.sqrt(BLOCKS)
    rounding = 0.03 if "bfloat16" in config.dtypes else 0.004
    allowed = 6.5 * error + rounding * (np.abs(expected) + 0.1 * np.abs(expected).max())
    if np.all(off <= allowed):
        return ""
    return f"mean {blocks.mean(0)}, expected {expected}, standard errors {error}"


def main() -> None:
    """Tries configurations one after the other and prints those that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000, help="how many configurations to try")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them")
    options = parser.parse_args()
    began, found = time.time(), []
    for first in range(options.first, options.first + options.num, PER_STRUCTURE):
        for text in failures(first):
            found.append(text)
            print(text, flush=True)
        if first % 100 == 0:
            jax.clear_caches()
    print(f"{options.num} tried, {len(found)} failed, {time.time() - began:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
