"""``influence_balancing``: where short truncations go the wrong way (Vicol et al. 2021)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import unrollgrad as ug
from experiments import training
from experiments.experiment import Claim, Experiment, Progress, Write
from experiments.results import Record, Summary
from unrollgrad.extras import need


@dataclasses.dataclass(frozen=True)
class Settings:
    """One parameter of a linear system, trained online with each estimator: does it arrive?

    The loss of theta is that of the state after 500 steps, as published.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Defaults of everything else. cpu has the published settings already."""
    estimators: tuple[Literal["pes", "es_single", "truncated_es", "tbptt"], ...] = (
        "pes",
        "es_single",
        "truncated_es",
        "tbptt",
    )
    """Which estimators."""
    num_updates: int = 3000
    """Outer updates, one inner step each."""
    num_pairs: int = 500
    """Antithetic pairs of evolution strategies: half of the papers' particles."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    learning_rate: float = 1e-4
    """Of SGD."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a whole run."""
    out: Path = Path("results")
    """Results go to a new folder in here."""


SCALES = {
    "smoke": Settings(scale="smoke", num_updates=600, num_pairs=100, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", seeds=(0, 1, 2, 3, 4)),
}

POINTS = 60
"""Points of each curve."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss along each estimator's run."""
    theta, workers, optimizer = _prepare(settings)
    updates = settings.num_updates
    every = next(n for n in range(max(updates // POINTS, 1), updates + 1) if updates % n == 0)
    for i, (name, estimator) in enumerate(workers.items()):
        progress(name, i / len(workers))
        thetas, _ = training.trajectory(
            estimator, optimizer, jax.random.key(seed), theta, updates, every
        )
        for j, (value, loss) in enumerate(zip(thetas, _losses(thetas), strict=True)):
            numbers = {"theta": float(value), "loss": float(loss)}
            write({"estimator": name, "step": j * every, **numbers})


@functools.lru_cache(maxsize=1)
def _prepare(
    settings: Settings,
) -> tuple[Any, dict[str, ug.GradientEstimator], optax.GradientTransformation]:
    problem, theta = ug.problems.influence_balancing(horizon=settings.num_updates)
    common = {"truncation": 1, "sigma": settings.sigma, "num_pairs": settings.num_pairs}
    names: tuple[str, ...] = settings.estimators
    workers = {name: ug.REGISTRY[name].build(problem, **common) for name in names}
    return theta, workers, optax.sgd(settings.learning_rate)


@jax.jit
def _losses(thetas: jax.Array) -> jax.Array:
    problem, _ = ug.problems.influence_balancing(horizon=500)
    final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    return jax.vmap(lambda theta: ug.episode_loss(final, jax.random.key(0), theta))(thetas)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """The loss against updates, a line per estimator and seed."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    losses = [r for r in records if r.metric == "loss"]
    for i, name in enumerate(dict.fromkeys(r.labels["estimator"] for r in losses)):
        for j, seed in enumerate(dict.fromkeys(r.seed for r in losses)):
            line = [r for r in losses if r.labels["estimator"] == name and r.seed == seed]
            axis.plot(
                [r.step for r in line],
                [r.value for r in line],
                color=f"C{i}",
                linestyle="--" if name == "tbptt" else "-",
                label=name if j == 0 else None,
            )
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
    last = {(r.labels["estimator"], r.seed): r.value for r in records if r.metric == "loss"}
    for name in dict.fromkeys(name for name, _ in last):
        values = "  ".join(f"{v:.2g}" for (n, _), v in last.items() if n == name)
        print(f"{name:>14}  loss at the end, by seed: {values}")


def claims(summary: Summary) -> list[Claim]:
    """PES and ES-Single arrive, truncated estimators walk away."""
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
        mean, se = found["mean"], found["se"]
        if mean is None:  # null in strict JSON: it was not finite
            ours, holds = f"loss {start:.0f} → not finite", not arrives
        else:
            ours = f"loss {start:.0f} → {mean:.2g}" + (f" ± {se:.1g}" if se else "")
            holds = mean < 1e-2 * start if arrives else mean > start
        says = f"{name} {'reaches the optimum' if arrives else 'moves away from it'}"
        out.append(Claim(says, source, ours, holds))
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
)
