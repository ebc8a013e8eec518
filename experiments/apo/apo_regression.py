"""``apo_regression``: learns a preconditioner on a badly conditioned linear network."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.apo.proximal_training import Task, best, best_results, last_tenth, train
from unrollgrad import apo
from unrollgrad.running import need

INPUTS, HIDDEN, OUTPUTS = 6, 6, 10


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The linear network x W1 W2 learns the map A x for x ~ N(0, I), in double precision.

    The singular values of A are spaced geometrically from 1 to 1 / condition. The APO
    preconditioner has one setting; SGD, Adam and natural gradient descent have a grid of rates.
    """

    condition: float = 1e10
    """Condition number of A: its largest singular value divided by its smallest."""
    initial_learning_rate: float = 0.1
    """The preconditioner is initialized as this number times the identity."""
    lambda_fsd: float = 1.0
    """Weight of the squared error between the outputs before and after a step."""
    lambda_wsd: float = 0.0
    """Weight of half the squared distance between the weights before and after a step."""
    meta_learning_rate: float = 0.003
    """Learning rate of the meta-optimizer, RMSprop."""
    meta_interval: int = 1
    """Number of training steps per meta-step."""
    damping: float = 1e-12
    """Damping of the exact Fisher matrix in natural gradient descent."""
    batch_size: int = 128
    """Number of rows per batch; every step draws new rows."""
    num_steps: int = 10_000
    """Number of training steps."""
    points: int = 100
    """Number of points on each curve; it divides the number of steps."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws A, the initial weights and the batches."""


SCALES = {
    "smoke": Settings(scale="smoke", condition=100, num_steps=400, points=20, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=100_000, seeds=tuple(range(10))),
}

GRIDS = {
    "SGD": (1e-2, 1.0),
    "Adam": (1e-4, 1.0),
    "natural gradient": (1e-2, 1.0),
}
"""Lowest and highest of the nine learning rates, which are spaced geometrically."""

APO = "APO preconditioner"


def task(seed: int, condition: float, batch: int) -> Task:
    """The training task: the linear network and its data."""
    left, right = jax.random.split(jax.random.key(seed))
    rank = min(INPUTS, OUTPUTS)
    u, _ = jnp.linalg.qr(jax.random.normal(left, (INPUTS, rank)))
    v, _ = jnp.linalg.qr(jax.random.normal(right, (OUTPUTS, rank)))
    truth = (u * jnp.geomspace(1, 1 / condition, rank)) @ v.T

    def init(key):
        first, second = jax.random.split(key)
        return {
            "w1": jax.random.normal(first, (INPUTS, HIDDEN)) / INPUTS**0.5,
            "w2": jax.random.normal(second, (HIDDEN, OUTPUTS)) / HIDDEN**0.5,
        }

    def sample(key):
        x = jax.random.normal(key, (batch, INPUTS))
        return x, x @ truth

    def predict(params, batch):
        return batch[0] @ params["w1"] @ params["w2"]

    return Task(
        init=init,
        sample=sample,
        predict=predict,
        loss=lambda params, batch: apo.squared_error(predict(params, batch), batch[1]).mean(),
        evaluate=lambda params: jnp.sum((params["w1"] @ params["w2"] - truth) ** 2) / 2,
    )


