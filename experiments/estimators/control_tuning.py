"""``control_tuning``: the sigma and the learning rate of each method of ``control``."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._framework import curves, tuning
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.estimators import control
from unrollgrad.diagnostics.styles import styles
from unrollgrad.running import need
from unrollgrad.types import Key


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Try every sigma with every learning rate for each method of `control`: which suits it best?

    Every method has the same runs, an update of each costs what it costs in `control`, and the best
    pair is the one with the highest mean return along its runs: it is both quick and good. The
    seeds are not those that `control` reports. `control.TUNED` has what was found.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the pairs of NRES's figures."""
    env: Literal["swimmer", "half_cheetah", "cart_pole"] = "swimmer"
    """What is controlled; see `control`."""
    estimators: tuple[control.Name, ...] = control.Settings().estimators
    """The methods."""
    sigmas: tuple[float, ...] = ()
    """Standard deviations of the perturbation. Default: three by env."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of SGD. Default: by env."""
    horizon: int = 0
    """Environment steps in an episode. Default (0, as below): by env, as in `control`."""
    truncation: int = 0
    """Environment steps in a window. Default: by env."""
    num_pairs: int = 0
    """Antithetic pairs, a multiple of the windows in an episode. Default: by env."""
    num_steps: int = 0
    """Updates of a run. Default: by env, fewer than in `control`, and two episodes or more."""
    points: int = 4
    """Number of points of a run, a divisor of its updates; it measures the return at each."""
    num_episodes: int = 3
    """Held-out episodes on which the return is measured."""
    seeds: tuple[int, ...] = (101, 103)
    """Each seed is a run with every sigma and rate."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        env="cart_pole",
        estimators=("full_es", "nres"),
        sigmas=(1.0, 3.0),
        learning_rates=(3.0, 30.0),
        num_steps=4,
        points=2,
        seeds=(101,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=200, num_episodes=32),
}


class Grid(NamedTuple):
    """What is tried in an environment.

    Attributes:
        sigmas: The standard deviations of the perturbation.
        learning_rates: The learning rates of SGD.
        num_steps: Updates of a run.
    """

    sigmas: tuple[float, ...]
    learning_rates: tuple[float, ...]
    num_steps: int


GRIDS = {
    "swimmer": Grid((0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 60),
    "half_cheetah": Grid((0.004, 0.01, 0.03), (3e-5, 1e-4, 3e-4, 1e-3), 100),
    "cart_pole": Grid((1.0, 3.0, 10.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0), 100),
}
"""What is tried by environment; the published sigmas and most published rates are among them."""


def filled(settings: Settings) -> Settings:
    """Fills in the defaults of the environment.

    Raises:
        ValueError: If the points do not divide the updates, or as in ``control``.
    """
    sizes = _as_control(settings)
    usual = GRIDS[settings.env]._asdict()
    usual |= {name: getattr(sizes, name) for name in ("horizon", "truncation", "num_pairs")}
    unset: dict[str, Any] = {
        name: value for name, value in usual.items() if not getattr(settings, name)
    }
    settings = dataclasses.replace(settings, **unset)
    if settings.num_steps % settings.points:
        raise ValueError(
            f"`--num-steps` must be a multiple of the {settings.points} points; "
            f"got {settings.num_steps}."
        )
    return settings


SHARED = ("scale", "env", "horizon", "truncation", "num_pairs", "num_episodes")
"""Settings that ``control`` has, too."""


def _as_control(settings: Settings) -> control.Settings:
    return control.sized(control.Settings(**{k: getattr(settings, k) for k in SHARED}))


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the return of each method's run with every sigma and rate."""
    settings = settings.without_run()
    cases = list(itertools.product(settings.sigmas, settings.learning_rates))
    for i, name in enumerate(settings.estimators):
        progress(name, i / len(settings.estimators))
        found = np.asarray(returns(settings, name, jnp.array(cases), jax.random.key(seed)))
        for (sigma, rate), line in zip(cases, found, strict=True):
            numbers = {"mean_return": line.mean(), "return": line[-1]}
            write({"estimator": name, "sigma": sigma, "rate": rate, **numbers})


@functools.partial(jax.jit, static_argnums=(0, 1))
def returns(settings: Settings, name: str, cases: jax.Array, key: Key) -> jax.Array:
    """The returns along a run with each (sigma, rate); all runs have the same keys."""
    sizes = _as_control(settings)
    problem, begin = control.example(sizes).problem, control.initial(sizes, key)
    every = settings.num_steps // settings.points

    def one(case):
        sigma, rate = case
        estimator, steps = control.method(sizes, problem, name, sigma), (settings.num_steps, every)
        thetas = tuning.trajectory(estimator, optax.sgd(rate), key, begin, *steps)
        return jax.vmap(lambda x: control.mean_return(sizes, problem, TESTED, x))(thetas[1:])

    return jax.vmap(one)(cases)


