"""``bilevel_blocks``: weights of training rows, shared by many classifiers (BSVRB)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.bilevel import solvers
from experiments.bilevel.bilevel_benchmark_figure import series
from unrollgrad.running import need

Task = Literal["scales", "noise"]
Tracks = Literal["products", "hessians"]


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """One weight per training row, learned with 100 logistic regressions at once.

    Block i is a linear classifier whose loss is log(1 + exp(-margin / s_i)), with 100 scales s_i
    from 0.3 to 3. The inner loss is the mean over training rows of sigmoid(theta_row) times it, and
    1e-3 |w|^2 / 2; the outer one is the mean over the blocks of the loss on validation rows. In
    task "scales" labels are clean. In task "noise" 10 % of the training labels are flipped, and 30
    % of the positive rows are kept. Data are generated in the shape of a8a, with fewer columns: 30
    one-hot columns in 6 groups of 5, categories with probabilities proportional to 1 / rank, labels
    from a logistic model with 24 % positives. All methods are tuned on one grid of rates, by the
    outer loss at the end of a run whose seed is not reported.
    """

    task: Task = "scales"
    """Clean labels ("scales"), or wrong labels and few positives ("noise")."""
    num_blocks: int = 100
    """Number of classifiers."""
    num_train: int = 2000
    """Training rows, each with a weight."""
    budget: int = 200_000
    """Gradient-equivalents of every run, of one block and one batch of 32 rows each."""
    num_points: int = 12
    """Points on each curve."""
    sizes: tuple[int, ...] = (100, 1000, 10_000)
    """Numbers of blocks for which a step of both forms is timed, with 10 blocks per step."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws data and batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        num_blocks=10,
        num_train=200,
        budget=2000,
        num_points=3,
        sizes=(10, 100),
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_train=18_156, budget=20_000_000, seeds=tuple(range(10))),
}

METHODS: dict[str, tuple[Tracks, float | None]] = {
    "products, 10 blocks": ("products", 0.1),
    "products, 1 block": ("products", 0.0),
    "products, all blocks": ("products", 1.0),
    "hessians, 10 blocks": ("hessians", 0.1),
    "one classifier": ("products", None),
}
"""What is tracked, and the share of the blocks per step; "one classifier" has one block with scale
1 in all."""

MAIN = "products, 10 blocks"
"""The method that the claims are about."""

INNER_RATES = (0.1, 0.3, 1.0)
OUTER_RATES = (10.0, 100.0, 1000.0)
"""The grid; the gradient of a weight is of the order of 1 / rows."""

TIMED: dict[Tracks, int] = {"products": 500, "hessians": 500}
"""What is tracked where steps are timed, and how many steps a run has: each run copies the state
once, which is 40 MB for the Hessians of 10,000 blocks."""

METRICS = (
    "outer",
    "accuracy",
    "auc",
    "outer_gain",
    "auc_gain",
    "auc_over_one_classifier",
    "wrong_auc",
)
"""What is printed."""

TUNING_SEED = 1000
BATCH, VALIDATION, TEST = 32, 1000, 2000


class Rows(NamedTuple):
    """Features, labels of -1 or 1, and the number of each row."""

    x: Any
    y: Any
    row: Any


class Data(NamedTuple):
    """Three sets of rows, and which training labels are wrong."""

    train: Rows
    validation: Rows
    test: Rows
    wrong: np.ndarray | None


