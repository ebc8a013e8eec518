"""``lr_schedule``: tunes a learning rate's start and decay during one training run.

``--also-rates`` compares rates of Adam, for a claim of Vicol et al. 2023: in windows of one step
(``--truncation 1``) PES explodes with the rate 0.01 and is slow with 0.001, and ES-Single is fine
with 0.01. The first half is seen here, and follows: ``adam_noise`` predicts from the noise at a
frozen theta how far above its minimum J stays with a rate. J has a cliff near its minimum (a theta0
three times as large makes the training diverge), so that a walk of PES's size falls off, and
nothing leads back from there. The second half does not reproduce at this scale: ES-Single falls
off as well. A likely reason, which no run isolates: it has little noise, so that Adam takes steps
of nearly the whole rate along the gradient of the window's loss. Its sign changes within an episode
(early losses ask for a larger theta0, late ones for a smaller), and theta follows it by up to the
rate times the number of windows, which is many times the basin. Where that is small both stay.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, heat_map, training
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.estimators import adam_noise
from experiments.problems import data, image_mlp
from unrollgrad.running import need
from unrollgrad.types import UnrolledProblem


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train two numbers of a learning-rate schedule online with each estimator.

    SGD with momentum 0.9 trains an MLP on images; its learning rate in step t of T is
    theta0 / (1 + t / T)^theta1, and theta is the logarithms of theta0 and theta1. J is a mean over
    the steps, on another batch: of the training loss, or of minus the validation accuracy, which
    has no gradient.
    """

    objectives: tuple[Literal["loss", "accuracy"], ...] = ("loss", "accuracy")
    """The objectives, which are minimised one after another."""
    estimators: tuple[Literal["pes", "es_single", "truncated_es", "tbptt"], ...] = (
        "pes",
        "es_single",
        "truncated_es",
        "tbptt",
    )
    """The estimators to run."""
    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. digits come with scikit-learn; the others are downloaded or read from files."""
    data_dir: Path | None = None
    """The folder that has MNIST's or FashionMNIST's files, or to which they are downloaded."""
    hidden: tuple[int, ...] = (16,)
    """Units of the MLP's hidden layers."""
    batch_size: int = 8
    """Images in a training batch."""
    evaluation_batch_size: int = 16
    """Images in a batch on which J is measured."""
    horizon: int = 1000
    """Inner steps in an episode (T)."""
    truncation: int = 10
    """Inner steps in a window (K)."""
    start: tuple[float, float] = (0.003, 30.0)
    """Initial theta0 and theta1."""
    num_steps: int = 2000
    """Outer updates, one window each."""
    num_pairs: int = 30
    """Antithetic pairs of the evolution strategies: half the papers' number of particles."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    learning_rate: float = 0.01
    """Adam's learning rate at the beginning."""
    also_rates: tuple[float, ...] = ()
    """Further learning rates: each estimator runs with them too, as `pes, rate 0.001`. Then the
    noise of the estimators at a frozen theta is measured as well."""
    final_fraction: float = 0.0
    """The share of the learning rate that a cosine decay leaves; 1: the papers' constant rate."""
    points: int = 25
    """Number of points of each curve, at each of which J is measured."""
    cells: tuple[int, int] = (11, 9)
    """Number of values of theta0 and of theta1 on the grid that the picture shows."""
    num_episodes: int = 16
    """Episodes whose mean loss is J on the grid; 64 others measure the runs and the minimum."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        objectives=("accuracy",),
        estimators=("es_single", "tbptt"),
        hidden=(4,),
        horizon=40,
        num_steps=12,
        num_pairs=2,
        cells=(2, 3),
        num_episodes=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        data="mnist",
        hidden=(100, 100),
        batch_size=100,
        evaluation_batch_size=100,
        horizon=5000,
        num_steps=5000,
        num_pairs=500,
        final_fraction=1.0,
        cells=(31, 25),
        seeds=(0, 1, 2, 3),
    ),
}

RANGES = ((1e-3, 1.0), (0.3, 100.0))
"""Ranges of theta0 and theta1 on the grid."""


FROZEN = (0.074, 3.3)
"""Theta0 and theta1 at which the noise is measured: near the minimum of J at scale cpu."""

NOISE_WORKERS = 10
"""Workers with which each seed measures the noise."""

NEAR = 0.05
"""How far above the grid's minimum J may end, as a fraction of it, to be near."""

FAR = 0.3
"""How far above the grid's minimum J must end, as a fraction of it, to be far."""


GUESS = math.log(10)
"""The cross-entropy of a guess, which J is at most to count: where theta makes the training
diverge it is any number, and one seed's 10^8 would hide the others."""

BOUNDED = "J or a guess"
"""The metric J, but at most that of a guess."""

LOUDER = 3.0
"""How many times es_single's excess pes's must be to count as louder."""


