"""``apo_cost``: time and memory of a training step with and without APO."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad import apo
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Training a square ReLU network: time and memory of a step with APO over a plain step.

    All kinds run in turn; a ratio compares two runs of the same turn, and medians are reported. A
    preconditioner is compared with one whose factors stay fixed. Memory is the temporaries that
    XLA plans for one step, in copies of the weights.
    """

    width: int = 512
    """Number of inputs, of outputs and of units in each hidden layer."""
    layers: int = 4
    """Weight matrices."""
    batch_size: int = 256
    """Rows in a batch."""
    meta_interval: int = 10
    """Steps from one meta-step to the next."""
    num_steps: int = 20
    """Steps of one run, in one program: a multiple of `--meta-interval`."""
    num_repeats: int = 15
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(scale="smoke", width=16, layers=2, batch_size=8, num_steps=10, num_repeats=1),
    "cpu": Settings(),
    "paper": Settings(scale="paper", width=2048, batch_size=1024),
}


def optimizers(settings: Settings) -> dict[str, tuple[optax.GradientTransformation, str]]:
    """Each kind's optimizer, and the kind that it is compared with."""
    interval = {"meta_interval": settings.meta_interval}
    return {
        "SGD": (optax.sgd(1e-3), "SGD"),
        "Adam": (optax.adam(1e-3), "Adam"),
        "rate of SGD": (apo.learning_rate(optax.sgd, 1e-3, **interval), "SGD"),
        "rate of Adam": (apo.learning_rate(optax.adam, 1e-3, **interval), "Adam"),
        "fixed preconditioner": (apo.preconditioner(1e-3, meta_interval=10**9), "SGD"),
        "preconditioner": (apo.preconditioner(1e-3, **interval), "fixed preconditioner"),
    }


def predict(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The logits of the network."""
    x = batch[0]
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross-entropy on a batch."""
    logits = predict(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def program(
    settings: Settings, optimizer: optax.GradientTransformation, seed: int
) -> tuple[Callable[[], object], float]:
    """A compiled run without arguments, and the planned memory of one step in weight copies."""
    optimizer = optax.with_extra_args_support(optimizer)
    keys = jax.random.split(jax.random.key(seed), 4 + settings.layers)
    width, rows = settings.width, settings.batch_size
    params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[4:]]
    batches = tuple(
        (jax.random.normal(a, (rows, width)), jax.random.randint(b, (rows,), 0, width))
        for a, b in (keys[:2], keys[2:4])
    )

    def step(carry, batches):
        params, state = carry
        updates, state = optimizer.update(
            jax.grad(loss)(params, batches[0]),
            state,
            params,
            loss=loss,
            predict=predict,
            batch=batches[0],
            other_batch=batches[1],
        )
        return optax.apply_updates(params, updates), state

    def steps(carry, batches):
        def turn(carry, _):
            return step(carry, batches), None

        return jax.lax.scan(turn, carry, length=settings.num_steps)[0]

    carry = params, optimizer.init(params)
    plan = timing.compiled(step, carry, batches, donate=(0,))
    compiled = timing.compiled(steps, carry, batches)
    size = plan.temporaries / (4 * optax.tree.size(params))
    return functools.partial(compiled.call, carry, batches), size


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes milliseconds per step and the time ratio of every repeat, and memory."""
    kinds = optimizers(settings)
    if settings.num_steps % settings.meta_interval:
        raise ValueError(
            f"`num_steps` must be a multiple of meta_interval={settings.meta_interval}; got "
            f"num_steps={settings.num_steps}."
        )
    programs, sizes = {}, {}
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for name, (optimizer, _) in kinds.items():
        progress(f"compiling {name}", 0.0)
        programs[name], sizes[name] = program(settings, optimizer, seed)
    turns = timing.in_turn(programs, settings.num_repeats, functools.partial(progress, "steps"))
    for repeat, seconds in turns:
        for name, (_, beside) in kinds.items():
            numbers = {
                "milliseconds": 1e3 * seconds[name] / settings.num_steps,
                "ratio": seconds[name] / seconds[beside],
            }
            write({"kind": name, "step": repeat, **numbers})
            ratios[name].append(numbers["ratio"])
    for name in kinds:
        plain = "Adam" if "Adam" in name else "SGD"
        numbers = {"memory": sizes[name], "more_memory": sizes[name] - sizes[plain]}
        write({"kind": name, **numbers, "median_ratio": float(np.median(ratios[name]))})


def _medians(records: list[Record], metric: str) -> dict[str, float]:
    kinds = dict.fromkeys(r.labels["kind"] for r in records)
    return {
        kind: float(
            np.median([r.value for r in records if (r.labels["kind"], r.metric) == (kind, metric)])
        )
        for kind in kinds
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Every repeat's time ratio, and memory."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = [
        kind
        for kind in _medians(records, "ratio")
        if kind not in ("SGD", "Adam", "fixed preconditioner")
    ]
    for i, kind in enumerate(kinds):
        mine = [r.value for r in records if (r.labels["kind"], r.metric) == (kind, "ratio")]
        left.plot(np.full(len(mine), i), mine, "o", color=f"C{i}")
        right.bar(i, _medians(records, "more_memory")[kind], color=f"C{i}")
    left.axhline(1.3, color="k", linestyle=":", label="30 % more")
    left.set(ylabel="time of a step / of one without meta-steps")
    curves.from_zero(left)
    right.set_ylabel("memory beyond a plain step,\nin copies of the weights")
    left.legend()
    for axis in (left, right):
        axis.set_xticks(range(len(kinds)), kinds)
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(f"{config['layers']} x {config['width']}, batch {config['batch_size']}")
    return figure


def show(records: list[Record]) -> None:
    """Prints the medians."""
    ratios, memory = _medians(records, "ratio"), _medians(records, "more_memory")
    for kind, milliseconds in _medians(records, "milliseconds").items():
        print(
            f"{kind:>20}: {milliseconds:.2f} ms per step, ratio {ratios[kind]:.2f}, "
            f"{memory[kind]:+.2f} copies of the weights"
        )


def claims(summary: Summary) -> list[Claim]:
    """APO takes at most 30 % more time, and one more copy of the weights in memory."""
    out = []
    for kind in ("rate of SGD", "rate of Adam", "preconditioner"):
        ratio = summary.find("median_ratio", kind=kind)
        memory = summary.find("more_memory", kind=kind)
        if ratio is None or memory is None:
            continue
        beside = "the same with fixed factors" if kind == "preconditioner" else "a plain step"
        out += [
            Claim(
                f"{kind}: at most 30 % more time than {beside}",
                "our target",
                f"{evidence.shown(100 * (ratio['mean'] - 1), '.0f')} %",
                evidence.told(ratio["mean"] <= 1.3, ratio["mean"]),
            ),
            Claim(
                f"{kind}: at most one copy of the weights more memory than a plain step",
                "our target",
                f"{evidence.shown(memory['mean'], '.1f')} copies",
                evidence.told(memory["mean"] <= 1, memory["mean"]),
            ),
        ]
    return out


EXPERIMENT = Experiment(
    name="apo_cost",
    about="Time and memory of a training step with and without APO.",
    settings=Settings,
    scales=SCALES,
    labels=("kind",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
