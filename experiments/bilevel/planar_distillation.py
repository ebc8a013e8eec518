"""``planar_distillation``: two learned points in the plane, warm or cold (Vicol et al. 2022)."""

import dataclasses
import functools
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
from experiments.bilevel.planar_distillation_figure import CELLS, draw, plane
from experiments.problems import image_mlp


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Distil a disc inside a ring into two points: what does the network know in the end?

    Theta is the places of two points, one for each class; the inner problem trains a network on
    them alone, and the outer loss is its squared error on 200 points of the disc (target -1) and
    the ring (1). Two points cannot say that one class surrounds the other. A warm start goes on
    with the network of the last outer step, which has seen the points travel; a cold start trains
    the network anew from its first weights in every outer step. Then the network is trained once
    more from its first weights, with the last theta, and with the theta of the path that makes it
    best.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: more seeds, as the published settings are not
    known."""
    hidden: tuple[int, ...] = (32, 32)
    """Units of the network's hidden layers."""
    num_steps: int = 1000
    """Outer updates."""
    learning_rate: float = 0.05
    """Adam's learning rate for theta."""
    inner_learning_rate: float = 0.1
    """Learning rate of the network's gradient descent."""
    inner_steps: int = 10
    """Inner steps per outer update with a warm start."""
    cold_inner_steps: int = 200
    """Inner steps per outer update with a cold start, and of training anew."""
    terms: int = 20
    """Terms of Neumann's series for the inverse Hessian; its step is the inner learning rate."""
    num_examples: int = 200
    """Points of the disc and the ring together."""
    points: int = 50
    """Number of points of each curve."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the data, the first weights and the first places."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        hidden=(8,),
        num_steps=4,
        inner_steps=2,
        cold_inner_steps=3,
        terms=2,
        num_examples=20,
        points=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", seeds=tuple(range(20))),
}

TARGETS = np.array([-1.0, 1.0], np.float32)
"""The targets of the two points: of the disc and of the ring."""

Data = tuple[jax.Array, jax.Array]
"""Places (count, 2) and their targets."""


class Found(NamedTuple):
    """What one start leads to.

    Attributes:
        thetas: Both places along the path, (points, 2, 2).
        losses: The outer loss along the path.
        accuracies: The network's accuracy on the data along the path.
        params: The network at the end, and those that are trained anew with the last theta and with
            the path's best.
    """

    thetas: jax.Array
    losses: jax.Array
    accuracies: jax.Array
    params: dict[str, Any]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the path of both starts, the ends, and, for the first seed, what the network says."""
    keys = jax.random.split(jax.random.key(seed), 3)
    data = disc_and_ring(keys[0], settings.num_examples)
    params = image_mlp.init_params(keys[1], (2, *settings.hidden, 1))
    theta = 0.5 * jax.random.normal(keys[2], (2, 2))
    search = _search(settings.without_run())
    every = settings.num_steps // settings.points
    for i, start in enumerate(("warm", "cold")):
        progress(start, i / 2)
        found = jax.tree.map(np.asarray, search[start](data, params, theta))
        for j in range(settings.points):
            numbers = {"loss": found.losses[j], "accuracy": found.accuracies[j]}
            places = {
                f"{name}{k}": found.thetas[j, k, d] for d, name in enumerate("xy") for k in (0, 1)
            }
            write({"start": start, "network": "path", "step": (j + 1) * every, **numbers, **places})
        for network, weights in found.params.items():
            labels = {"start": start, "network": network}
            write({**labels, "accuracy_at_end": accuracy(weights, data)})
            if seed == settings.seeds[0]:
                says = np.asarray(image_mlp.logits(weights, plane()))[:, 0]
                for cell in range(CELLS**2):
                    write({**labels, "step": cell, "output": says[cell]})
    if seed == settings.seeds[0]:
        for j, (place, target) in enumerate(zip(*map(np.asarray, data), strict=True)):
            numbers = {"x": place[0], "y": place[1], "target": target}
            write({"start": "data", "network": "data", "step": j, **numbers})