class Task(NamedTuple):
    """What all seeds share.

    Attributes:
        objective: J of stacked thetas.
        plan: The estimators; along their curves are J and theta's two numbers.
    """

    objective: heat_map.Objective
    plan: training.Plan


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J on the grid, with the first seed only, and along each estimator's run."""
    shared = settings.without_run()
    for i, objective in enumerate(settings.objectives):

        def write_here(numbers: dict[str, Any], objective: str = objective) -> None:
            write({"objective": objective, **numbers})

        def progress_here(text: str, done: float, i: int = i, objective: str = objective) -> None:
            progress(f"{objective}: {text}", (i + done) / len(settings.objectives))

        task = _prepare(shared, objective)
        if seed == settings.seeds[0]:
            progress_here(heat_map.GRID, 0.0)
            axes = heat_map.logarithms(RANGES, settings.cells)
            heat_map.write_grid(task.objective, axes, write_here)
        key, theta = jax.random.key(seed), jnp.log(jnp.array(settings.start))
        if settings.also_rates:
            progress_here("noise at a frozen theta", 0.0)
            _write_noise(shared, task.plan, key, write_here)
        training.side_by_side(task.plan, key, theta, write_here, progress_here)


def _write_noise(settings: Settings, plan: training.Plan, key: jax.Array, write: Write) -> None:
    """Writes how far above its minimum J should stay, for each estimator and rate."""
    windows, theta = settings.horizon // settings.truncation, jnp.log(jnp.array(FROZEN))
    for name in settings.estimators:
        estimator = plan.methods[name].estimator
        found = adam_noise.noise(
            estimator, windows, NOISE_WORKERS, jax.random.fold_in(key, 1), theta
        )
        for rate in (settings.learning_rate, *settings.also_rates):
            label = _label(name, rate, settings.learning_rate)
            numbers = {"variance": found.variance.sum(), "excess": adam_noise.excess(found, rate)}
            write({"estimator": label, **numbers})


def _label(name: str, rate: float, first: float) -> str:
    """The name of an estimator with a rate."""
    return name if rate == first else f"{name}, rate {rate:g}"


@functools.lru_cache(maxsize=2)
def _prepare(settings: Settings, objective: str) -> Task:
    problem = schedule_problem(settings, objective)
    common = {
        "truncation": settings.truncation,
        "sigma": settings.sigma,
        "num_pairs": settings.num_pairs,
    }
    names: tuple[str, ...] = settings.estimators
    methods = {}
    for name in names:
        estimator = ug.REGISTRY[name].build(problem, **common)
        for rate in (settings.learning_rate, *settings.also_rates):
            decayed = optax.cosine_decay_schedule(rate, settings.num_steps, settings.final_fraction)
            label = _label(name, rate, settings.learning_rate)
            methods[label] = training.Method(estimator, optax.adam(decayed), settings.num_steps)
    measured = heat_map.objective(problem, settings.num_episodes)
    rates = bool(settings.also_rates)

    def evaluate(theta):
        j = measured.fresh(theta[None])[0]
        bounded = jnp.where(j <= GUESS, j, GUESS)  # also where it is not finite
        return {"J": j, **heat_map.named(theta), **({BOUNDED: bounded} if rates else {})}

    return Task(measured, training.Plan(methods, evaluate, settings.points))


def schedule_problem(settings: Settings, objective: str) -> UnrolledProblem:
    """The training of the MLP; the step loss is the objective on a batch of its own."""
    images = data.load(settings.data, settings.data_dir)
    held_out = objective == "accuracy"
    draw = image_mlp.sampler(
        images.validation if held_out else images.train, settings.evaluation_batch_size
    )

    def meta_loss(theta, params, key):
        if held_out:
            return -image_mlp.accuracy(params, draw(key))
        return image_mlp.cross_entropy(params, draw(key))

    return ug.training_problem(
        **image_mlp.task(images, settings.hidden, settings.batch_size),
        meta_loss=meta_loss,
        optimizer=lambda theta, t: image_mlp.decaying_sgd(theta, t, settings.horizon),
        horizon=settings.horizon,
    )


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws, for each objective, J over theta with the paths of the runs, and J along the runs."""
    objectives = list(dict.fromkeys(r.labels["objective"] for r in records))
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(11, 4.5 * len(objectives)), layout="constrained"
    )
    says = {"loss": "mean training loss", "accuracy": "minus mean validation accuracy"}
    rows = figure.subplots(len(objectives), 2, squeeze=False)
    for (left, right), objective in zip(rows, objectives, strict=True):
        here = [r for r in records if r.labels["objective"] == objective]
        heat_map.draw(left, here, (r"$\theta_0$", r"$\theta_1$"), f"J: {says[objective]}")
        bounded = any(r.metric == BOUNDED for r in here)  # else one diverged run is all one sees
        curves.plot(right, heat_map.runs(here), BOUNDED if bounded else "J")
        for r in here:
            if r.metric == "minimum":
                right.axhline(r.value, color="black", ls=":", label="minimum of the grid")
        says_j = "J, or a guess's loss if that is lower" if bounded else "J"
        right.set(ylabel=says_j, title=f"{says[objective]}, truncation {config['truncation']}")
        right.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints J at the end of every run."""
    for objective in dict.fromkeys(r.labels["objective"] for r in records):
        here = [r for r in records if r.labels["objective"] == objective]
        least = [r.value for r in here if r.metric == "minimum"]
        print(f"{objective}: the minimum of the grid is " + "".join(f"{v:.3g}" for v in least))
        curves.show_last(heat_map.runs(here), "J", "J at the end")


