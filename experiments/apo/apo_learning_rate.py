"""``apo_learning_rate``: learning rates found during training, from three initial values."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.apo.proximal_training import Task, best, best_results, last_tenth, train
from experiments.problems.digits import MLP
from unrollgrad import apo
from unrollgrad.running import need

APO, FIXED, DECAY = "APO", "fixed", "step decay"

BASES = {
    "SGD": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "RMSprop": lambda rate: optax.rmsprop(rate, decay=0.99),
    "Adam": optax.adam,
}

GRIDS = {
    "SGD": (1e-2, 10**0.5),
    "momentum": (1e-3, 10**-0.5),
    "RMSprop": (1e-4, 10**-1.5),
    "Adam": (1e-4, 10**-1.5),
}
"""Lowest and highest of the nine fixed rates, which are spaced geometrically."""

BEGINNINGS = {
    "SGD": (1e-4, 1e-2, 1.0),
    "momentum": (1e-5, 1e-3, 1e-1),
    "RMSprop": (1e-6, 1e-4, 1e-2),
    "Adam": (1e-6, 1e-4, 1e-2),
}
"""Initial rates of APO."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Amortized proximal optimization (APO) adapts learning rates on scikit-learn's digits.

    APO starts from three initial rates, each a factor of 100 above the last. It is compared with
    nine fixed rates, and with a step decay: the same nine rates, divided by 10 after half of the
    steps and by 100 after three quarters. Every batch draws wrong labels with some probability, so
    the lowest possible loss is the labels' entropy, not zero. The reported loss is on all images,
    in expectation over the wrong labels.
    """

    nets: tuple[Literal["MLP", "conv net"], ...] = ("MLP", "conv net")
    """MLP: 32 hidden units. conv net: two convolutions with 8 and 16 channels."""
    bases: tuple[Literal["SGD", "momentum", "RMSprop", "Adam"], ...] = (
        "SGD",
        "momentum",
        "RMSprop",
        "Adam",
    )
    """Optimizers whose learning rate is adapted."""
    lambda_fsd: float = 3.0
    """Weight of the KL divergence between the predictions before and after a step."""
    lambda_wsd: float = 1.0
    """Weight of half the squared distance between the weights before and after a step."""
    meta_learning_rate: float = 0.1
    """Learning rate of the meta-optimizer, RMSprop."""
    meta_interval: int = 10
    """Number of training steps per meta-step."""
    wrong_labels: float = 0.1
    """Probability that a label is replaced by a uniform draw from all ten classes."""
    batch_size: int = 64
    """Number of images per batch."""
    num_steps: int = 10_000
    """Number of training steps."""
    points: int = 50
    """Number of points on each curve; it divides the number of steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed draws its initial weights and its batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke", nets=("MLP",), bases=("SGD",), num_steps=500, points=20, seeds=(0,)
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=50_000, seeds=tuple(range(10))),
}