def disc_and_ring(key: jax.Array, count: int) -> Data:
    """A disc of radius 0.6, and a ring from radius 1 to 1.5."""
    radius, angle = jax.random.uniform(key, (2, count))
    targets = jnp.tile(TARGETS, count // 2)
    radius = jnp.where(targets < 0, 0.6 * jnp.sqrt(radius), 1 + 0.5 * radius)
    angle = 2 * jnp.pi * angle
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=1), targets


def error(params: Any, data: Data) -> jax.Array:
    """Half the network's mean squared error."""
    return 0.5 * jnp.mean((image_mlp.logits(params, data[0])[:, 0] - data[1]) ** 2)


def accuracy(params: Any, data: Data) -> jax.Array:
    """The share of the data on whose side of zero the network's output is."""
    return jnp.mean((image_mlp.logits(params, data[0])[:, 0] > 0) == (data[1] > 0))


@functools.lru_cache(maxsize=1)
def _search(settings: Settings) -> dict[str, Callable[..., Found]]:
    """A compiled function of (data, params, theta) for each start."""
    optimizer = optax.sgd(settings.inner_learning_rate)
    solver = ug.implicit.neumann(settings.terms, settings.inner_learning_rate)

    def inner(params, theta):
        return error(params, (theta, TARGETS))

    def anew(params, theta):
        def step(params, _):
            slope = jax.grad(inner)(params, theta)
            return optax.apply_updates(
                params, optimizer.update(slope, optimizer.init(params))[0]
            ), None

        return jax.lax.scan(step, params, length=settings.cold_inner_steps)[0]

    def search(start, data, params, theta):
        def outer(params, theta):
            return error(params, data)

        every = settings.num_steps // settings.points
        result = ug.bilevel.solve(
            inner,
            ug.implicit.hypergradient(outer, inner, solver=solver),
            params,
            theta,
            inner_optimizer=optimizer,
            inner_steps=settings.inner_steps if start == "warm" else settings.cold_inner_steps,
            outer_optimizer=optax.adam(settings.learning_rate),
            num_steps=settings.num_steps,
            start=start,
            every=every,
        )
        right = functools.partial(accuracy, data=data)
        trained = jax.vmap(functools.partial(anew, params))(result.thetas)
        best = jnp.argmax(jax.vmap(right)(trained))
        networks = {
            "at the end": result.params,
            "trained anew": jax.tree.map(lambda x: x[-1], trained),
            "trained anew, best": jax.tree.map(lambda x: x[best], trained),
        }
        losses = result.outer_losses[every - 1 :: every]
        return Found(result.thetas, losses, jax.vmap(right)(result.paths), networks)

    return {s: jax.jit(functools.partial(search, s)) for s in ("warm", "cold")}


def show(records: list[Record]) -> None:
    """Prints the accuracies at the end, by seed."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in records:
        if r.metric == "accuracy_at_end":
            found.setdefault((r.labels["start"], r.labels["network"]), []).append(r.value)
    for (start, network), values in found.items():
        text = "  ".join(f"{100 * v:.0f} %" for v in values)
        print(f"{start:>5} start, {network:>18}: accuracy on the data, by seed: {text}")


def claims(summary: Summary) -> list[Claim]:
    """A warm network knows more than its two points say; training anew loses it."""

    def end(start: str, network: str) -> dict[str, Any] | None:
        return summary.find("accuracy_at_end", start=start, network=network)

    warm = end("warm", "at the end")
    knows = "the network of a warm start classifies the data better than"
    rows = [
        (f"{knows} one trained anew on its last two points", end("warm", "trained anew")),
        (f"{knows} one trained anew on its best two", end("warm", "trained anew, best")),
        (f"{knows} the network of a cold start", end("cold", "at the end")),
    ]
    out = []
    for says, other in rows:
        finding = evidence.less(other, warm)
        out.append(Claim(says, "Vicol et al. 2022", f"accuracy {finding.text}", finding.holds))
    return out


EXPERIMENT = Experiment(
    name="planar_distillation",
    about="A disc in a ring distilled into two points: their paths with warm and cold starts.",
    settings=Settings,
    scales=SCALES,
    labels=("start", "network"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With ten learned images of MNIST in place of two points, the network of a warm start "
        "is no better than one trained anew on its last images, within 1 point of accuracy in "
        "ten seeds."
    ),
)
