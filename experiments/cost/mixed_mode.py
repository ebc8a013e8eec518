"""``mixed_mode``: memory and time of mixed-mode inner gradients, compared with jax's own."""

import dataclasses
import time
from collections.abc import Callable
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
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator


class Workload(NamedTuple):
    """Training of a residual net of equal layers by SGD with momentum.

    Attributes:
        layers: Number of layers.
        width: Features of a row.
        batch: Rows of a batch; of a transformer, sequences.
        length: Rows of a sequence, which attend to earlier ones; 0: a net without attention.
        horizon: Inner steps.
        layer: "scan": one scan over all layers. "remat": so that each layer is computed again in
            the inner backward pass. "unrolled": without a scan.
    """

    layers: int
    width: int
    batch: int
    length: int = 0
    horizon: int = 8
    layer: Literal["scan", "remat", "unrolled"] = "scan"


WORKLOADS = {
    "transformer, 8 x 64": Workload(8, 64, 8, 64),
    "transformer, 8 x 64, layer remat": Workload(8, 64, 8, 64, layer="remat"),
    "transformer, 8 x 128": Workload(8, 128, 2, 128),
    "MLP, 8 x 128": Workload(8, 128, 256),
    "MLP, 8 x 128, unrolled": Workload(8, 128, 256, layer="unrolled"),
    "tiny": Workload(2, 4, 2, 4, horizon=2),
}

GRADIENTS: dict[str, Callable[..., Callable[..., tuple[jax.Array, Any]]]] = {
    "plain": jax.value_and_grad,
    "mixed": ug.mixed_value_and_grad,
}

