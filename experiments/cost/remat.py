"""``remat``: memory and time of backpropagation through inner training."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad.running import need
from unrollgrad.types import Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Temporary memory and time of `bptt(remat=...)`.

    It differentiates 20 steps of SGD on a large MLP, and increasing numbers of steps on a small
    one. Memory is the temporaries that XLA plans; time is the median of runs in turn.
    """

    width: int = 256
    """Units in each layer of the large MLP."""
    layers: int = 6
    """Layers of the large MLP."""
    batch_size: int = 512
    """Rows in a batch for the large MLP."""
    horizon: int = 20
    """Inner steps for the large MLP."""
    horizons: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Inner steps for the small MLP (2 layers of 32 units, batch 32)."""
    num_repeats: int = 5
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke", width=8, layers=2, batch_size=8, horizon=4, horizons=(4, 16), num_repeats=1
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", width=1024, batch_size=4096),
}

Remat = Literal["step", "sqrt"] | int | None

KINDS: dict[str, Remat] = {"none": None, "step": "step", "sqrt": "sqrt", "2 states": 2}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes MiB and seconds of every kind, and MiB by horizon."""
    key = jax.random.key(seed)
    programs, mebibytes = {}, {}
    for i, (name, remat) in enumerate(KINDS.items()):
        progress(f"compiling {name}", 0.3 * i / len(KINDS))
        problem, theta = _training(
            key, settings.horizon, settings.width, settings.layers, settings.batch_size
        )
        programs[name], mebibytes[name] = _compiled(problem, theta, remat, key)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    turns = timing.in_turn(
        programs, settings.num_repeats, lambda f: progress("running", 0.3 + 0.5 * f)
    )
    for _, seconds in turns:
        for name, value in seconds.items():
            times[name].append(value)
    for name, values in times.items():
        numbers = {"mebibytes": mebibytes[name], "seconds": float(np.median(values))}
        write({"workload": "mlp", "remat": name, **numbers})
    for i, horizon in enumerate(settings.horizons):
        progress(f"{horizon} steps", 0.8 + 0.2 * i / len(settings.horizons))
        for name in ("none", "step", "sqrt"):
            problem, theta = _training(key, horizon, 32, 2, 32)
            _, size = _compiled(problem, theta, KINDS[name], key)
            write({"workload": "small", "remat": name, "step": horizon, "mebibytes": size})


def _training(
    key: Key, horizon: int, width: int, layers: int, batch: int
) -> tuple[ug.UnrolledProblem, jax.Array]:
    rows = jax.random.normal(key, (batch, width))

    def loss(theta, params, batch, key):
        for w in params:
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    def init_params(key):
        keys = jax.random.split(key, layers)
        return [jax.random.normal(k, (width, width)) / width**0.5 for k in keys]

    problem = ug.training_problem(
        loss=loss,
        init_params=init_params,
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta)),
        sample_batch=lambda key: rows,
        horizon=horizon,
    )
    return problem, jnp.float32(-2.0)


def _compiled(
    problem: ug.UnrolledProblem, theta: Theta, remat: Remat, key: Key
) -> tuple[Callable[[], object], float]:
    """A compiled gradient without arguments, and the mebibytes of its temporaries."""
    estimator = ug.bptt(problem, remat=remat)
    args = key, theta, estimator.init(key, theta)
    compiled = timing.compiled(estimator.estimate, *args)
    return functools.partial(compiled.call, *args), compiled.temporaries / 2**20


def _table(records: list[Record], metric: str) -> dict[str, float]:
    """The mean over seeds for the large MLP, by kind."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.labels["workload"] == "mlp" and r.metric == metric:
            found.setdefault(r.labels["remat"], []).append(r.value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _slopes(records: list[Record]) -> dict[str, float]:
    """The log-log slope of memory by horizon for the small MLP, by kind."""
    out = {}
    for name in dict.fromkeys(r.labels["remat"] for r in records if r.step is not None):
        mine = [r for r in records if r.step is not None and r.labels["remat"] == name]
        steps, sizes = [r.step or 0 for r in mine], [r.value for r in mine]
        out[name] = float(np.polyfit(np.log(steps), np.log(sizes), 1)[0])
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Memory by time, and memory by horizon."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, seconds = _table(records, "mebibytes"), _table(records, "seconds")
    for name, size in sizes.items():
        left.plot(seconds[name], size, "o")
        left.annotate(name, (seconds[name], size), textcoords="offset points", xytext=(6, 4))
    left.set(xlabel="seconds", ylabel="MiB of temporaries", yscale="log")
    left.set_xlim(0, 1.3 * max(seconds.values()))
    left.set_title(f"{config['layers']} x {config['width']}, {config['horizon']} steps")
    for name, slope in _slopes(records).items():
        mine = [r for r in records if r.step is not None and r.labels["remat"] == name]
        x, y = [r.step for r in mine], [r.value for r in mine]
        right.loglog(x, y, "o-", label=f"{name}: slope {slope:.2f}")
    right.set(xlabel="inner steps", ylabel="MiB of temporaries", title="2 x 32")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def show(records: list[Record]) -> None:
    """Prints memory, time and the growth of memory."""
    sizes, seconds = _table(records, "mebibytes"), _table(records, "seconds")
    for name, size in sizes.items():
        print(
            f"remat {name:>8}: {size:8.1f} MiB ({size / sizes['none']:.2f}), "
            f"{seconds[name]:.2f} s ({seconds[name] / seconds['none']:.2f})"
        )
    for name, slope in _slopes(records).items():
        print(f"memory grows like horizon^{slope:.2f} with remat {name}")


def claims(summary: Summary) -> list[Claim]:
    """No claims: no paper gives numbers for these workloads."""
    return []


EXPERIMENT = Experiment(
    name="remat",
    about="Memory and time of backpropagation with rematerialization.",
    settings=Settings,
    scales=SCALES,
    labels=("workload", "remat"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        'With a transformer on a GPU, `"step"` takes over 1.3 times as long as no `remat`, or '
        'memory with `"sqrt"` grows faster than T^0.6 over horizons of 100 to 10,000.'
    ),
)
