"""``variance``: gradient estimators side by side, at several places of a training run."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jax.experimental import multihost_utils

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import PROBLEMS, with_defaults
from unrollgrad.diagnostics.report import draw, line, print_tables, row_of
from unrollgrad.diagnostics.statistics import pooled, root_se
from unrollgrad.running import stop_requests

PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}
"""Places of a training run, as fractions of its updates."""


USUAL = ("full_es", "truncated_es", "pes", "es_single", "gpes", "bptt", "tbptt")


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Compare gradient estimators on one problem: bias, variance and cost at frozen theta.

    A sample is the mean of one episode of every worker. The reference is the mean of other samples.
    If the reference is bptt, the exact gradient of each episode's loss, the smoothing of evolution
    strategies, O(sigma^2), counts as bias. The table is printed, and written with a picture.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. smoke: seconds. cpu: two minutes. paper: for an
    accelerator."""
    problem: Literal[tuple(PROBLEMS)] = "lorenz"  # type: ignore[valid-type]
    """What is unrolled. lorenz: theta is two constants of a chaotic system, so that backpropagation
    explodes and a short window sees too little; digits: the learning-rate and momentum schedule of
    an MLP, on which backpropagation is best. `python -m experiments list` describes them all. With
    `all`, every problem and every estimator: the command `leaderboard`."""
    estimators: tuple[Literal[tuple(ug.REGISTRY)], ...] = USUAL  # type: ignore[valid-type]
    """The estimators, in the order of the table. Default: those that are compared most often."""
    thetas: tuple[Literal[tuple(PLACES)], ...] = ("start",)  # type: ignore[valid-type]
    """Where to measure: at the start, in the middle or at the end of training theta."""
    num_steps: int = 100
    """Outer updates from start to end, by Adam on the reference's gradient."""
    num_workers: int | None = None
    """Workers of one antithetic pair each, rounded up until every other estimator can have a number
    of workers that costs the same (with truncated_es: to a multiple of 3). Default: the problem's,
    6 for most."""
    equal: Literal["inner_steps", "workers"] = "inner_steps"
    """What is equal for all estimators. inner_steps: cheaper estimators have more workers."""
    num_samples: int = 48
    """Independent samples per estimator."""
    num_chains: int = 6
    """Samples that continue for 20 episodes, for the long-run variance; 0 leaves it out."""
    sigma: float | None = None
    """Standard deviation of the perturbation, in theta's units. Default: the problem's."""
    truncation: int | None = None
    """Inner steps per window (K). Default: the problem's."""
    noise_period: int | None = None
    """Inner steps between two draws of gpes's noise. Default: two windows."""
    horizon: int | None = None
    """Inner steps per episode (T). Default: the problem's."""
    reference: Literal["bptt", "full_es"] | None = None
    """The estimator whose mean counts as the true gradient: bptt (the gradient of J) or full_es
    (the gradient of the episode-smoothed J). Default: the problem's; full_es where backpropagation
    explodes."""
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """Precision of all matrix products. A lower one rounds small differences of losses away."""
    devices: int | None = None
    """Number of devices that share the samples, in all processes together. Default: all devices. A
    CPU is one device unless you ask for more."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole repetition, including the training of theta."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("pes", "bptt"),  # bptt is also the reference, and compiles once
        horizon=8,
        truncation=4,
        num_workers=2,
        num_samples=4,
        num_chains=3,
        num_steps=2,
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        problem="text_lstm",
        horizon=1000,
        truncation=100,
        sigma=1e-3,
        num_workers=500,
        num_samples=50,
        num_chains=10,
        thetas=("start", "middle", "end"),
        num_steps=1000,
        seeds=(0, 1, 2),
    ),
}


def filled(settings: Settings) -> Settings:
    """The settings with None replaced by the problem's defaults."""
    choice = PROBLEMS[settings.problem]
    return with_defaults(settings, reference=choice.reference, num_workers=choice.num_workers)