def claims(summary: Summary) -> list[Claim]:
    """PES and ES-Single end near the grid's minimum; truncated estimators do not."""
    papers = "Vicol et al. 2021, 2023"
    if summary.about.get("config", {}).get("also_rates"):
        return _stable(summary)
    out = []
    for objective in ("loss", "accuracy"):
        found = [
            *heat_map.ends_near(summary, "pes", NEAR, papers, objective=objective),
            *heat_map.ends_near(summary, "es_single", NEAR, papers, objective=objective),
        ]
        if objective == "loss":
            found += heat_map.ends_far(summary, "truncated_es", FAR, papers, objective=objective)
            found += heat_map.ends_far(summary, "tbptt", FAR, papers, objective=objective)
        else:
            found += _unmoved(summary)
        out += [claim._replace(says=f"{objective}: {claim.says}") for claim in found]
    return out


def _stable(summary: Summary) -> list[Claim]:
    """The claims for several rates: es_single's rate is too high for pes, a lower one slow."""
    paper = "Vicol et al. 2023"
    config = summary.about["config"]
    rate, windows = config["learning_rate"], f"in windows of {config['truncation']}"
    single = summary.find(BOUNDED, objective="loss", estimator="es_single")
    out = []
    for other in (rate, *config["also_rates"]):
        name = _label("pes", other, rate)
        finding = evidence.less(single, summary.find(BOUNDED, objective="loss", estimator=name))
        says = f"loss, {windows}: es_single with rate {rate:g} ends below pes with rate {other:g}"
        out.append(Claim(says, paper, finding.text, finding.holds))
    for other in config["also_rates"]:
        ours, theirs = (
            summary.find(BOUNDED, objective="loss", estimator=_label(name, other, rate))
            for name in ("es_single", "pes")
        )
        if ours and theirs:
            finding, says = evidence.less(ours, theirs), f"loss, {windows}, rate {other:g}"
            says += ": es_single is further than pes after the same updates"
            out.append(Claim(says, paper, finding.text, finding.holds))
    loud, quiet = (
        summary.find("excess", objective="loss", estimator=name) for name in ("pes", "es_single")
    )
    if loud and quiet:
        finding = evidence.more(loud, quiet, factor=LOUDER)
        says = f"loss, {windows}: at rate {rate:g} pes's noise keeps J further above its minimum "
        says += f"than es_single's, {LOUDER:g} times or more (predicted at a frozen theta)"
        out.append(Claim(says, paper, finding.text, finding.holds))
    least = heat_map.minimum(summary, objective="loss")
    if least is None:
        return out
    bound, at = (1 + FAR) * least, f"loss, {windows}, rate {rate:g}"
    pes = summary.find(BOUNDED, objective="loss", estimator="pes")
    left, stays = evidence.above(pes, bound), evidence.below(single, bound)
    says = f"{at}: pes ends at least {FAR:.0%} above the grid's minimum"
    out.append(Claim(says, paper, f"{left.text} against {evidence.shown(bound)}", left.holds))
    says = f"{at}: es_single ends less than {FAR:.0%} above it"
    out.append(Claim(says, paper, f"{stays.text} against {evidence.shown(bound)}", stays.holds))
    return out


def _unmoved(summary: Summary) -> list[Claim]:
    """The claim that backpropagation finds a zero gradient of the accuracy."""
    labels = {"objective": "accuracy", "estimator": "tbptt"}
    ends = [f["mean"] for name in heat_map.NAMES if (f := summary.find(name, **labels))]
    if not ends:
        return []
    moved = float(np.max(np.abs(ends - np.log(summary.about["config"]["start"]))))
    return [
        Claim(
            "tbptt does not move theta at all",
            "accuracy is a step function",
            f"the mean log theta moved by {evidence.shown(moved, '.2g')}",
            evidence.told(moved < 1e-6, moved),
        )
    ]


EXPERIMENT = Experiment(
    name="lr_schedule",
    about="The start and decay of a learning rate: truncated estimators are short-sighted.",
    settings=Settings,
    scales=SCALES,
    labels=("objective", "estimator"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a ResNet and CIFAR, truncated estimators end within 5 % of the best schedule of a "
        "grid, or PES and ES-Single do not, in ten seeds (p < 0.05)."
    ),
)
