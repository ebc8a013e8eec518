"""``hypergradient_cost``: the time of a hypergradient over the products that it consists of."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Time of implicit hypergradients for an MLP whose weights share rates of weight decay.

    The floor has as many bare Hessian products (jax.jvp of jax.grad), one mixed product and one
    gradient of the outer loss. The kinds run in turn, medians are reported, and info is unused.
    """

    width: int = 512
    """Number of inputs, and of units in each of the two hidden layers."""
    batch_size: int = 256
    """Rows of the training data, and of the validation data."""
    terms: tuple[int, ...] = (10, 20, 40)
    """Products with the Hessian per hypergradient."""
    hyperparameters: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)
    """Numbers of decay rates; if they exceed the number of weights, the rest is unused."""
    num_repeats: int = 9
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke", width=4, batch_size=4, terms=(3,), hyperparameters=(2, 100), num_repeats=1
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", width=2048, batch_size=1024),
}


Params = list[jax.Array]

Hypergradient = Callable[[Params, jax.Array], jax.Array]
"""A function of (params, theta), with a result of theta's shape."""


class Problem(NamedTuple):
    """An inner and an outer loss, and the point at which they are evaluated."""

    inner: Callable[[Params, jax.Array], jax.Array]
    outer: Callable[[Params, jax.Array], jax.Array]
    params: Params
    theta: jax.Array


def problem(key: jax.Array, width: int, batch: int, hyperparameters: int) -> Problem:
    """An MLP with three weight matrices; the decay rates repeat over the weights."""
    keys = jax.random.split(key, 5)
    x, x_val = (jax.random.normal(k, (batch, width)) for k in keys[:2])
    params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[2:]]

    def fit(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ params[-1] - 1) ** 2)

    def inner(params, theta):
        flat = jnp.concatenate([w.ravel() for w in params])
        rates = jnp.exp(jnp.resize(theta, flat.shape))
        return fit(params, x) + jnp.sum(rates * flat**2)

    return Problem(
        inner, lambda params, theta: fit(params, x_val), params, jnp.zeros(hyperparameters)
    )


def floor(problem: Problem, terms: int) -> Hypergradient:
    """The bare products; each multiplies the previous result."""

    def run(params, theta):
        _, (a, direct) = jax.value_and_grad(problem.outer, argnums=(0, 1))(params, theta)

        def turn(v, _):
            gradient = jax.grad(problem.inner)
            return jax.jvp(lambda p: gradient(p, theta), (params,), (v,))[1], None

        v, _ = jax.lax.scan(turn, a, length=terms)
        of_theta = jax.grad(problem.inner, 1)
        mixed = jax.jvp(lambda p: of_theta(p, theta), (params,), (v,))[1]
        return jax.tree.map(jnp.subtract, direct, mixed)

    return run


def kinds(problem: Problem, terms: int) -> dict[str, Hypergradient]:
    """The floor, our solvers and, if installed, jaxopt's CG; CG's first residual is a product."""

    def ours(solver):
        f = ug.implicit.hypergradient(problem.outer, problem.inner, solver=solver)
        return lambda params, theta: f(params, theta).grad

    found = {
        "floor": floor(problem, terms),
        "neumann": ours(ug.implicit.neumann(terms + 1, 1e-3)),
        "CG": ours(
            need("lineax", "lineax").CG(
                rtol=0.0, atol=0.0, max_steps=terms - 1, stabilise_every=None
            )
        ),
    }
    if importlib.util.find_spec("jaxopt"):
        found["jaxopt CG"] = _jaxopt(problem, terms)
    return found