def data_of(settings: Settings, seed: int) -> Data:
    """Draws the data of a seed."""
    rng = np.random.default_rng(seed)
    weights = 1.5 * rng.standard_normal(30)
    shares = 1 / np.arange(1, 6)

    def draw(num):
        groups = [np.eye(5)[rng.choice(5, num, p=shares / shares.sum())] for _ in range(6)]
        x = np.concatenate(groups, 1)
        logits = x @ weights
        shift = np.quantile(logits, 0.76)
        return x, rng.random(num) < 1 / (1 + np.exp(shift - logits))

    x, positive = draw(2 * settings.num_train if settings.task == "noise" else settings.num_train)
    if settings.task == "noise":
        kept = ~positive | (rng.random(len(x)) < 0.3)
        x, positive = x[kept][: settings.num_train], positive[kept][: settings.num_train]
    wrong = rng.random(len(x)) < (0.1 if settings.task == "noise" else 0.0)

    def rows(x, y):
        return Rows(
            jnp.asarray(np.concatenate([x, np.ones((len(x), 1))], 1), jnp.float32),
            jnp.asarray(2 * y - 1, jnp.float32),
            jnp.arange(len(x)),
        )

    return Data(rows(x, positive ^ wrong), rows(*draw(VALIDATION)), rows(*draw(TEST)), wrong)


def scales(num: int) -> jax.Array:
    """The blocks' scales; that of one block alone is 1."""
    return jnp.ones(1) if num == 1 else jnp.geomspace(0.3, 3.0, num)


def losses(num_blocks: int) -> tuple[Any, Any]:
    """The outer and the inner loss of a block."""
    by_block = scales(num_blocks)

    def margins(params, rows, i):
        return jax.nn.softplus(-rows.y * (rows.x @ params) / by_block[i])

    def inner(params, theta, batch, i):
        weighted = jax.nn.sigmoid(theta[batch.row]) * margins(params, batch, i)
        return jnp.mean(weighted) + 0.5e-3 * jnp.sum(params**2)

    def outer(params, theta, batch, i):
        return jnp.mean(margins(params, batch, i))

    return outer, inner


@functools.cache
def programs_of(
    settings: Settings, num_blocks: int, per_step: int, tracks: Tracks, cells: bool = False
) -> solvers.Programs:
    """BSVRB's programs; ``Rates`` hold the inner rate and the ratio to the outer one."""
    outer, inner = losses(num_blocks)

    def build(rates, data):
        estimator = ug.bilevel.bsvrb(
            outer,
            inner,
            init_params=lambda key: jnp.zeros(data.train.x.shape[1]),
            num_blocks=num_blocks,
            blocks_per_step=per_step,
            outer_data=ug.bilevel.finite_sum(data.validation, BATCH),
            inner_data=ug.bilevel.finite_sum(data.train, BATCH),
            inner_optimizer=optax.sgd(rates.inner),
            tracks=tracks,
            radius=10.0 if tracks == "products" else None,
        )
        return estimator, optax.sgd(rates.inner / rates.ratio)

    return solvers.programs(build, jnp.zeros(settings.num_train), cells=cells)


def per_step(settings: Settings, method: str) -> tuple[int, int, Tracks]:
    """The number of blocks, those per step, and what is tracked."""
    tracks, share = METHODS[method]
    blocks = 1 if share is None else settings.num_blocks
    return blocks, max(1, round((share or 0) * blocks)), tracks


@functools.cache
def tuned(settings: Settings, method: str) -> tuple[solvers.Rates, float]:
    """The best rates of a method, and the number of cells whose run was not finite."""
    data = data_of(settings, TUNING_SEED)
    blocks, some, tracks = per_step(settings, method)
    pairs = [(a, a / b) for a in INNER_RATES for b in OUTER_RATES]
    grid = solvers.Rates(*(jnp.asarray(c, jnp.float32) for c in zip(*pairs, strict=True)))
    programs = programs_of(settings, blocks, some, tracks, cells=True)
    key, budgets = jax.random.key(TUNING_SEED), [float(settings.budget)]
    end = solvers.run(programs, grid, key, budgets, _arrays(data))[-1]
    values = np.array([float(measure(theta, _arrays(data))["outer"]) for theta in end.theta])
    best = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
    return solvers.Rates(*pairs[best]), float(np.sum(~np.isfinite(values)))


def _arrays(data: Data) -> Data:
    """The data as the programs take them."""
    return data._replace(wrong=None)