class ConvNet(nnx.Module):
    """Two convolutions with stride 2 and a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """The logits of a batch of images with 64 pixels each."""
        x = nnx.relu(self.first(x.reshape(-1, 8, 8, 1)))
        x = nnx.relu(self.second(x))
        return self.out(x.reshape(len(x), -1))


def task(net: str, batch: int, wrong: float) -> Task:
    """The training task: classification of all 1797 digits, with some wrong labels."""

    def build(key):
        rngs = nnx.Rngs(key)
        return MLP(64, 32, 10, rngs=rngs) if net == "MLP" else ConvNet(rngs)

    images, labels = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    images, labels = jnp.asarray(images, jnp.float32) / 16 - 0.5, jnp.asarray(labels)
    clean = jax.nn.one_hot(labels, 10)
    graph = nnx.graphdef(build(0))

    def sample(key):
        rows, which, other = jax.random.split(key, 3)
        rows = jax.random.randint(rows, (batch,), 0, len(images))
        drawn = jax.nn.one_hot(jax.random.randint(other, (batch,), 0, 10), 10)
        flip = jax.random.bernoulli(which, wrong, (batch, 1))
        return images[rows], jnp.where(flip, drawn, clean[rows])

    def predict(params, batch):
        return nnx.merge(graph, params)(batch[0])

    def loss(params, batch):
        return optax.softmax_cross_entropy(predict(params, batch), batch[1]).mean()

    whole = images, (1 - wrong) * clean + wrong / 10
    return Task(
        init=lambda key: nnx.state(build(key), nnx.Param),
        sample=sample,
        predict=predict,
        loss=loss,
        evaluate=lambda params: loss(params, whole),
    )


def floor(wrong: float) -> float:
    """The entropy of a label, in nats: the lowest possible expected loss."""
    right, other = 1 - wrong + wrong / 10, wrong / 10
    return -(right * np.log(right) + 9 * other * np.log(other)) if wrong else 0.0


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the curves of every rate, and the final losses."""
    cells = [(net, base) for net in settings.nets for base in settings.bases]
    for i, (net, base) in enumerate(cells):
        progress(f"{net}, {base}", i / len(cells))
        grid = np.geomspace(*GRIDS[base], 9)
        for method, rates in {FIXED: grid, DECAY: grid, APO: BEGINNINGS[base]}.items():
            curves = _curves(settings, seed, net, base, method, rates)
            for rate, losses, found in zip(rates, *curves, strict=True):
                labels = {"net": net, "base": base, "method": method, "rate": f"{rate:.3g}"}
                every = settings.num_steps // settings.points
                for j, (loss, value) in enumerate(zip(losses, found, strict=True)):
                    numbers = {"loss": float(loss)}
                    if method == APO:
                        numbers["learning_rate"] = float(value)
                    write({**labels, "step": (j + 1) * every, **numbers})
                write({**labels, "final": float(last_tenth(losses))})


