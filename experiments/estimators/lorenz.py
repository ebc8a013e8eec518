"""``lorenz``: fits the constants of a chaotic system to its trajectory (Li et al. 2023)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, training
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad.problems.lorenz import TRUTH
from unrollgrad.running import need

NAMES = ("bptt", "tbptt", "uoro", "dodge", "full_es", "truncated_es", "pes", "nres")
"""The paper's methods; nres is es_single with workers at staggered places of their episodes."""

NEEDED = {
    "inner_steps_needed": "inner steps",
    "sequential_steps_needed": "inner steps one after another",
}
"""Work until the first point of a curve that counts as learned. If no point does, it is the work of
the whole run, which is less than the work needed. The steps that stagger the workers, at most one
episode of each worker, are not counted."""

FASTER = "Li et al. 2023: NRES converges faster than the others"
FAILS = "Li et al. 2023: differentiation fails on the Lorenz system"
SMOOTHED = "theory: an unbiased gradient of the smoothed loss"
LEARNS = {
    "nres": (True, "Li et al. 2023"),
    "full_es": (True, SMOOTHED),
    "pes": (True, SMOOTHED),
    "bptt": (False, FAILS),
    "tbptt": (False, FAILS),
    "uoro": (False, FAILS),
    "dodge": (False, FAILS),
}
"""Which methods should learn, and the source of the claim."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Fit two constants of the Lorenz system to a trajectory by SGD: which methods learn them?

    theta is (ln a, ln r); the loss is the mean squared error of z over an episode from a fixed
    start. A method has learned when the loss from other starts, the papers' measure, is less than
    `enough` of the initial theta's.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the published horizon, sigma, learning rates
    and updates."""
    estimators: tuple[Literal[NAMES], ...] = NAMES  # type: ignore[valid-type]
    """The methods to run."""
    learning_rates: tuple[float, ...] = (1e-6, 3e-4, 1e-8, 1e-7, 3e-5, 1e-4, 1e-5, 3e-5)
    """SGD's learning rates, one for each method. cpu: the best of two to five rates on seed 0, a
    factor of 3 or 10 apart; bptt, uoro and dodge end far from the truth with all of them."""
    num_steps: tuple[int, ...] = (1000, 2000, 1000, 2000, 4000, 2000, 2000, 2000)
    """Outer updates, one number for each method; bptt and full_es use a whole episode for each."""
    decay_after: int = 1000
    """Updates after which the learning rate of pes falls to a tenth, as published."""
    horizon: int = 1000
    """Inner steps in an episode; beyond some 500 the gradient is chaotic. With the published 2000
    and sigma the smoothed loss is least near (10.8, 26.8), off the true constants (10, 28)."""
    truncation: int = 100
    """Inner steps in a window."""
    sigma: float = 0.01
    """Standard deviation of the perturbation of theta."""
    num_workers: int = 200
    """Workers of one antithetic pair each, at staggered places of their episodes. As published,
    full_es has a twentieth of this number of pairs, and bptt has one worker."""
    num_episodes: int = 64
    """Episodes of the test loss; each begins at the fixed start plus N(0, 1) noise."""
    enough: float = 0.01
    """The share of the initial theta's test loss below which a theta counts as learned. paper: 0.2,
    since the minimum of the smoothed loss has about 0.15."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole run; bptt and tbptt draw nothing, so their runs are equal."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("bptt", "nres"),
        learning_rates=(1e-8, 1e-4),
        num_steps=(40, 400),
        horizon=300,
        sigma=0.02,
        num_workers=30,
        num_episodes=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        learning_rates=(1e-8, 3e-4, 1e-13, 1e-10, 3e-5, 3e-4, 1e-5, 1e-5),
        num_steps=(1000, 10_000, 5000, 5000, 2000, 5000, 10_000, 5000),
        horizon=2000,
        sigma=0.04,
        num_episodes=10_000,
        enough=0.2,
        seeds=(101, 103, 107, 109, 113),
    ),
}

POINTS = 40
"""Number of points of each curve."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes theta's losses and error along each method's run, and its work until it learned."""
    theta, plan = _prepare(settings.without_run())
    start: dict[str, float] = {}
    learned: dict[str, dict[str, Any]] = {}
    last: dict[str, dict[str, Any]] = {}

    def write_and_watch(numbers: dict[str, Any]) -> None:
        name, loss = numbers["estimator"], float(numbers["test_loss"])
        left = loss / start.setdefault(name, loss)
        write({**numbers, "left": left})
        last[name] = numbers
        if left < settings.enough:
            learned.setdefault(name, numbers)

    key = jax.random.key(seed)
    training.side_by_side(plan, key, theta, write_and_watch, progress)
    for name, method in plan.methods.items():
        first = learned.get(name, last[name])
        window = method.estimator.truncation or settings.horizon
        work = dict(zip(NEEDED, (first["inner_steps"], window * first["step"]), strict=True))
        write({"estimator": name, **work, "learned": float(name in learned)})


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> tuple[Any, training.Plan]:
    problem, theta = ug.problems.lorenz(settings.horizon)
    rates, counts = settings.learning_rates, settings.num_steps
    if not len(settings.estimators) == len(rates) == len(counts):
        raise ValueError(
            "`learning_rates` and `num_steps` must have a number for each of the estimators "
            f"{settings.estimators}; got {rates} and {counts}."
        )
    methods = {
        name: training.Method(
            _estimator(settings, problem, name), _sgd(settings, name, rate), num_steps
        )
        for name, rate, num_steps in zip(settings.estimators, rates, counts, strict=True)
    }
    measure = jax.jit(functools.partial(evaluate, problem, settings.num_episodes))
    return theta, training.Plan(methods, measure, POINTS)