ESTIMATORS: dict[str, Callable[[ug.UnrolledProblem, int], GradientEstimator]] = {
    "bptt": lambda problem, horizon: ug.bptt(problem),
    "bptt, remat step": lambda problem, horizon: ug.bptt(problem, remat="step"),
    "dodge": lambda problem, horizon: ug.dodge(problem, truncation=horizon),
    "uoro": lambda problem, horizon: ug.uoro(problem, truncation=horizon),
}


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Temporary memory and time of estimators with forward-over-reverse inner gradients.

    Memory is the temporaries that XLA plans; time is the median of runs in turn.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)[:-1]
    """Workloads by name."""
    num_repeats: int = 3
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(scale="smoke", workloads=("tiny",), num_repeats=1),
    "cpu": Settings(),
    "paper": Settings(scale="paper"),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes MiB and seconds for every workload, estimator and inner gradient."""
    cells = [(w, e) for w in settings.workloads for e in ESTIMATORS]
    for i, (workload, name) in enumerate(cells):
        progress(f"{workload}, {name}", i / len(cells))
        here, key = WORKLOADS[workload], jax.random.key(seed)
        compiled, sizes = {}, {}
        for kind, gradient in GRADIENTS.items():
            problem, theta = training(here, gradient)
            estimator = ESTIMATORS[name](problem, here.horizon)
            arguments = key, theta, estimator.init(key, theta)
            program = jax.jit(estimator.estimate).lower(*arguments).compile()
            plan: Any = program.memory_analysis()
            compiled[kind], sizes[kind] = (program, arguments), plan.temp_size_in_bytes / 2**20
        seconds: dict[str, list[float]] = {kind: [] for kind in compiled}
        for repeat in range(settings.num_repeats + 1):
            for kind, (program, arguments) in compiled.items():
                begun = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                if repeat:
                    seconds[kind].append(time.perf_counter() - begun)
        for kind in compiled:
            labels = {"workload": workload, "estimator": name, "gradient": kind}
            median = float(np.median(seconds[kind]))
            write({**labels, "mebibytes": sizes[kind], "seconds": median})


def training(
    workload: Workload, value_and_grad: Callable[..., Callable[..., tuple[jax.Array, Any]]]
) -> tuple[ug.UnrolledProblem, dict[str, jax.Array]]:
    """The training with the given inner gradient; returns (problem, theta)."""
    layers, width, batch, length, horizon, kind = workload
    rows = (batch, length, width) if length else (batch, width)
    shapes = {"in": (width, 4 * width), "out": (4 * width, width)}
    if length:
        shapes |= {"attend": (width, 3 * width), "mix": (width, width)}

    def layer(h, w):
        if length:
            h = h + _attention(_normed(h) @ w["attend"]) @ w["mix"]
        return h + jax.nn.gelu(_normed(h) @ w["in"]) @ w["out"], None

    def forward(params, h):
        if kind == "unrolled":
            for i in range(layers):
                h, _ = layer(h, jax.tree.map(lambda x, i=i: x[i], params))
            return h
        return jax.lax.scan(jax.checkpoint(layer) if kind == "remat" else layer, h, params)[0]

    def init_params(key):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            name: jax.random.normal(keys[name], (layers, *shape)) / (layers * shape[0]) ** 0.5
            for name, shape in shapes.items()
        }

    def loss(theta, params, batch, key):
        decay = jnp.exp(theta["log_decay"]) * optax.tree.norm(params, squared=True)
        return jnp.mean((forward(params, batch) - 1) ** 2) + decay

    problem = ug.training_problem(
        loss=loss,
        init_params=init_params,
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta["log_lr"]), momentum=0.9),
        sample_batch=lambda key: jax.random.normal(key, rows),
        horizon=horizon,
        value_and_grad=value_and_grad,
    )
    return problem, {"log_lr": jnp.float32(-4), "log_decay": jnp.float32(-6)}


def _normed(h: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)


def _attention(h: jax.Array) -> jax.Array:
    """Four heads of causal attention; the last axis has queries, keys and values."""
    heads = h.reshape(*h.shape[:2], 3, 4, -1)
    query, key, value = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(*h.shape[:2], -1)


def _ratios(records: list[Record], metric: str) -> dict[tuple[str, str], float]:
    """Ratios of the seeds' means, mixed over plain, by workload and estimator."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for r in records:
        if r.metric == metric:
            labels = r.labels
            place = labels["workload"], labels["estimator"], labels["gradient"]
            found.setdefault(place, []).append(r.value)
    mean = {place: float(np.mean(values)) for place, values in found.items()}
    return {(w, e): mean[w, e, "mixed"] / mean[w, e, "plain"] for w, e, g in mean if g == "mixed"}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """The ratios of memory and of time."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, ("mebibytes", "seconds"), strict=True):
        ratios = _ratios(records, metric)
        workloads = list(dict.fromkeys(w for w, _ in ratios))
        for j, name in enumerate(ESTIMATORS):
            places = [i + 0.2 * (j - 1.5) for i in range(len(workloads))]
            axis.barh(places, [ratios[w, name] for w in workloads], 0.18, label=name)
        axis.set_yticks(range(len(workloads)), workloads)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(f"{metric}, mixed / plain")
    axis.invert_yaxis()
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


def show(records: list[Record]) -> None:
    """Prints the ratios of memory and of time."""
    sizes, seconds = _ratios(records, "mebibytes"), _ratios(records, "seconds")
    for workload, name in sizes:
        place = workload, name
        print(
            f"{workload:>30} {name:>17}: memory x {sizes[place]:.2f}, time x {seconds[place]:.2f}"
        )


def claims(summary: Summary) -> list[Claim]:
    """Beyond ``remat="step"`` it saves a tenth of the memory of a scanned transformer."""
    out = []
    for workload in summary.about["config"]["workloads"]:
        place = {"workload": workload, "estimator": "bptt, remat step"}
        ratios = [
            evidence.ratio(*(summary.find(metric, gradient=g, **place) for g in ("mixed", "plain")))
            for metric in ("mebibytes", "seconds")
        ]
        if not workload.startswith("transformer") or not all(ratios):
            continue
        size, seconds = (found["mean"] for found in ratios if found)
        says = f'{workload}: with remat="step" it saves 10 % of the memory or more, in equal time'
        texts = (evidence.shown(number, ".2f") for number in (size, seconds))
        ours = "memory x {}, time x {}".format(*texts)
        holds = evidence.told(size <= 0.9 and seconds <= 1.1, size, seconds)
        out.append(Claim(says, "Kemaev et al. 2025, on accelerators", ours, holds))
    return out


EXPERIMENT = Experiment(
    name="mixed_mode",
    about="Memory and time of inner gradients differentiated in forward-over-reverse mode.",
    settings=Settings,
    scales=SCALES,
    labels=("workload", "estimator", "gradient"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        'On a transformer of ten million weights on a GPU, mixed mode beside `remat="step"` '
        "saves less than a tenth of the memory, or takes over 1.1 times as long."
    ),
)