@jax.jit
def measure(theta: jax.Array, data: Data) -> dict[str, jax.Array]:
    """The numbers of one classifier that is trained anew, by L-BFGS, with these weights.

    It has scale 1 whatever the method, so that methods with other numbers of blocks compare.
    """
    outer, inner = losses(1)
    optimizer = optax.lbfgs()

    def loss(params):
        return inner(params, theta, data.train, 0)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros(data.train.x.shape[1])
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
    scores = data.test.x @ params
    return {
        "outer": outer(params, theta, data.validation, 0),
        "accuracy": jnp.mean((scores > 0) == (data.test.y > 0)),
        "auc": auc(scores, data.test.y > 0),
    }


def auc(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """The share of (positive, negative) pairs that the scores order rightly; a tie counts 1/2."""
    order = jnp.sort(jnp.where(positive, jnp.inf, scores))
    below = (jnp.searchsorted(order, scores, "left") + jnp.searchsorted(order, scores, "right")) / 2
    wins = jnp.sum(jnp.where(positive, below, 0))
    return wins / (jnp.sum(positive) * jnp.sum(~positive))


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes each method's curve, the baseline with equal weights, and the time of a step.

    A seed's data are common to all methods, so that gains over equal weights are written seed by
    seed: their spread is free of how hard the data are.
    """
    shared, data = settings.without_run(), data_of(settings, seed)
    equal = measure(jnp.zeros(settings.num_train), _arrays(data))
    start: dict[str, float] = {k: float(v) for k, v in equal.items()}
    write({"estimator": "equal weights", **start})
    last: dict[str, dict[str, float]] = {}
    for i, method in enumerate(METHODS):
        progress(method, i / len(METHODS))
        rates, diverged = tuned(shared, method)
        programs = programs_of(shared, *per_step(settings, method))
        budgets = list(np.geomspace(settings.budget / 100, settings.budget, settings.num_points))
        points = solvers.run(programs, rates, jax.random.key(seed), budgets, _arrays(data))
        for j, point in enumerate(points):
            found = measure(point.theta, _arrays(data))
            numbers: dict[str, float] = {k: float(v) for k, v in found.items()}
            numbers["outer_gain"] = start["outer"] - numbers["outer"]
            numbers["auc_gain"] = numbers["auc"] - start["auc"]
            if settings.task == "noise":
                numbers["wrong_auc"] = float(auc(-point.theta, jnp.asarray(data.wrong)))
            cost = {"gradients": point.gradients, "steps": point.step}
            write({"estimator": method, "step": j, **cost, **numbers})
            last[method] = numbers
        best = {"best_rate": rates.inner, "best_outer_rate": rates.inner / rates.ratio}
        write({"estimator": method, **best, "diverged_cells": diverged})
    over = last[MAIN]["auc"] - last["one classifier"]["auc"]
    write({"estimator": MAIN, "auc_over_one_classifier": over})
    _write_times(shared, _arrays(data), write)


def _write_times(settings: Settings, data: Data, write: Write) -> None:
    """Writes the CPU time of a step with 10 blocks, by the number of blocks that there are."""
    for tracks in TIMED:
        for blocks in settings.sizes:
            programs = programs_of(settings, blocks, 10, tracks)
            rates, key = solvers.Rates(0.1, 0.01), jax.random.key(0)
            carry = programs.begin(rates, key, data)
            num = TIMED[tracks]
            found = []
            for _ in range(4):
                before = solvers.cpu_seconds()
                carry = jax.block_until_ready(programs.advance(rates, key, carry, num, data))
                found.append(1e6 * (solvers.cpu_seconds() - before) / num)
            micros = {"step_microseconds": float(np.median(found[1:]))}
            write({"estimator": _timed(tracks, blocks), **micros})


def _timed(tracks: str, blocks: int) -> str:
    """The label of a timing."""
    return f"{tracks}, 10 of {blocks}"


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the gains in outer loss and AUC over equal weights, and the time of a step."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
    labels = {
        "outer_gain": "validation loss below that of equal weights",
        "auc_gain": "test AUC above that of equal weights",
    }
    places = series(records, "gradients")
    for axis, (metric, label) in zip(axes, labels.items(), strict=False):
        values = series(records, metric)
        for i, name in enumerate(METHODS):
            if name in values:
                at, found = np.median(places[name], 0), values[name]
                axis.plot(at, found.mean(0), "o-", ms=4, color=f"C{i}", label=name)
                if len(found) > 1:
                    se = found.std(0, ddof=1) / len(found) ** 0.5
                    low, high = found.mean(0) - se, found.mean(0) + se
                    axis.fill_between(at, low, high, color=f"C{i}", alpha=0.15, lw=0)
        axis.axhline(0, color="k", ls=":", label="equal weights")
        axis.set(xscale="log", xlabel="gradient-equivalents of a block", ylabel=label)
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize="small")
    _draw_times(axes[2], records)
    seeds = len({r.seed for r in records})
    figure.suptitle(f"task {config['task']}: mean and standard error of {seeds} seed(s)")
    return figure


def _draw_times(axis: Any, records: list[Record]) -> None:
    """The time of a step by the number of blocks that there are, a line for each form."""
    times = series(records, "step_microseconds")
    axis.set(xscale="log", yscale="log", xlabel="10 of so many per step", ylabel="CPU µs per step")
    for tracks, marker in zip(TIMED, "os", strict=True):
        mine = {int(n.split()[-1]): v for n, v in times.items() if n.startswith(tracks)}
        micros = [float(np.median(v)) for v in mine.values()]
        axis.plot(list(mine), micros, marker + "-", color="k", label=tracks)
        axis.set_xticks(list(mine), [str(n) for n in mine])
        for number, height in zip(mine, micros, strict=True):
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axis.annotate(_timed(tracks, number), (number, height), fontsize=6, **place)
    axis.margins(x=0.25, y=0.15)
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)


def show(records: list[Record]) -> None:
    """Prints the ends of the curves and the times."""
    for metric in (*METRICS, "step_microseconds"):
        for name, values in series(records, metric).items():
            print(f"{name:>22} {metric:>18}: {values[:, -1].mean():.4f}")


def claims(summary: Summary) -> list[Claim]:
    """What the paper says of many blocks, of their robustness, and of the cost."""
    paper = "Hu et al. 2023"
    main = functools.partial(summary.find, estimator=MAIN)
    out = [
        Claim(
            "10 blocks per step: learned weights lower the validation loss of a classifier that "
            "is trained anew",
            paper,
            *evidence.above(main("outer_gain"), 0.0)[::-1],
        )
    ]
    if summary.about["config"]["task"] == "noise":
        for metric, other in {
            "auc_gain": "logistic regression with equal weights",
            "auc_over_one_classifier": "one block alone",
        }.items():
            found = evidence.above(main(metric), 0.0)
            says = f"the test AUC of 100 blocks is above that of {other}"
            out.append(Claim(says, paper, *found[::-1]))
    few, most = (summary.about["config"]["sizes"][k] for k in (0, -1))
    for tracks in TIMED:
        less, more = (
            summary.find("step_microseconds", estimator=_timed(tracks, n)) for n in (few, most)
        )
        growth = evidence.below(evidence.ratio(more, less), 2.0)
        says = f"{tracks}: a step costs at most twice as much with {most} blocks as with {few}"
        out.append(Claim(says, "aim of the implementation", *growth[::-1]))
    return out


EXPERIMENT = Experiment(
    name="bilevel_blocks",
    about="Weights of training rows, shared by a hundred classifiers (BSVRB).",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    title=lambda settings: f"bilevel_blocks-{settings.task}",
    would_change=(
        "On the multi-block paper's own data, with ten seeds, the single-block baselines reach the "
        "same loss in as many gradient-equivalents (p < 0.05)."
    ),
)
