"""``bilevel_benchmark``: the stochastic bilevel algorithms side by side, each tuned on one grid."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.bilevel import solvers, tasks
from experiments.bilevel.bilevel_benchmark_figure import draw, grid_of


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """All solvers on one task, each at its best (inner rate, ratio) of the same grid.

    The tasks are those of the benchmark of Dagréou et al. on data that needs no download; see
    `experiments/bilevel/tasks.py` for the recipes. h is the outer loss at the exact inner minimum,
    and its least value is found by BFGS in double precision, from the start and from the best ends
    of the tuning runs. A cell of the grid is tuned by the h
    at the end of one run, with a seed that is not reported. A gradient of one batch costs 1, the
    products of a vector with the Hessian and the mixed derivative 2 together.
    """

    task: tasks.Name = "ijcnn1"
    """The task: twins of ijcnn1 and covtype, hyper-cleaning of digits, or quadratics."""
    data: Path | None = None
    """A folder with the LIBSVM files of ijcnn1 (and ijcnn1.t) or covtype, in place of the twin."""
    solvers: tuple[str, ...] = solvers.names()
    """The solvers."""
    budget: int = 20_000
    """Gradient-equivalents of every run."""
    num_points: int = 12
    """Points on each curve, in equal ratios of the gradient-equivalents."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the batches; the data are the same for all."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        task="quadratics",
        solvers=("soba", "saba"),
        budget=3000,
        num_points=3,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", budget=4_000_000, num_points=40, seeds=tuple(range(10))),
}

SIZES = {
    "quadratics": tasks.Sizes(512, 512),
    "ijcnn1": tasks.Sizes(4096, 4096),
    "covtype": tasks.Sizes(2048, 2048, 1024),
    "cleaning": tasks.Sizes(1000, 300, 497),
}
"""Rows at scales "smoke" and "cpu"."""

FULL_SIZES = {
    "quadratics": tasks.Sizes(32_768, 1024),
    "ijcnn1": tasks.Sizes(49_990, 91_701),
    "covtype": tasks.Sizes(371_847, 92_962, 116_203),
    "cleaning": tasks.Sizes(1000, 300, 497),
}
"""Rows at scale "paper", those of the original data."""

RATES = {
    "quadratics": (0.03, 0.1, 0.3, 1.0),
    "ijcnn1": (0.03, 0.1, 0.3, 1.0),
    "covtype": (0.03, 0.1, 0.3, 1.0),
    "cleaning": (0.01, 0.03, 0.1, 0.3),
}
"""The grid's inner rates."""

