"""``fit_overhead``: the cost of ``fit`` beyond a bare scan of the same updates."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Time per outer step of `fit` and of a bare jitted scan over the same updates.

    The estimator is PES with windows of one step on influence balancing, with 100 steps per
    dispatch. A step takes about 20 microseconds, so overheads show. The two run in turn; the first
    turn, which compiles, does not count.
    """

    num_steps: int = 20_000
    """Outer steps of one run, a multiple of 100."""
    num_repeats: int = 7
    """Runs of each kind."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(scale="smoke", num_steps=200, num_repeats=2),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=100_000),
}

PER_DISPATCH = 100


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes microseconds per step of both programs, and their ratio, for every repeat."""
    problem, theta = ug.problems.influence_balancing(horizon=100)
    pes = {"truncation": 1, "sigma": 0.1}
    layouts = {
        "500 pairs of one worker": ug.pes(problem, **pes, num_pairs=500),
        "64 workers": ug.average(ug.pes(problem, **pes), 64),
    }
    key, optimizer = jax.random.key(seed), optax.sgd(1e-4)
    for i, (name, estimator) in enumerate(layouts.items()):
        programs = {
            "bare": _bare(estimator, optimizer, theta, key, settings.num_steps),
            "fit": _fit(estimator, optimizer, theta, key, settings.num_steps),
        }

        def at(fraction: float, name: str = name, i: int = i) -> None:
            progress(name, (i + fraction) / len(layouts))

        for repeat, seconds in timing.in_turn(programs, settings.num_repeats, at):
            micros = {
                f"{kind}_microseconds": 1e6 * s / settings.num_steps for kind, s in seconds.items()
            }
            ratio = seconds["fit"] / seconds["bare"]
            write({"layout": name, "step": repeat, **micros, "ratio": ratio})


def _fit(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    theta: Theta,
    key: Key,
    num: int,
) -> Callable[[], object]:
    return lambda: ug.fit(
        estimator, theta, optimizer, num_steps=num, key=key, steps_per_dispatch=PER_DISPATCH
    )


def _bare(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    theta: Theta,
    key: Key,
    num: int,
) -> Callable[[], object]:
    @jax.jit
    def stretch(carry, first):
        def update(carry, i):
            theta, opt_state, state = carry
            estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
            updates, opt_state = optimizer.update(estimate.grad, opt_state, theta)
            theta = optax.apply_updates(theta, updates)
            return (theta, opt_state, state), (estimate.loss, optax.tree.norm(estimate.grad))

        return jax.lax.scan(update, carry, first + np.arange(PER_DISPATCH))

    def program():
        carry = theta, optimizer.init(theta), estimator.init(key, theta)
        for first in range(0, num, PER_DISPATCH):
            carry, records = stretch(carry, first)
            jax.device_get(records)
        return jax.block_until_ready(carry)

    return program


def _medians(records: list[Record], metric: str) -> dict[str, float]:
    layouts = dict.fromkeys(r.labels["layout"] for r in records)
    return {
        layout: float(
            np.median(
                [r.value for r in records if r.labels["layout"] == layout and r.metric == metric]
            )
        )
        for layout in layouts
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """The ratio of every repeat."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for layout, median in _medians(records, "ratio").items():
        mine = [r for r in records if r.metric == "ratio" and r.labels["layout"] == layout]
        axis.plot([r.value for r in mine], "o", label=f"{layout}: median {median:.2f}")
    axis.axhline(1.1, color="k", linestyle=":", label="10 % more")
    axis.set(xlabel="repeat", ylabel="time of fit / time of a bare scan")
    curves.from_zero(axis)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints the medians."""
    micros = {kind: _medians(records, f"{kind}_microseconds") for kind in ("bare", "fit")}
    for layout, ratio in _medians(records, "ratio").items():
        print(
            f"{layout:>24}: bare scan {micros['bare'][layout]:.1f} us per step, "
            f"fit {micros['fit'][layout]:.1f} us, ratio {ratio:.2f}"
        )


def claims(summary: Summary) -> list[Claim]:
    """No claims: no paper reports this overhead."""
    return []


EXPERIMENT = Experiment(
    name="fit_overhead",
    about="The cost of fit beyond a bare scan of the same updates.",
    settings=Settings,
    scales=SCALES,
    labels=("layout",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