TESTED = 1_000_000
"""The seed of the key of the episodes that choose; those of ``control`` are others."""


class Choice(NamedTuple):
    """The pair that suits a method best.

    Attributes:
        sigma: The standard deviation of the perturbation.
        rate: The learning rate of SGD.
        mean_return: The mean return along its runs, over the seeds.
        at_edge: Whether the grid has no larger or no smaller sigma, or rate for this sigma.
    """

    sigma: float
    rate: float
    mean_return: float
    at_edge: bool


def best(records: list[Record]) -> dict[str, Choice]:
    """Each method's best pair; one that diverged in a seed, or is not finite, counts as the worst.

    Args:
        records: The table of a run.
    """
    found = {}
    for name, grid in means(records).items():
        sigma, rate = max(grid, key=lambda case: grid[case])
        sigmas, rates = (sorted(set(x)) for x in ([s for s, _ in grid], _rates(grid, sigma)))
        at_edge = sigma in (sigmas[0], sigmas[-1]) or rate in (rates[0], rates[-1])
        found[name] = Choice(sigma, rate, grid[sigma, rate], at_edge)
    return found


def means(records: list[Record]) -> dict[str, dict[tuple[float, float], float]]:
    """The mean return over the seeds by method and (sigma, rate), -inf if it is not finite."""
    found: dict[str, dict[tuple[float, float], list[float]]] = {}
    for r in records:
        if r.metric == "mean_return":
            case = float(r.labels["sigma"]), float(r.labels["rate"])
            found.setdefault(r.labels["estimator"], {}).setdefault(case, []).append(r.value)
    return {
        name: {case: _mean(values) for case, values in grid.items()} for name, grid in found.items()
    }


def _mean(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return mean if np.isfinite(mean) else -np.inf


def _rates(grid: dict[tuple[float, float], float], sigma: float) -> list[float]:
    return [rate for at, rate in grid if at == sigma]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws a panel for each method: the mean return against the rate, by sigma."""
    found, chosen = means(records), best(records)
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(3 * len(found) + 1, 3.5), layout="constrained"
    )
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    looks = list(styles([str(sigma) for sigma in config["sigmas"]]).values())
    floor = _floor([choice.mean_return for choice in chosen.values()])
    for axis, (name, grid) in zip(axes, found.items(), strict=True):
        for sigma, look in zip(config["sigmas"], looks, strict=True):
            rates = _rates(grid, sigma)
            line = np.maximum([grid[sigma, rate] for rate in rates], floor)
            label = f"sigma {sigma:g}"
            axis.plot(rates, line, look.dash, marker=look.marker, color=look.color, label=label)
        ring = {"mfc": "none", "mec": "black", "ms": 13, "ls": "none", "label": "best"}
        axis.plot(chosen[name].rate, max(chosen[name].mean_return, floor), "o", **ring)
        axis.set(xscale="log", title=name, xlabel="learning rate")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"mean return along a run,\nor {floor:.3g} if it is lower")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{config['env']}: {curves.seeds_of(records, 'mean of')}")
    return figure


def _floor(best_returns: list[float]) -> float:
    """A return below which a picture does not tell how bad a run was."""
    known = [x for x in best_returns if np.isfinite(x)] or [0.0]
    return min(known) - max(max(known) - min(known), abs(max(known))) / 2


def show(records: list[Record]) -> None:
    """Prints the best pair of every method."""
    for name, choice in best(records).items():
        edge = " (at the grid's edge)" if choice.at_edge else ""
        pair = f"sigma {choice.sigma:g}, rate {choice.rate:g}"
        print(f"{name:>16}  {pair}: mean return {choice.mean_return:.3g}{edge}")


def claims(summary: Summary) -> list[Claim]:
    """It claims nothing: it chooses what ``control`` compares."""
    return []


EXPERIMENT = Experiment(
    name="control_tuning",
    about="Sigma and learning rate of every method of control, on seeds that it does not report.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator", "sigma", "rate"),
    fill=filled,
    title=lambda settings: f"control_tuning-{settings.env}",
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "It makes no claim; a pair between or beyond the grid's points that raises the mean return "
        "of a method of `control` by a tenth in ten fresh seeds (p < 0.05) would replace its pair."
    ),
)