def _curves(
    settings: Settings,
    seed: int,
    net: str,
    base: str,
    method: str,
    rates: np.ndarray | tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and learning rates during training, for every initial rate."""
    setting = settings.without_run()  # the cache key of the compiled program
    losses, found = _program(setting, net, base, method)(
        jax.random.key(seed), jnp.asarray(rates, jnp.float32)
    )
    return np.asarray(losses), np.asarray(found)


@functools.cache
def _program(
    settings: Settings, net: str, base: str, method: str
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Training at all rates of one method, from a key; compiled once for all seeds."""
    steps = settings.num_steps
    here = task(net, settings.batch_size, settings.wrong_labels)

    def optimizer(rate):
        if method == FIXED:
            return BASES[base](rate)
        if method == DECAY:
            drops = {steps // 2: 0.1, 3 * steps // 4: 0.1}
            return BASES[base](optax.piecewise_constant_schedule(rate, drops))
        return apo.learning_rate(
            BASES[base],
            rate,
            lambda_fsd=settings.lambda_fsd,
            lambda_wsd=settings.lambda_wsd,
            meta_optimizer=optax.rmsprop(
                settings.meta_learning_rate, eps=1e-30, bias_correction=True
            ),
            meta_interval=settings.meta_interval,
        )

    @jax.jit
    def all_rates(key, rates):
        def one(rate):
            return train(here, optimizer(rate), key, steps, settings.points)[1:]

        return jax.lax.map(one, rates)

    return all_rates


def _series(records: list[Record], metric: str, **labels: str) -> dict[str, dict[int, np.ndarray]]:
    """The values in order of steps, by rate and then by seed."""
    out: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric and all(r.labels[k] == v for k, v in labels.items()):
            out.setdefault(r.labels["rate"], {}).setdefault(r.seed, []).append(r.value)
    return {rate: {s: np.array(v) for s, v in line.items()} for rate, line in out.items()}


def finals(records: list[Record], net: str, base: str, method: str) -> dict[str, float]:
    """The final loss, averaged over seeds, by rate."""
    found = _series(records, "final", net=net, base=base, method=method)
    return {rate: float(np.mean(list(line.values()))) for rate, line in found.items()}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws losses (top) and rates (bottom), one column for each network and base optimizer."""
    cells = list(dict.fromkeys((r.labels["net"], r.labels["base"]) for r in records))
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(3.2 * max(2, len(cells)), 6.4), layout="constrained"
    )
    axes = figure.subplots(2, len(cells), squeeze=False, sharex=True)
    lowest = floor(config["wrong_labels"])
    for (upper, lower), (net, base) in zip(axes.T, cells, strict=True):
        every = config["num_steps"] // config["points"]
        steps = every * np.arange(1, config["points"] + 1)
        for i, (rate, line) in enumerate(
            _series(records, "loss", net=net, base=base, method=APO).items()
        ):
            mean = np.mean(list(line.values()), axis=0)
            upper.plot(steps, mean - lowest, color=f"C{i}", label=f"APO from {rate}")
            found = _series(records, "learning_rate", net=net, base=base, method=APO)[rate]
            for values in found.values():
                lower.plot(steps, values, color=f"C{i}", alpha=0.6)
        for method, style in {FIXED: "k:", DECAY: "k--"}.items():
            rate = best(finals(records, net, base, method))
            line = _series(records, "loss", net=net, base=base, method=method)[rate]
            mean = np.mean(list(line.values()), axis=0)
            upper.plot(steps, mean - lowest, style, label=f"best {method} ({rate})")
            if method == FIXED:
                lower.axhline(float(rate), color="k", linestyle=":")
        upper.set(title=f"{net}, {base}", yscale="log")
        lower.set(yscale="log", xscale="log", xlabel="steps")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
        upper.legend(fontsize="x-small")
    axes[0, 0].set_ylabel("loss on all images, above its floor")
    axes[1, 0].set_ylabel("learning rate")
    return figure


def show(records: list[Record]) -> None:
    """Prints the final losses, averaged over the seeds."""
    for net, base in dict.fromkeys((r.labels["net"], r.labels["base"]) for r in records):
        fixed, decay = (finals(records, net, base, method) for method in (FIXED, DECAY))
        ours = finals(records, net, base, APO)
        text = ", ".join(f"from {rate} {value:.4f}" for rate, value in ours.items())
        others = ", ".join(
            f"best {method} {best(f)} {f[best(f)]:.4f}"
            for method, f in {FIXED: fixed, DECAY: decay}.items()
        )
        print(f"{net:>8}, {base:>8}:  APO {text};  {others}")


def claims(summary: Summary) -> list[Claim]:
    """APO is insensitive to the initial rate, and as good as the best fixed rate."""
    out = []
    source = "Bae et al. 2022 (there ResNets on CIFAR)"
    lowest = best_results(summary, "final", "net", "base", "method")
    for net, base in dict.fromkeys((net, base) for net, base, _ in lowest):
        wanted = {"metric": "final", "net": net, "base": base, "method": APO}
        ours = [r for r in summary.results if wanted.items() <= r.items()]
        fixed, decay = (lowest[net, base, method] for method in (FIXED, DECAY))
        if any(r["mean"] is None for r in ours):
            out.append(Claim(f"{net}, {base}: APO trains", source, "not finite", False))
            continue
        text = ", ".join(f"from {r['rate']} {_value(r)}" for r in ours)
        low, high = min(r["mean"] for r in ours), max(r["mean"] for r in ours)
        out += [
            Claim(
                f"{net}, {base}: losses from rates two decades apart end within 10 %",
                source,
                f"{text}: within {100 * (high / low - 1):.1f} %",
                high <= 1.1 * low,
            ),
            Claim(
                f"{net}, {base}: none is worse than the best of nine fixed rates by over 2 %",
                source,
                f"fixed {fixed['rate']} {_value(fixed)}: APO at most "
                f"{100 * (high / fixed['mean'] - 1):+.1f} %; step decay from "
                f"{decay['rate']} {_value(decay)}: {100 * (high / decay['mean'] - 1):+.1f} %",
                high <= 1.02 * fixed["mean"],
            ),
        ]
    return out


def _value(result: dict[str, Any]) -> str:
    se = f" ± {result['se']:.4f}" if result["se"] is not None else ""
    return f"{result['mean']:.4f}{se}"


EXPERIMENT = Experiment(
    name="apo_learning_rate",
    about="Learning rates that APO finds while training, from three beginnings.",
    settings=Settings,
    scales=SCALES,
    labels=("net", "base", "method", "rate"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a ResNet and CIFAR, with lambdas chosen on other seeds, the comparison of APO's "
        "excess loss with that of the best fixed rate comes out the other way in ten seeds (p "
        "< 0.05)."
    ),
)
