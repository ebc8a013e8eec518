"""``control``: evolution strategies learn a linear policy from whole episodes or from windows.

Our own swimmer replaces the papers' swimmer (MuJoCo's), and minus its velocity replaces the return.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments._framework import curves, training, tuning
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems.swimmer import swimmer
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train a linear policy to swim: how many environment steps does each estimator need?

    As with the papers' Swimmer, a window is a tenth of an episode, the policy begins at zero and
    all methods have the same number of pairs, so that one update of full ES costs as much as ten
    updates of the others. ``full_es_few`` is full ES at its best: it has so few pairs that an
    update costs as much as an update of the others. ``nres`` is ES-Single with a worker for every
    pair, staggered.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the environment steps and pairs of NRES's
    figure."""
    problem: Literal["swimmer", "cart_pole"] = "swimmer"
    """What is controlled. cart_pole: the pole of ug.problems.control, which full ES learns to
    balance in about four updates (--horizon 100 --truncation 10 --sigma 3 --clip 0.1 --budget 50000
    --learning-rates 10 30 100 300 1000 3000)."""
    estimators: tuple[Literal["full_es_few", "truncated_es", "pes", "es_single", "nres"], ...] = (
        "full_es_few",
        "truncated_es",
        "pes",
        "es_single",
        "nres",
    )
    """The estimators that are compared with full ES."""
    horizon: int = 1000
    """Environment steps in an episode."""
    truncation: int = 100
    """Environment steps in a window."""
    num_pairs: int = 10
    """Antithetic pairs, a multiple of the windows in an episode."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    budget: int = 500_000
    """Environment steps of each run: 25 updates of full ES, as in PES's figure."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of SGD on the clipped gradient; each method uses its best one."""
    clip: float = 1.0
    """The norm to which all methods' gradients are clipped."""
    tuning_runs: int = 3
    """Runs of each learning rate, on keys of their own, by which a method's best one is chosen."""
    num_episodes: int = 32
    """Held-out episodes on which J is measured; they do not count as environment steps."""
    seeds: tuple[int, ...] = (3, 5, 7, 11, 13, 23)
    """Each seed is a whole run."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("truncated_es", "es_single"),
        problem="cart_pole",
        horizon=100,
        truncation=10,
        sigma=3.0,
        clip=0.1,
        budget=20_000,
        learning_rates=(100.0,),
        num_episodes=16,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_pairs=30, budget=1_200_000),
}

PROBLEMS = {"swimmer": swimmer, "cart_pole": ug.problems.control}

POINTS = 50
"""Number of points of each curve."""

TOLERANCE = 0.01
"""A method reaches full ES's J when it lacks at most this share of full ES's total gain."""

TUNING, HELD_OUT = 1_000_000, 1_000_001
"""Seeds of keys that no run uses."""


def filled(settings: Settings) -> Settings:
    """Checks the settings and returns them.

    Raises:
        ValueError: If an update of ``full_es_few`` cannot cost as much as an update of the others.
    """
    if settings.num_pairs * settings.truncation % settings.horizon:
        raise ValueError(
            f"`--num-pairs` must be a multiple of the {settings.horizon // settings.truncation} "
            f"windows in an episode; got {settings.num_pairs}."
        )
    return settings


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J along each method's run, then the steps that it took to reach full ES's J."""
    progress("choosing learning rates", 0.0)
    prepared = _prepare(settings.without_run())
    lines = []

    def keep(numbers):
        lines.append(numbers)
        write(numbers)

    training.side_by_side(prepared.plan, jax.random.key(seed), prepared.theta, keep, progress)
    full = lines_of(lines, "full_es")
    target = full[-1][1] + TOLERANCE * (full[0][1] - full[-1][1])
    for name, rate in prepared.rates.items():
        steps = steps_to(target, lines_of(lines, name))
        window = settings.horizon if name.startswith("full_es") else settings.truncation
        in_a_row = steps / prepared.costs[name] * window
        half = loss_at(settings.budget / 2, lines_of(lines, name))
        write(
            {
                "estimator": name,
                "steps": steps,
                "steps_in_a_row": in_a_row,
                "rate": rate,
                "loss_at_half": half,
            }
        )