def natural_gradient(rate: float | jax.Array, damping: float) -> optax.GradientTransformation:
    """Steps along -(F + damping I)^-1 g; F = E[J'J] is the exact Fisher matrix for x ~ N(0, I)."""

    def update(updates, params):
        flat, unflatten = ravel_pytree(params)
        gradient, _ = ravel_pytree(updates)

        def product(flat):
            weights = unflatten(flat)
            return (weights["w1"] @ weights["w2"]).ravel()

        jacobian = jax.jacobian(product)(flat)
        fisher = jacobian.T @ jacobian + damping * jnp.eye(len(flat))
        return unflatten(-rate * jax.scipy.linalg.solve(fisher, gradient, assume_a="pos"))

    return optax.stateless(update)


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss during every run, the final loss and its logarithm."""
    makers: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
        "SGD": optax.sgd,
        "Adam": lambda rate: optax.adam(rate, eps=1e-16),
        "natural gradient": lambda rate: natural_gradient(rate, settings.damping),
        APO: lambda rate: preconditioner(settings),
    }
    with jax.enable_x64(True):
        here = task(seed, settings.condition, settings.batch_size)
        for i, (method, maker) in enumerate(makers.items()):
            progress(method, i / len(makers))
            grid = GRIDS.get(method)
            rates = np.geomspace(*grid, 9) if grid else np.array([settings.initial_learning_rate])

            def one(rate, maker=maker):
                key = jax.random.key(seed)
                return train(here, maker(rate), key, settings.num_steps, settings.points)[1]

            all_losses = jax.jit(jax.vmap(one) if grid else lambda r: jax.lax.map(one, r))(rates)
            every = settings.num_steps // settings.points
            for rate, losses in zip(rates, np.asarray(all_losses), strict=True):
                labels = {"method": method, "rate": f"{rate:.3g}"}
                for j, loss in enumerate(losses):
                    write({**labels, "step": (j + 1) * every, "loss": float(loss)})
                final = float(last_tenth(losses))
                write({**labels, "final": final, "log10_final": np.log10(final)})


def preconditioner(settings: Settings) -> optax.GradientTransformation:
    """The APO preconditioner with these settings."""
    return apo.preconditioner(
        settings.initial_learning_rate,
        lambda_fsd=settings.lambda_fsd,
        lambda_wsd=settings.lambda_wsd,
        discrepancy=apo.squared_error,
        # The gradients shrink by orders of magnitude; eps must not dominate them.
        meta_optimizer=optax.rmsprop(settings.meta_learning_rate, eps=1e-30),
        meta_interval=settings.meta_interval,
    )


def _logs(records: list[Record]) -> dict[str, dict[str, float]]:
    """log10 of the final loss, averaged over seeds, by method and rate."""
    found: dict[str, dict[str, list[float]]] = {}
    for r in records:
        if r.metric == "log10_final":
            line = found.setdefault(r.labels["method"], {})
            line.setdefault(r.labels["rate"], []).append(r.value)
    return {
        method: {rate: float(np.mean(values)) for rate, values in line.items()}
        for method, line in found.items()
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the loss of every seed against steps, at each method's best rate."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (method, line) in enumerate(_logs(records).items()):
        rate = best(line)
        mine = [r for r in records if r.labels == {"method": method, "rate": rate}]
        for j, seed in enumerate(dict.fromkeys(r.seed for r in mine)):
            curve = [r for r in mine if r.seed == seed and r.metric == "loss"]
            name = method if method == APO else f"{method}, best rate {rate}"
            axis.plot(
                [r.step for r in curve],
                [r.value for r in curve],
                color=f"C{i}",
                alpha=0.8,
                label=name if j == 0 else None,
            )
    axis.set(yscale="log", xlabel="steps", ylabel="loss on all data, each seed")
    axis.set_title(f"linear network, singular values from 1 to {1 / config['condition']:.0e}")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints every method's best rate and its final loss, the geometric mean over seeds."""
    for method, line in _logs(records).items():
        rate = best(line)
        print(f"{method:>18}, rate {rate:>6}: loss {10 ** line[rate]:.2e}")


def claims(summary: Summary) -> list[Claim]:
    """The preconditioner's loss is at least ten times below Adam's."""
    chosen = {m: r for (m,), r in best_results(summary, "log10_final", "method").items()}
    ours, adam = chosen[APO], chosen["Adam"]

    def text(method):
        r = chosen[method]
        if r["mean"] is None:
            return f"{method} not finite"
        se = f" ± {r['se']:.2f}" if r["se"] is not None else ""
        return f"{method} (rate {r['rate']}) {r['mean']:.2f}{se}"

    return [
        Claim(
            "after equal steps the preconditioner's loss is at least ten times below that of Adam "
            "at the best of nine rates",
            "Bae et al. 2022 (a picture: no number of theirs)",
            "log10 of the loss: " + ", ".join(map(text, chosen)),
            None not in (ours["mean"], adam["mean"]) and ours["mean"] <= adam["mean"] - 1,
        )
    ]


EXPERIMENT = Experiment(
    name="apo_regression",
    about="A preconditioner learned by APO on a badly conditioned linear network.",
    settings=Settings,
    scales=SCALES,
    labels=("method", "rate"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "Adam with a decaying rate, tuned by as many runs, reaches the preconditioner's loss "
        "in as many steps on a network ten times as wide, in ten seeds (p < 0.05)."
    ),
)