def _estimator(settings: Settings, problem: Any, name: str) -> Any:
    estimator = ug.REGISTRY["es_single" if name == "nres" else name].build(
        problem,
        truncation=settings.truncation,
        sigma=settings.sigma,
        num_pairs=max(1, settings.num_workers // 20) if name == "full_es" else 1,
    )
    if estimator.truncation is None:
        return estimator
    return ug.average(estimator, settings.num_workers, stagger="burn_in")


def _sgd(settings: Settings, name: str, rate: float) -> optax.GradientTransformation:
    if name == "pes":
        return optax.sgd(optax.piecewise_constant_schedule(rate, {settings.decay_after: 0.1}))
    return optax.sgd(rate)


def evaluate(problem: ug.UnrolledProblem, num_episodes: int, theta: jax.Array) -> dict[str, Any]:
    """The constants, their largest relative error, the loss, and the loss from other starts."""
    found, truth = jnp.exp(theta), jnp.array(TRUTH, theta.dtype)
    keys = jax.random.split(jax.random.key(0), num_episodes)
    elsewhere = jax.vmap(lambda key: ug.episode_loss(perturbed(problem), key, theta))(keys)
    return {
        "a": found[0],
        "r": found[1],
        "error": jnp.max(jnp.abs(found / truth - 1)),
        "loss": ug.episode_loss(problem, jax.random.key(0), theta),
        "test_loss": jnp.mean(elsewhere),
    }


def perturbed(problem: ug.UnrolledProblem) -> ug.UnrolledProblem:
    """The problem with N(0, 1) noise added to the start of both the model and the truth."""

    def init(key, theta):
        shift = jax.random.normal(key, (3,), theta.dtype)
        return jax.tree.map(lambda x: x + shift, problem.init(key, theta))

    return problem._replace(init=init)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the error of the constants, the loss and what is left of the test loss."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {
        "error": "largest relative error of a and r",
        "loss": "loss of an episode",
        "left": "loss from other starts / the initial theta's",
    }
    done = [r.value for r in records if r.metric == "inner_steps" and r.value > 0]
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        curves.plot(axis, records, metric, x="inner_steps")
        axis.set_xscale("symlog", linthresh=min(done))  # so that the start is drawn, too
        axis.set(yscale="log", title=title)
    axes[2].axhline(config["enough"], color="black", lw=0.8, ls=":", label="learned")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=9)
    figure.suptitle(f"Lorenz system, {config['horizon']} steps: {curves.seeds_of(records)}")
    return figure


def show(records: list[Record]) -> None:
    """Prints the last error and test loss of every run."""
    curves.show_last(records, "error", "error of a, r")
    curves.show_last(records, "test_loss", "test loss")


def claims(summary: Summary) -> list[Claim]:
    """NRES learns, with less work than others; methods that differentiate the loss do not."""
    config = summary.about["config"]
    steps, enough = f"{config['horizon']} steps", config["enough"]
    out = []
    for name, (learns, source) in LEARNS.items():
        left = summary.find("left", estimator=name)
        if left is None:
            continue
        says = f"{name} {'lowers' if learns else 'does not lower'} the test loss"
        finding = (evidence.below if learns else evidence.above)(left, enough)
        off = summary.find("error", estimator=name)
        found = "" if off is None else f"; a and r are off by {evidence.number(off)}"
        ours = f"{steps}: {finding.text} of the initial theta's{found}"
        out.append(Claim(f"{says} to {enough:.0%}", source, ours, finding.holds))
    return out + _comparisons(summary)


def _comparisons(summary: Summary) -> list[Claim]:
    """Claims that NRES learns with less work than others.

    The work of a run that does not learn is too low, so nothing can be told if NRES has such a run.
    """
    nres = summary.find("learned", estimator="nres")
    certain = nres is not None and nres["mean"] == 1
    out = []
    for name in ("full_es", "pes", "truncated_es", "tbptt"):
        for metric, what in NEEDED.items():
            ours, theirs = (summary.find(metric, estimator=n) for n in ("nres", name))
            learned = summary.find("learned", estimator=name)
            if ours is None or theirs is None or learned is None:
                continue
            finding = evidence.less(ours, theirs)
            text = f"nres {finding.text}; {learned['mean']:.0%} of {name}'s runs learned"
            says = f"nres learns with fewer {what} than {name}"
            out.append(Claim(says, FASTER, text, finding.holds if certain else None))
    return out


EXPERIMENT = Experiment(
    name="lorenz",
    about="The constants of a chaotic system from its trajectory, with eight estimators.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