def run(
    settings: Any,
    seed: int,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    progress: Callable[[str, float], None],
) -> None:
    """Writes a row for each place and estimator as soon as it is measured (``filled`` settings)."""
    names = list(dict.fromkeys(settings.estimators))
    problem, theta, workers, optimizer = _prepare(settings)
    reference = workers[settings.reference]
    key_train, key = jax.random.split(jax.random.key(seed))
    if set(settings.thetas) != {"start"}:
        progress("training theta", 0.0)
    thetas = _thetas(settings, reference, optimizer, theta, key_train)

    order = [" reference", *names]
    for i, (place, theta) in enumerate(thetas.items()):

        def report(name: str, part: int, of: int, i: int = i, place: str = place) -> None:
            done = order.index(name) + part / of
            doing = name.strip() if part else f"compiling {name.strip()}"
            progress(f"{place}: {doing}", (i + done / len(order)) / len(thetas))

        def on_row(row: dict[str, Any], place: str = place) -> None:
            if jax.process_index() == 0:
                print(f"{place}, {line(row)}" if len(thetas) > 1 else line(row), flush=True)
            numbers = {k: v for k, v in row.items() if k != "name"}
            write({"theta": place, "estimator": row["name"], **numbers})

        ug.diagnostics.compare(
            problem,
            theta,
            {name: workers[name] for name in names},
            reference=reference,
            num_samples=settings.num_samples,
            num_chains=settings.num_chains,
            batch_size=settings.devices,  # the workers fill a batch, and it compiles fastest
            devices=settings.devices,
            matmul_precision=settings.matmul_precision,
            key=jax.random.fold_in(key, zlib.crc32(place.encode())),
            progress=report,
            on_row=on_row,
        )