def lines_of(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Pairs (inner steps, J) along the run of one method."""
    return [(x["inner_steps"], float(x["loss"])) for x in lines if x["estimator"] == name]


def steps_to(target: float, curve: list[tuple[int, float]]) -> float:
    """The inner steps after which J first is at most ``target``; infinite if it never is."""
    return next((float(steps) for steps, loss in curve if loss <= target), math.inf)


def loss_at(steps: float, curve: list[tuple[int, float]]) -> float:
    """The last J that was measured up to ``steps``."""
    return [loss for taken, loss in curve if taken <= steps][-1]


class Prepared(NamedTuple):
    """What all seeds share.

    Attributes:
        theta: Initial outer parameters.
        plan: The methods, and how their curves are measured.
        rates: Each method's learning rate.
        costs: Environment steps of one update of each method.
    """

    theta: jax.Array
    plan: training.Plan
    rates: dict[str, float]
    costs: dict[str, int]


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> Prepared:
    problem, theta = PROBLEMS[settings.problem](settings.horizon)

    def mean_loss(seed, theta):
        episodes = jax.random.split(jax.random.key(seed), settings.num_episodes)
        return jnp.mean(jax.vmap(lambda key: ug.episode_loss(problem, key, theta))(episodes))

    def score(theta):
        # Rates are chosen by the mean of J along a run, or of its logarithm if J is positive.
        loss = mean_loss(TUNING, theta)
        return loss if settings.problem == "cart_pole" else jnp.exp(loss)

    methods, rates, costs = {}, {}, {}
    for name, (estimator, cost) in estimators(settings, problem).items():
        num_steps = settings.budget // cost
        every = max(1, num_steps // POINTS)
        sgd = functools.partial(optimizer, clip=settings.clip)
        trial = tuning.Trial(estimator, sgd, num_steps // every * every, every, score)
        keys = jax.random.split(jax.random.key(TUNING), settings.tuning_runs)
        rates[name] = tuning.best_rate(trial, settings.learning_rates, keys, theta)
        methods[name] = training.Method(estimator, optimizer(rates[name], settings.clip), num_steps)
        costs[name] = cost
    evaluate = jax.jit(lambda theta: {"loss": mean_loss(HELD_OUT, theta)})
    return Prepared(theta, training.Plan(methods, evaluate, POINTS), rates, costs)


def estimators(
    settings: Settings, problem: ug.UnrolledProblem
) -> dict[str, tuple[GradientEstimator, int]]:
    """The methods by name, each with the environment steps of one call."""
    pairs, sigma = settings.num_pairs, settings.sigma
    few = pairs * settings.truncation // settings.horizon
    rest = {"truncation": settings.truncation, "sigma": sigma, "num_pairs": pairs}
    windows = {
        name: (
            ug.REGISTRY[name].build(problem, **rest),
            ug.REGISTRY[name].passes(pairs) * settings.truncation,
        )
        for name in ("truncated_es", "pes", "es_single")
    }
    one = ug.es_single(problem, truncation=settings.truncation, sigma=sigma)
    whole = 2 * settings.horizon
    all_of_them = {
        "full_es": (ug.full_es(problem, sigma=sigma, num_pairs=pairs), pairs * whole),
        "full_es_few": (ug.full_es(problem, sigma=sigma, num_pairs=few), few * whole),
        **windows,
        "nres": (ug.average(one, pairs, stagger="breakstep"), windows["es_single"][1]),
    }
    return {name: all_of_them[name] for name in ("full_es", *settings.estimators)}


def optimizer(rate: Any, clip: float) -> optax.GradientTransformation:
    """SGD on the clipped gradient; without clipping a single wild episode could ruin theta."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.sgd(rate))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws J of the policy on held-out episodes against environment steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    curves.plot(axis, records, "loss", x="inner_steps")
    problem = config.get("problem", "cart_pole")
    axis.set(
        yscale="log" if problem == "cart_pole" else "linear",
        xlabel="environment steps",
        ylabel="J, the mean loss of a step" + (": minus velocity" if problem == "swimmer" else ""),
        title=f"a linear policy, {problem}: windows of {config['truncation']} in "
        f"{config['horizon']} steps",
    )
    axis.legend(title=curves.seeds_of(records))
    return figure


def show(records: list[Record]) -> None:
    """Prints the last J of every run, and the steps that it took to reach full ES's J."""
    curves.show_last(records, "loss", "J at the end")
    curves.show_last(records, "steps", "steps to full ES's J")


def claims(summary: Summary) -> list[Claim]:
    """PES and ES-Single on windows take fewer steps than whole episodes; truncated ES is stuck.

    The steps are compared seed by seed (a run of full ES that does not improve is soon caught up
    with), and the losses by their means over the seeds.
    """
    compared = (
        ("pes", "full_es", "Vicol et al. 2021, Swimmer"),
        ("es_single", "full_es", "Vicol et al. 2023, Swimmer"),
        ("nres", "full_es", "Li et al. 2023, Swimmer"),
        ("pes", "full_es_few", "Li et al. 2023, Swimmer (equal steps per update)"),
        ("es_single", "full_es_few", "Li et al. 2023, Swimmer (equal steps per update)"),
        ("nres", "full_es_few", "Li et al. 2023, Swimmer (equal steps per update)"),
    )
    out = [_fewer(summary, "steps", *names) for names in compared]
    out.append(_fewer(summary, "steps_in_a_row", "nres", "full_es_few", "Li et al. 2023, Swimmer"))
    out += [
        curves.compare(
            summary,
            curves.Comparison(
                "loss_at_half",
                name,
                "<",
                "full_es",
                f"{name} is below full ES's last J after half of the environment steps (means)",
                source,
                "J ",
                errors=2,
                other_metric="loss",
            ),
        )
        for name, other, source in compared
        if other == "full_es" and summary.find("loss_at_half", estimator=name)
    ]
    says, source = "truncated_es stays worse than full_es", "Vicol et al. 2021"
    stuck = curves.Comparison("loss", "truncated_es", ">", "full_es", says, source, "J ")
    return [*out, curves.compare(summary, stuck)]


def _fewer(summary: Summary, metric: str, name: str, other: str, source: str) -> Claim:
    what = {"steps": "environment steps", "steps_in_a_row": "environment steps in a row"}[metric]
    says = f"{name} reaches full ES's J in fewer {what} than {other}"
    return curves.compare(summary, curves.Comparison(metric, name, "<", other, says, source))


EXPERIMENT = Experiment(
    name="control",
    about="A linear policy learned from whole episodes or from windows: environment steps.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    fill=filled,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
