"""``apo_regression``: learns a preconditioner on a badly conditioned linear network."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.apo import rivals
from experiments.apo.proximal_training import Task, last_tenth, train
from unrollgrad import apo
from unrollgrad.running import need

INPUTS, HIDDEN, OUTPUTS = 6, 6, 10


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The linear network x W1 W2 learns the map A x for x ~ N(0, I), in double precision.

    The singular values of A are spaced geometrically from 1 to 1 / condition. The numbers of every
    method are tuned on seeds of their own: nine rates of SGD, of Adam and of natural gradient
    descent, 16 pairs of a rate and a damping of KFAC, 12 pairs of a meta-rate and lambda_fsd of
    the APO preconditioner.
    """

    condition: float = 1e10
    """Condition number of A: its largest singular value divided by its smallest."""
    initial_learning_rate: float = 0.1
    """The preconditioner is initialized as this number times the identity."""
    lambda_fsd: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Weights, to choose from, of the squared error between the outputs before and after a step."""
    lambda_wsd: float = 0.0
    """Weight of half the squared distance between the weights before and after a step."""
    meta_learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    """Learning rates, to choose from, of the meta-optimizer, RMSprop."""
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
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    """Numbers have the lowest mean logarithm of the loss here; these seeds are not reported."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        condition=100,
        lambda_fsd=(1.0,),
        num_steps=400,
        points=20,
        seeds=(0,),
        tuning_seeds=(100, 101, 102),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=100_000, seeds=tuple(range(10))),
}

SGD, ADAM, NATURAL, KFAC = "SGD", "Adam", "natural gradient", "KFAC"
APO = "APO preconditioner"
METHODS = (SGD, ADAM, NATURAL, KFAC, APO)

GRIDS = {SGD: (1e-2, 1.0), ADAM: (1e-4, 1.0), NATURAL: (1e-2, 1.0)}
"""Lowest and highest of the nine learning rates, which are spaced geometrically."""


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


def factors(params: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """KFAC's factors of the two layers, for squared error: the model's outputs have variance 1."""
    x, w1, w2 = batch[0], params["w1"], params["w2"]
    hidden = x @ w1
    return {
        "w1": (x.T @ x / len(x), w2 @ w2.T),
        "w2": (hidden.T @ hidden / len(x), jnp.eye(OUTPUTS)),
    }


def candidates(settings: Settings, method: str) -> list[tuple[float, ...]]:
    """The numbers among which a method's are chosen."""
    if method == APO:
        return list(itertools.product(settings.meta_learning_rates, settings.lambda_fsd))
    if method == KFAC:
        return list(itertools.product((0.03, 0.1, 0.3, 1.0), (1e-12, 1e-9, 1e-6, 1e-3)))
    return [(float(rate),) for rate in np.geomspace(*GRIDS[method], 9)]


def optimizer(settings: Settings, method: str, x: jax.Array) -> optax.GradientTransformation:
    """The optimizer of a method with these numbers."""
    if method == SGD:
        return optax.sgd(x[0])
    if method == ADAM:
        return optax.adam(x[0], eps=1e-16)
    if method == NATURAL:
        return natural_gradient(x[0], settings.damping)
    if method == KFAC:
        return rivals.kfac(x[0], x[1], factors)
    return apo.preconditioner(
        settings.initial_learning_rate,
        lambda_fsd=x[1],
        lambda_wsd=settings.lambda_wsd,
        discrepancy=apo.squared_error,
        # The gradients shrink by orders of magnitude; eps must not dominate them.
        meta_optimizer=optax.rmsprop(x[0], eps=1e-30),
        meta_interval=settings.meta_interval,
    )


@functools.cache
def _program(settings: Settings, method: str) -> Any:
    """The losses of runs with each of a method's candidates, from a seed; compiled once."""

    @jax.jit
    def curves(seed, numbers):
        here = task(seed, settings.condition, settings.batch_size)

        def one(x):
            made, key = optimizer(settings, method, x), jax.random.key(seed)
            return train(here, made, key, settings.num_steps, settings.points)[1]

        return jax.lax.map(one, numbers) if method == APO else jax.vmap(one)(numbers)

    return curves


@functools.cache
def tuned(settings: Settings, method: str) -> tuple[float, ...]:
    """The candidate with the lowest mean log10 of the final loss over the seeds for tuning."""
    found = candidates(settings, method)
    ends = [_finals(settings, method, seed, found) for seed in settings.tuning_seeds]
    return found[int(np.argmin(np.nan_to_num(np.mean(ends, axis=0), nan=np.inf)))]


def _finals(settings, method, seed, numbers) -> np.ndarray:
    losses = _program(settings, method)(seed, jnp.asarray(numbers))
    return np.log10(np.asarray(last_tenth(losses)))


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss during every method's run with its tuned numbers, and its final logarithm."""
    setting = settings.without_run()  # the cache key of programs and choices
    every = settings.num_steps // settings.points
    with jax.enable_x64(True):
        for i, method in enumerate(METHODS):
            progress(method, i / len(METHODS))
            chosen = tuned(setting, method)
            losses = np.asarray(_program(setting, method)(seed, jnp.asarray([chosen]))[0])
            labels = {"method": method, "rate": ", ".join(f"{x:.3g}" for x in chosen)}
            for j, loss in enumerate(losses):
                write({**labels, "step": (j + 1) * every, "loss": float(loss)})
            write({**labels, "log10_final": float(np.log10(last_tenth(losses)))})


def _logs(records: list[Record]) -> dict[tuple[str, str], list[float]]:
    """log10 of the final loss, by seed, for each method with its numbers."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in records:
        if r.metric == "log10_final":
            found.setdefault((r.labels["method"], r.labels["rate"]), []).append(r.value)
    return found


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws every seed's loss against steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (method, rate) in enumerate(_logs(records)):
        mine = [r for r in records if r.labels == {"method": method, "rate": rate}]
        for j, seed in enumerate(dict.fromkeys(r.seed for r in mine)):
            curve = [r for r in mine if r.seed == seed and r.metric == "loss"]
            axis.plot(
                [r.step for r in curve],
                [r.value for r in curve],
                color=f"C{i}",
                alpha=0.8,
                label=f"{method} ({rate})" if j == 0 else None,
            )
    axis.set(yscale="log", xlabel="steps", ylabel="loss on all data, each seed")
    axis.set_title(f"linear network, singular values from 1 to {1 / config['condition']:.0e}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def show(records: list[Record]) -> None:
    """Prints every method's numbers and its final loss, the geometric mean over seeds."""
    for (method, rate), logs in _logs(records).items():
        print(f"{method:>18}, {rate:>12}: loss {10 ** np.mean(logs):.2e}")


def claims(summary: Summary) -> list[Claim]:
    """The preconditioner's loss is a tenth of Adam's, and as low as KFAC's."""
    found = {r["method"]: r for r in summary.results if r["metric"] == "log10_final"}
    paper = "Bae et al. 2022 (a picture: no number of theirs)"

    def claim(says, other, decades):
        ours, theirs = found.get(APO), found.get(other)
        shifted = theirs and {**theirs, "mean": theirs["mean"] + decades}
        test = evidence.less(ours, shifted)
        text = f"log10 of the loss: {test.text}"
        return Claim(says, paper, f"{text}, which is {other}'s and {decades:+.1f}", test.holds)

    return [
        claim("the preconditioner's loss ends at most at a tenth of Adam's", ADAM, -1.0),
        claim("the preconditioner's loss ends at most at twice KFAC's", KFAC, math.log10(2)),
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