@functools.lru_cache(maxsize=1)
def _prepare(
    settings: Any,
) -> tuple[ug.UnrolledProblem, Any, dict[str, ug.GradientEstimator], optax.GradientTransformation]:
    """Problem, theta, workers and outer optimizer, cached so that seeds share compiled programs.

    The estimators and the reference have the numbers of workers that ``equal`` asks for.
    """
    choice = PROBLEMS[settings.problem]
    problem, theta, *_ = choice.make(settings.horizon)
    common = {
        "truncation": settings.truncation,
        "sigma": settings.sigma,
        "noise_period": settings.noise_period,
    }
    names: dict[str, None] = dict.fromkeys([*settings.estimators, settings.reference])
    passes = {name: ug.REGISTRY[name].passes(1) for name in names}
    if settings.equal == "workers":
        passes = dict.fromkeys(names, 2)
    equal = math.lcm(*passes.values())
    if settings.num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1; got {settings.num_workers}.")
    episodes = -(-2 * settings.num_workers // equal) * equal
    workers = {
        name: ug.average(ug.REGISTRY[name].build(problem, **common), episodes // passes[name])
        for name in names
    }
    schedule = optax.cosine_decay_schedule(choice.learning_rate, max(settings.num_steps, 1))
    return problem, theta, workers, optax.adam(schedule)


def _thetas(
    settings: Any,
    estimator: ug.GradientEstimator,
    optimizer: optax.GradientTransformation,
    theta: Any,
    key: jax.Array,
) -> dict[str, Any]:
    """Theta at the requested places."""
    if set(settings.thetas) == {"start"}:
        return {"start": theta}
    # An update is one estimate: a whole episode of bptt or full_es.
    steps = {place: round(PLACES[place] * settings.num_steps) for place in settings.thetas}
    kept, last = {0: theta}, max(steps.values())
    options = {"num_steps": last, "steps_per_dispatch": math.gcd(*steps.values())}

    def keep(step: int, theta: Any, numbers: dict[str, Any]) -> None:
        kept[step] = theta

    with jax.default_matmul_precision(settings.matmul_precision), stop_requests() as stopped:
        if last:
            ug.fit(estimator, theta, optimizer, key=key, callback=keep, **options)
    if stopped:
        raise KeyboardInterrupt
    if jax.process_count() > 1:  # each process trained its own, and sums may differ on a GPU
        kept = multihost_utils.broadcast_one_to_all(kept)
    return {place: kept[step] for place, step in steps.items()}


def rows(records: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``compare``, pooled over seeds, by the place of theta."""
    flat: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for r in records:
        estimators = flat.setdefault(r.labels["theta"], {})
        seeds = estimators.setdefault(r.labels["estimator"], {})
        seeds.setdefault(r.seed, {})[r.metric] = r.value
    return {
        place: [
            pooled([row_of(name, numbers) for numbers in seeds.values()])
            for name, seeds in estimators.items()
        ]
        for place, estimators in flat.items()
    }


def draw_records(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws a row of panels for each place, like ``Comparison.plot``."""
    return draw({f"{config['problem']}, {place}": r for place, r in rows(records).items()})


def show(records: list[Record]) -> None:
    """Prints a table for each place."""
    groups = rows(records)
    several = len(groups) > 1
    print_tables({f"theta: {place}" if several else "": r for place, r in groups.items()})


def claims(summary: Summary) -> list[Claim]:
    """The papers' claims on bias and on long-run variance, at every place of theta."""
    config = summary.about["config"]
    return [
        claim
        for place in config["thetas"]
        for claim in [
            *_claims_of_bias(summary, place, config),
            *_claims_of_long_run(summary, place, config),
        ]
    ]


SMOOTHED = ("episode-smoothed J", "period-smoothed J")

TARGETS = {"bptt": "J", "full_es": "episode-smoothed J"}
"""The functions whose gradients are the references."""

BLIND = 0.3
"""The share of |g| below which a bias may go unnoticed in a run that reports no bias."""


def _claims_of_bias(summary: Summary, place: str, config: dict[str, Any]) -> list[Claim]:
    out = []
    for name, row in ug.REGISTRY.items():
        if row.unbiased_for not in (*SMOOTHED, "J", "biased"):
            continue
        bias = _bias(summary, place, name)
        if bias is None:
            continue
        unseen = evidence.agrees(bias, 0.0, 0.0, blind=(BLIND - bias["mean"]) / 2)
        holds, ours = unseen.holds, f"at the {place}: bias {unseen.text} of the gradient's norm"
        if row.unbiased_for == "biased":
            holds = None if holds is None else not holds
        elif holds is False and row.unbiased_for != TARGETS[config["reference"]]:
            holds = None
            ours += f", the smoothing with sigma {config['sigma']} included"
        the = "the " if row.unbiased_for in SMOOTHED else ""
        what = f"unbiased for {the}{row.unbiased_for}"
        what = "biased" if row.unbiased_for == "biased" else what
        out.append(Claim(f"{name} is {what}", "Vicol et al. 2021, 2023", ours, holds))
    return out


def _bias(summary: Summary, place: str, name: str) -> evidence.Result | None:
    """The bias as a share of |g|, with its standard error from the samples of all seeds."""
    square, error, norm = (
        summary.find(metric, theta=place, estimator=name)
        for metric in ("squared_bias", "squared_bias_se", "reference_norm")
    )
    found = evidence.of_samples(square, error, summary.about["config"]["num_samples"])
    if found is None or norm is None or norm["mean"] == 0:
        return None
    size, square = norm["mean"], found["mean"]
    if not all(map(math.isfinite, (size, square, found["se"]))):
        return {**found, "mean": math.nan, "se": math.nan}
    bias, se = math.sqrt(max(square, 0.0)), root_se(square, found["se"])
    return {**found, "mean": bias / size, "se": se / size}


def _claims_of_long_run(summary: Summary, place: str, config: dict[str, Any]) -> list[Claim]:
    windows = config["horizon"] // config["truncation"]
    updates = {"full_es": 20, "es_single": 20 * windows, "pes": 20 * windows}
    values = {}
    for name, u in updates.items():
        value, error = (
            summary.find(f"{metric}[{u}]", theta=place, estimator=name)
            for metric in ("variance_of_mean", "variance_of_mean_se")
        )
        values[name] = evidence.of_samples(value, error, config["num_chains"])
    out = []
    for name, other, says, low, high in [
        ("es_single", "full_es", "in the long run es_single has full_es's variance", 1.0, 1.0),
        (
            "pes",
            "es_single",
            "in the long run pes has at least 1/n times es_single's variance (nothing bounds it "
            "from above)",
            1 / windows,
            math.inf,
        ),
    ]:
        ratio = evidence.ratio(values[name], values[other])
        if ratio is not None:
            inside = evidence.agrees(ratio, low, high, blind=BLIND * ratio["mean"])
            ours = f"at the {place}: {inside.text} times, n = {windows}"
            out.append(Claim(says, "theory, for quadratic losses", ours, inside.holds))
    return out


EXPERIMENT = Experiment(
    name="variance",
    about="Gradient estimators side by side: bias, variance over U updates, cost.",
    settings=Settings,
    scales=SCALES,
    labels=("theta", "estimator"),
    fill=filled,
    run=run,
    draw=draw_records,
    show=show,
    claims=claims,
    would_change=(
        "With 1000 samples, an estimator that is called unbiased has a bias of over 5 % of the "
        "gradient's norm, three standard errors from zero, or a truncated one has none."
    ),
    title=lambda settings: f"variance-{settings.problem}",
)