RATIOS = {
    "quadratics": (0.3, 1.0, 3.0, 10.0, 30.0),
    "ijcnn1": (0.0003, 0.001, 0.003, 0.01, 0.1),
    "covtype": (0.3, 1.0, 3.0, 10.0, 30.0),
    "cleaning": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
"""The grid's ratios of the inner to the outer rate."""

TUNING_SEED = 1000
"""The seed of the batches in the runs that tune."""

DATA_SEED = 0
"""The seed of the data."""

VARIANCE_REDUCED = ("saba", "srba", "spaba")
"""Solvers without a noise floor on finite sums."""


class Tuned(NamedTuple):
    """The tuning of a solver: its best rates, h in every cell, and the best cell's theta."""

    rates: solvers.Rates
    cells: list[dict[str, float]]
    theta: Any


@functools.cache
def task_of(name: tasks.Name, scale: str, folder: Path | None) -> tasks.Task:
    """The task with its data."""
    return tasks.make(name, DATA_SEED, (FULL_SIZES if scale == "paper" else SIZES)[name], folder)


@functools.cache
def tuned(settings: Settings, name: str) -> Tuned:
    """Runs a solver in every cell of the grid; the best has the least h at the end."""
    task = task_of(settings.task, settings.scale, settings.data)
    pairs = [(a, b) for a in RATES[settings.task] for b in RATIOS[settings.task]]
    grid = solvers.Rates(*(jnp.asarray(column) for column in zip(*pairs, strict=True)))
    programs = solvers.of_task(task, name, cells=True)
    key = jax.random.key(TUNING_SEED)
    end = solvers.run(programs, grid, key, [float(settings.budget)])[-1]
    values = [float(task.measure(theta)["value"]) for theta in end.theta]
    cells = [
        {"rate": a, "ratio": b, "final": value} for (a, b), value in zip(pairs, values, strict=True)
    ]
    best = int(np.argmin([v if math.isfinite(v) else math.inf for v in values]))
    return Tuned(solvers.Rates(*pairs[best]), cells, end.theta[best])


@functools.cache
def task_with_least(settings: Settings) -> tasks.Task:
    """The task with the least h that BFGS finds from the start and from the three best ends."""
    task = task_of(settings.task, settings.scale, settings.data)
    if settings.task == "cleaning":  # one weight per row: h may fall for ever
        return task
    found = [tuned(settings, name) for name in settings.solvers]
    found.sort(key=lambda one: float(task.measure(one.theta)["value"]))
    return tasks.with_least(task, [task.theta, *(one.theta for one in found[:3])])


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes each solver's curve, and once the final h over its grid."""
    shared = settings.without_run()
    with jax.enable_x64(True):
        progress("tuning", 0.0)
        task = task_with_least(shared)
        start = task.measure(task.theta)
        write({"estimator": "start", "start_excess": float(start["value"]) - (task.least or 0.0)})
        if not math.isnan(error := float(start["error"])):
            write({"estimator": "start", "start_error": error})
        for i, name in enumerate(settings.solvers):
            progress(name, i / len(settings.solvers))
            found = tuned(shared, name)
            if seed == settings.seeds[0]:
                _write_grid(task, name, found, write)
            budgets = list(
                np.geomspace(settings.budget / 100, settings.budget, settings.num_points)
            )
            programs = _programs(shared, name)
            points = solvers.run(programs, found.rates, jax.random.key(seed), budgets)
            _write_curve(task, name, points, write)


@functools.cache
def _programs(settings: Settings, name: str) -> solvers.Programs:
    return solvers.of_task(task_of(settings.task, settings.scale, settings.data), name)


def _write_grid(task: tasks.Task, name: str, found: Tuned, write: Write) -> None:
    """Writes the cells, the best of them, and whether it lies at an edge of the grid."""
    rates, cells, _ = found
    for i, cell in enumerate(cells):
        write({"estimator": name, "step": i, "cell": {**cell, "excess": _excess(task, cell)}})
    edges = [{min(c[k] for c in cells), max(c[k] for c in cells)} for k in ("rate", "ratio")]
    at_edge = float(rates.inner in edges[0]) + float(rates.ratio in edges[1])
    best = {"best_rate": rates.inner, "best_ratio": rates.ratio, "at_edge": at_edge}
    diverged = sum(not math.isfinite(c["final"]) for c in cells)
    write({"estimator": name, **best, "diverged_cells": diverged, "cells": len(cells)})


def _excess(task: tasks.Task, cell: dict[str, float]) -> float:
    """The excess of h over its least value; h itself where that is not known."""
    return cell["final"] - (task.least or 0.0)


def _write_curve(task: tasks.Task, name: str, points: list[solvers.Point], write: Write) -> None:
    """Writes the exact numbers at each point; a direction is compared with h's mean gradient."""
    for i, point in enumerate(points):
        exact = task.measure(point.theta)
        grad, before = (np.asarray(e["grad"]) for e in (exact, task.measure(point.before)))
        numbers = {
            "gradients": point.gradients,
            "cpu_seconds": point.seconds,
            "steps": point.step,
            "value": float(exact["value"]),
            "grad_norm2": float(grad @ grad),
            "direction_error": float(np.linalg.norm(point.direction - (before + grad) / 2)),
        }
        if task.least is not None:
            numbers["suboptimality"] = float(exact["value"]) - task.least
        if not math.isnan(error := float(exact["error"])):
            numbers["error"] = error
        write({"estimator": name, "step": i, **numbers})


def show(records: list[Record]) -> None:
    """Prints each solver's best cell, its last point, and the time of a step."""
    begun = {r.metric: r.value for r in records if r.labels["estimator"] == "start"}
    print("start: " + ", ".join(f"{k} {v:.4g}" for k, v in begun.items()))
    for name in dict.fromkeys(r.labels["estimator"] for r in records if r.metric == "value"):
        mine = [r for r in records if r.labels["estimator"] == name]
        last = {r.metric: r for r in mine}  # of the last seed
        main = "suboptimality" if "suboptimality" in last else "value"
        ends = {r.seed: r.value for r in mine if r.metric == main}
        text = " ".join(f"{value:.2e}" for value in ends.values())
        micros = 1e6 * last["cpu_seconds"].value / last["steps"].value
        edge = " (edge)" if last["at_edge"].value else ""
        rates = f"rate {last['best_rate'].value:g}, ratio {last['best_ratio'].value:g}{edge}"
        print(f"{name:>14}: {main} by seed {text}; {rates}; {micros:.0f} us per step")
    print(f"{len(grid_of(records))} grids")


def claims(summary: Summary) -> list[Claim]:
    """What the papers say of variance reduction, of the single loop, and of cleaning."""
    config = summary.about["config"]
    if config["task"] == "cleaning":
        return _claims_of_cleaning(summary)
    out, soba = [], summary.find("suboptimality", estimator="soba")
    for name in filter(config["solvers"].__contains__, VARIANCE_REDUCED):
        found = evidence.less(summary.find("suboptimality", estimator=name), soba, 0.1)
        says = f"at equal cost {name} ends at a tenth of soba's suboptimality or less"
        out.append(Claim(says, "Dagréou et al. 2022 and 2024; Chu et al. 2024", *found[::-1]))
    for name in filter(config["solvers"].__contains__, ("stocbio", "amigo", "bsa", "ttsa")):
        found = evidence.less(soba, summary.find("suboptimality", estimator=name))
        says = f"at equal cost soba ends below {name}"
        out.append(Claim(says, "Dagréou et al. 2022, figures 2 and 3", *found[::-1]))
    return out


def _claims_of_cleaning(summary: Summary) -> list[Claim]:
    """Learned weights lower the test error; whether saba ends below soba."""
    out = []
    start = summary.find("start_error", estimator="start")
    for name in ("soba", "saba", "srba"):
        found = evidence.less(summary.find("error", estimator=name), start)
        says = f"{name} ends with a lower test error than equal weights"
        out.append(Claim(says, "aim of the task", *found[::-1]))
    return out


EXPERIMENT = Experiment(
    name="bilevel_benchmark",
    about="Stochastic bilevel algorithms side by side, each tuned on one grid.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    title=lambda settings: (
        f"bilevel_benchmark-{settings.task}{'-original' if settings.data else ''}"
    ),
    would_change=(
        "On the real ijcnn1 and covtype, with ten seeds and a finer grid of rates, another solver "
        "reaches the same suboptimality in fewer gradient-equivalents (p < 0.05)."
    ),
)