def _jaxopt(problem: Problem, terms: int) -> Hypergradient:
    jaxopt: Any = importlib.import_module("jaxopt")

    def solve(matvec, b):
        return jaxopt.linear_solve.solve_cg(matvec, b, tol=0.0, maxiter=terms - 1)

    def run(params, theta):
        _, (a, direct) = jax.value_and_grad(problem.outer, argnums=(0, 1))(params, theta)
        (through,) = jaxopt.implicit_diff.root_vjp(
            jax.grad(problem.inner), params, (theta,), a, solve=solve
        )
        return jax.tree.map(jnp.add, direct, through)

    return run


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes seconds of every kind, by number of products and of hyperparameters."""
    sweeps = {
        "products": [(k, settings.hyperparameters[0], k) for k in settings.terms],
        "hyperparameters": [(p, p, settings.terms[0]) for p in settings.hyperparameters],
    }
    for i, (axis, cells) in enumerate(sweeps.items()):
        programs: dict[tuple[int, str], Callable[[], object]] = {}
        for number, hyperparameters, terms in cells:
            here = problem(
                jax.random.key(seed), settings.width, settings.batch_size, hyperparameters
            )
            for kind, f in kinds(here, terms).items():
                arguments = here.params, here.theta
                programs[number, kind] = functools.partial(jax.jit(f), *arguments)
        times: dict[tuple[int, str], list[float]] = {name: [] for name in programs}

        def at(fraction: float, axis: str = axis, i: int = i) -> None:
            progress(axis, (i + fraction) / len(sweeps))

        for _, seconds in timing.in_turn(programs, settings.num_repeats, at):
            for name, value in seconds.items():
                times[name].append(value)
        for (number, kind), values in times.items():
            ratio = float(np.median(np.divide(values, times[number, "floor"])))
            numbers = {"seconds": float(np.median(values)), "over_floor": ratio}
            write({"axis": axis, "number": str(number), "kind": kind, **numbers})


def _lines(records: list[Record], axis: str, metric: str) -> dict[str, dict[int, float]]:
    """The mean over seeds, by kind and number."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.labels["axis"] == axis and r.metric == metric:
            line = found.setdefault(r.labels["kind"], {})
            line.setdefault(int(r.labels["number"]), []).append(r.value)
    return {
        kind: {number: float(np.mean(values)) for number, values in sorted(line.items())}
        for kind, line in found.items()
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Seconds by number of products and by number of hyperparameters."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, name in ((left, "products"), (right, "hyperparameters")):
        for kind, line in _lines(records, name, "seconds").items():
            axis.plot(list(line), list(line.values()), "o-", label=kind)
        axis.set(xlabel=name, ylabel="seconds")
        curves.from_zero(axis)
        axis.grid(alpha=0.3)
    right.set_xscale("log")
    left.legend()
    figure.suptitle(f"MLP, 3 x {config['width']} x {config['width']} weights")
    return figure


def show(records: list[Record]) -> None:
    """Prints the ratios, and how flat the cost is in the number of hyperparameters."""
    seconds = _lines(records, "products", "seconds")
    for kind, line in _lines(records, "products", "over_floor").items():
        for terms, ratio in line.items():
            print(f"{kind:>10}, {terms:3} products: {seconds[kind][terms]:.3f} s, {ratio:.2f}")
    for kind, line in _lines(records, "hyperparameters", "seconds").items():
        values = ", ".join(f"{number}: {value:.3f} s" for number, value in line.items())
        print(f"{kind:>10}, hyperparameters {values}")


def _of(summary: Summary, metric: str, axis: str, kind: str) -> dict[int, float]:
    """The means of one kind in the summary, by number."""
    return {
        int(x["number"]): x["mean"]
        for x in summary.results
        if (x["metric"], x["axis"], x["kind"]) == (metric, axis, kind)
    }


def claims(summary: Summary) -> list[Claim]:
    """The cost is that of the products, and independent of the number of hyperparameters."""
    found = []
    for kind in ("neumann", "CG"):
        ratios = _of(summary, "over_floor", "products", kind)
        times = _of(summary, "seconds", "hyperparameters", kind)
        seconds = list(times.values())
        spread = float(np.max(seconds) / np.min(seconds)) - 1  # NaN if one is
        large = [value for number, value in ratios.items() if number >= 10]
        found += [
            Claim(
                f"{kind}: at most 1.2 times its products, from 10 on",
                "our target",
                ", ".join(f"{n}: {evidence.shown(value, '.2f')}" for n, value in ratios.items()),
                evidence.told(all(value <= 1.2 for value in large), *large),
            ),
            Claim(
                f"{kind}: as long for 100 hyperparameters as for a million, within 10 %",
                "our target",
                f"{evidence.shown(100 * spread, '.0f')} % between the fastest and the slowest",
                evidence.told(spread <= 0.1, spread),
            ),
        ]
    return found


EXPERIMENT = Experiment(
    name="hypergradient_cost",
    about="Time of implicit hypergradients over bare Hessian products.",
    settings=Settings,
    scales=SCALES,
    labels=("axis", "number", "kind"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
