"""``stn_cost``: time and memory of a self-tuning network's training step over a plain one."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad.running import need
from unrollgrad.types import Theta

PLAIN, DELTA, LINEAR, STN = "plain", "delta_stn", "delta_stn, linear outputs", "stn"
USES = "a decay", "dropout rates and a decay"


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Training a ReLU network: time and memory of a step over those of a plain one.

    The hyperparameters are a decay, which acts on the weights, or dropout rates of all layers too,
    which act inside the network. A step's time is the difference of a long and of a short stretch
    of training, so that the validation step, one in a stretch, does not count. All kinds run in
    turn; a ratio compares runs of the same turn, and medians are reported.
    """

    uses: tuple[str, ...] = USES
    """What the hyperparameters are."""
    width: int = 512
    """Number of inputs and of units in each hidden layer; there are ten outputs."""
    layers: int = 4
    """Weight matrices."""
    batch_size: int = 256
    """Rows in a batch."""
    short: int = 2
    """Training steps of the short stretch."""
    long: int = 22
    """Training steps of the long stretch."""
    num_repeats: int = 15
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        uses=USES[1:],
        width=8,
        layers=2,
        batch_size=8,
        short=1,
        long=2,
        num_repeats=1,
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", width=2048, batch_size=1024),
}


def split_loss(settings: Settings, drops: bool) -> ug.stn.SplitLoss:
    """The cross-entropy with decay; dropout of every layer's input, if asked for."""

    def predict(theta, params, batch, key):
        x, keep = batch[0], jax.nn.sigmoid(theta["keep"])
        for i, layer in enumerate(params):
            if drops:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), keep[i], x.shape)
                x = x * kept / jax.lax.stop_gradient(keep[i])
            x = x @ layer["w"] + layer["b"]
            if i < settings.layers - 1:
                x = jax.nn.relu(x)
        return x, params

    def loss(theta, outputs, batch, key):
        logits, params = outputs
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        decay = sum(jnp.sum(layer["w"] ** 2) for layer in params)
        return jnp.mean(each) + jnp.exp(theta["decay"]) * decay

    return ug.stn.SplitLoss(predict, loss)


