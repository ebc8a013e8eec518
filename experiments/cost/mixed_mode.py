"""``mixed_mode``: memory and time of mixed-mode inner gradients, compared with jax's own."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import mixed_gradient
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator


class Workload(NamedTuple):
    """Training of a residual MLP by SGD with momentum."""

    layers: int
    width: int
    batch: int
    horizon: int
    scanned: bool


WORKLOADS = {
    "scanned, 8 x 128, batch 256": Workload(8, 128, 256, 10, True),
    "scanned, 16 x 128, batch 512": Workload(16, 128, 512, 10, True),
    "scanned, 12 x 64, batch 1024": Workload(12, 64, 1024, 10, True),
    "scanned, 8 x 256, batch 256": Workload(8, 256, 256, 10, True),
    "unrolled, 8 x 128, batch 256": Workload(8, 128, 256, 10, False),
    "tiny": Workload(2, 4, 8, 2, True),
}

GRADIENTS: dict[str, Callable[..., Callable[..., tuple[jax.Array, Any]]]] = {
    "plain": jax.value_and_grad,
    "mixed": mixed_gradient.value_and_grad,
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
    num_repeats: int = 5
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
    """The step of ``training_problem`` with the given inner gradient; returns (problem, theta)."""
    layers, width, batch, horizon, scanned = workload
    optimizer = optax.sgd(1.0, momentum=0.9)

    def layer(h, w):
        return h + jnp.tanh(h @ w["in"]) @ w["out"], None

    def forward(params, h):
        if scanned:
            return jax.lax.scan(layer, h, params)[0]
        for i in range(layers):
            h, _ = layer(h, jax.tree.map(lambda x, i=i: x[i], params))
        return h

    def init(key, theta):
        shape = (layers, width, width)
        keys = dict(zip(("in", "out"), jax.random.split(key), strict=True))
        params = {name: jax.random.normal(k, shape) / width for name, k in keys.items()}
        return params, optimizer.init(params)

    def step(key, theta, state, t):
        params, opt_state = state
        rows = jax.random.normal(key, (batch, width))

        def loss(params):
            decay = jnp.exp(theta["log_decay"]) * optax.tree.norm(params, squared=True)
            return jnp.mean((forward(params, rows) - 1) ** 2) + decay

        _, grads = value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        updates = jax.tree.map(lambda u: jnp.exp(theta["log_lr"]) * u, updates)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), loss(params)

    theta = {"log_lr": jnp.float32(-3), "log_decay": jnp.float32(-6)}
    return ug.UnrolledProblem(init, step, horizon), theta


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
    """No claims: the paper measured accelerators and other models."""
    return []


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
        'On a transformer of ten million weights, mixed mode beside `remat="step"` saves half '
        "of the memory in equal time; then `training_problem` would use it."
    ),
)
