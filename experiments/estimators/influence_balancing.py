"""``influence_balancing``: short truncations go the wrong way (Vicol et al. 2021)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, training
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train one parameter of a linear system online: which estimators reach the optimum?

    The loss of theta is the loss of the state after 500 steps, as published.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. cpu: the published settings already."""
    estimators: tuple[Literal["pes", "es_single", "truncated_es", "tbptt"], ...] = (
        "pes",
        "es_single",
        "truncated_es",
        "tbptt",
    )
    """The estimators to run."""
    num_steps: int = 3000
    """Outer updates, one inner step each."""
    num_pairs: int = 500
    """Antithetic pairs of the evolution strategies: half the papers' number of particles."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    learning_rate: float = 1e-4
    """SGD's learning rate."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole run. tbptt draws nothing: its runs are equal."""


SCALES = {
    "smoke": Settings(scale="smoke", num_steps=600, num_pairs=200, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper"),
}

POINTS = 60
"""Number of points of each curve."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss along each estimator's run."""
    theta, methods = _prepare(settings.without_run())
    key = jax.random.key(seed)
    plan = training.Plan(methods, _evaluate, POINTS)
    training.side_by_side(plan, key, theta, write, progress)


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> tuple[Any, dict[str, training.Method]]:
    problem, theta = ug.problems.influence_balancing(horizon=settings.num_steps)
    common = {"truncation": 1, "sigma": settings.sigma, "num_pairs": settings.num_pairs}
    optimizer = optax.sgd(settings.learning_rate)
    names: tuple[str, ...] = settings.estimators
    return theta, {
        name: training.Method(
            ug.REGISTRY[name].build(problem, **common), optimizer, settings.num_steps
        )
        for name in names
    }


@jax.jit
def _evaluate(theta: jax.Array) -> dict[str, jax.Array]:
    problem, _ = ug.problems.influence_balancing(horizon=500)
    final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    return {"theta": theta, "loss": ug.episode_loss(final, jax.random.key(0), theta)}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the loss against updates: a line for each estimator and seed."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    found = curves.curves(records, "loss")
    styles = curves.styles(found)
    dashed = [name for name in found if styles[name].dash == "--"]  # equal curves: in turn
    for name, runs in found.items():
        at = dashed.index(name) if name in dashed else 0
        dash = (5 * at, (5, 5 * len(dashed) - 5)) if len(dashed) > 1 and name in dashed else "-"
        for j, (steps, losses) in enumerate(runs.values()):
            label = name if j == 0 else None
            look = {"color": styles[name].color, "marker": styles[name].marker, "markevery": [-1]}
            axis.plot(steps, losses, ls=dash, **look, label=label)
    axis.set(
        yscale="log",
        xlabel="outer updates (one inner step each)",
        ylabel="loss after 500 steps",
        title="influence balancing, truncation 1",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints the last loss of every run."""
    curves.show_last(records, "loss", "loss at the end")


def claims(summary: Summary) -> list[Claim]:
    """PES and ES-Single reach the optimum; truncated estimators move away from it."""
    out = []
    source = "Vicol et al. 2021, 2023"
    start = 8.0
    for name, arrives in {
        "pes": True,
        "es_single": True,
        "truncated_es": False,
        "tbptt": False,
    }.items():
        found = summary.find("loss", estimator=name)
        if found is None:
            continue
        test, bound = (evidence.below, 1e-2 * start) if arrives else (evidence.above, start)
        finding = test(found, bound)
        says = f"{name} {'reaches the optimum' if arrives else 'moves away from it'}"
        out.append(Claim(says, source, f"loss {start:.0f} → {finding.text}", finding.holds))
    return out


EXPERIMENT = Experiment(
    name="influence_balancing",
    about="A linear system on which truncated estimators go the wrong way.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "In any seed and at any size, PES or ES-Single moves away from the optimum at a rate "
        "at which exact gradients reach it; theory excludes it here, so it would show a fault "
        "in our code."
    ),
)