def init_params(settings: Settings, key: jax.Array) -> list[dict[str, jax.Array]]:
    """Normal weights of variance 1 / inputs, and zero biases."""
    sizes = [settings.width] * settings.layers + [10]
    keys = jax.random.split(key, settings.layers)
    return [
        {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def sample_batch(settings: Settings, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random rows and labels."""
    rows = jax.random.normal(key, (settings.batch_size, settings.width))
    return rows, jnp.argmax(rows[:, :10], axis=1)


def programs(
    settings: Settings, drops: bool, num_steps: int, seed: int
) -> dict[str, tuple[timing.Compiled, tuple[Any, ...]]]:
    """A stretch of training by every kind, compiled, and its arguments."""
    split, optimizer = split_loss(settings, drops), optax.sgd(0.01, momentum=0.9)
    draw = functools.partial(sample_batch, settings)
    key, theta = jax.random.key(seed), {"keep": jnp.full(settings.layers, 2.0), "decay": -8.0}
    theta: Theta = jax.tree.map(jnp.asarray, theta)

    def whole(*args):
        return split(*args)

    def plain(key, theta, carry):
        def step(carry, key):
            params, state = carry
            for_batch, for_loss = jax.random.split(key)
            batch = draw(for_batch)
            value, grad = jax.value_and_grad(whole, 1)(theta, params, batch, for_loss)
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, jax.random.split(key, num_steps))

    def tuned(make: Callable[..., ug.types.GradientEstimator], loss: Any):
        estimator = make(
            loss=loss,
            meta_loss=lambda theta, params, key: whole(theta, params, draw(key), key),
            init_params=functools.partial(init_params, settings),
            sample_batch=draw,
            inner_optimizer=optimizer,
            train_steps=num_steps,
        )
        return estimator.estimate, estimator.init(key, theta)

    params = init_params(settings, key)
    kinds: dict[str, tuple[Callable[..., object], Any]] = {
        PLAIN: (plain, (params, optimizer.init(params))),
        DELTA: tuned(ug.stn.delta_stn, whole),
        LINEAR: tuned(ug.stn.delta_stn, split),
        STN: tuned(ug.stn.stn, whole),
    }
    return {
        name: (timing.compiled(function, key, theta, carry), (key, theta, carry))
        for name, (function, carry) in kinds.items()
    }


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes milliseconds per step and the ratio of every repeat, and memory."""
    for i, use in enumerate(settings.uses):
        done = i / len(settings.uses)
        progress(f"compiling, {use}", done)
        found = {
            steps: programs(settings, use != USES[0], steps, seed)
            for steps in (settings.short, settings.long)
        }
        calls = {
            (name, steps): functools.partial(compiled.call, *args)
            for steps, kinds in found.items()
            for name, (compiled, args) in kinds.items()
        }
        ratios: dict[str, list[float]] = {name: [] for name in found[settings.long]}
        for turn, seconds in timing.in_turn(calls, settings.num_repeats, lambda f: progress("", f)):
            each = {
                name: (seconds[name, settings.long] - seconds[name, settings.short])
                / (settings.long - settings.short)
                for name in ratios
            }
            for name, values in ratios.items():
                ratio = each[name] / each[PLAIN]
                values.append(ratio)
                numbers = {"milliseconds": 1e3 * each[name], "ratio": ratio}
                write({"use": use, "kind": name, "step": turn, **numbers})
        weights = size(init_params(settings, jax.random.key(seed)))
        for name, (compiled, args) in found[settings.long].items():
            if name != PLAIN:
                carried = args[2].carried
                kept = size(carried.params) + size(carried.response)
                temporaries = compiled.temporaries / found[settings.long][PLAIN][0].temporaries
                memory = {"weights": kept / weights, "temporaries": temporaries}
                write({"use": use, "kind": name, **memory})
            write({"use": use, "kind": name, "median_ratio": float(np.median(ratios[name]))})


def size(tree: Any) -> int:
    """The bytes of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _values(records: list[Record], use: str, kind: str, metric: str) -> list[float]:
    labels = use, kind
    return [
        r.value
        for r in records
        if (r.labels["use"], r.labels["kind"]) == labels and r.metric == metric
    ]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Every repeat's time ratio."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(8, 4), layout="constrained")
    axis, kinds = figure.subplots(), (DELTA, LINEAR, STN)
    for i, use in enumerate(config["uses"]):
        for j, kind in enumerate(kinds):
            mine = _values(records, use, kind, "ratio")
            label = use if j == 0 else None
            axis.plot(np.full(len(mine), j + 0.2 * (i - 0.5)), mine, "os"[i], color=f"C{i}", ms=4)
            axis.plot([j + 0.2 * (i - 0.5)], [np.median(mine)], "_", color="k", ms=16)
            axis.plot([], [], "os"[i], color=f"C{i}", label=label)
    axis.axhline(2.2, color="k", linestyle=":", label="our target, 2.2")
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(ylabel="time of a training step / of a plain one")
    axis.set_title(f"{config['layers']} x {config['width']}, batch {config['batch_size']}")
    curves.from_zero(axis)
    axis.margins(x=0.2)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
    return figure


def show(records: list[Record]) -> None:
    """Prints the medians."""
    for use in dict.fromkeys(r.labels["use"] for r in records):
        print(f"hyperparameters: {use}")
        for kind in (PLAIN, DELTA, LINEAR, STN):
            milliseconds, ratio = (
                np.median(_values(records, use, kind, metric))
                for metric in ("milliseconds", "ratio")
            )
            line = f"{kind:>26}: {milliseconds:.2f} ms per training step, ratio {ratio:.2f}"
            if kind != PLAIN:
                kept, temporaries = (
                    _values(records, use, kind, metric)[0] for metric in ("weights", "temporaries")
                )
                line += (
                    f"; keeps {kept:.2f} times the weights, {temporaries:.2f} of the temporaries"
                )
            print(line)


def claims(summary: Summary) -> list[Claim]:
    """A step of Δ-STN takes at most 2.2 plain ones, and 2.5 times the weights."""
    out = []
    for use in USES:
        for kind in (DELTA, LINEAR, STN):
            ratio = summary.find("median_ratio", use=use, kind=kind)
            kept = summary.find("weights", use=use, kind=kind)
            if ratio is None or kept is None:
                continue
            out += [
                Claim(
                    f"{kind}, {use}: a training step takes at most 2.2 times a plain one",
                    "our target",
                    f"{evidence.shown(ratio['mean'], '.2f')} times",
                    evidence.told(ratio["mean"] <= 2.2, ratio["mean"]),
                ),
                Claim(
                    f"{kind}, {use}: weights and response are at most 2.5 times the weights",
                    "our target",
                    f"{evidence.shown(kept['mean'], '.2f')} times",
                    evidence.told(kept["mean"] <= 2.5, kept["mean"]),
                ),
            ]
    return out


EXPERIMENT = Experiment(
    name="stn_cost",
    about="Time and memory of a self-tuning network's training step over a plain one.",
    settings=Settings,
    scales=SCALES,
    labels=("use", "kind"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a GPU and a transformer, the median of 30 repeats is on the other side of a target, "
        "with quartiles that exclude it."
    ),
)
