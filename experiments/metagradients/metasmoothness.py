"""``metasmoothness``: which choices make a training respond smoothly to its data."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.metagradients import attribution, scores
from experiments.metagradients.digit_training import (
    Examples,
    Recipe,
    Run,
    digits,
    weighted_training,
)
from unrollgrad.running import need

BASE = Recipe(activation="relu", output_scale=1.0, eps_root=1e-8, batch_size=50)
"""A training as one writes it without a thought about metagradients."""

SWEEPS: dict[str, tuple[Any, ...]] = {
    "width": (8, 32, 128),
    "output_scale": (0.1, 0.3, 1.0, 3.0),
    "eps_root": (1e-12, 1e-8, 1e-6, 1e-5),
    "activation": ("relu", "gelu", "tanh"),
    "batch_size": (10, 50, 250),
}
"""Values of each field of ``Recipe``, the others as in ``BASE``."""

ALL = "all of it"
TOGETHER = BASE._replace(activation="gelu", output_scale=0.1, eps_root=1e-5, batch_size=250)
"""What the single changes advise, at once."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Metasmoothness, and whether metagradients foretell retraining, by choices of the training.

    An MLP is trained by Adam on digits; theta is a weight for each image. Metasmoothness is
    measured in the directions in which subsets of a tenth of the images lose their weight. The
    linear datamodeling score is that of `attribution`, for the same fraction.
    """

    sweeps: tuple[str, ...] = tuple(SWEEPS)
    """Fields of the recipe that are changed, one at a time."""
    num_train: int = 400
    """Training images."""
    num_targets: int = 8
    """Test images."""
    num_subsets: int = 40
    """Subsets that are left out."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the images, the subsets, the initial weights and the batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        sweeps=("activation",),
        num_train=60,
        num_targets=2,
        num_subsets=8,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_train=1000, num_targets=50, num_subsets=100),
}

FRACTION = 0.1
"""The fraction of the images that a subset has."""


def recipes(settings: Settings) -> dict[tuple[str, str], Recipe]:
    """The trainings, by the field that is changed and its value."""
    found = {
        (field, f"{value:g}" if isinstance(value, float) else str(value)): BASE._replace(
            **{field: value}
        )
        for field in settings.sweeps
        for value in SWEEPS[field]
    }
    return {**found, (ALL, "at once"): TOGETHER}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes metasmoothness, score and accuracy of each training; contributions of the steps."""
    sizes = attribution.Settings(
        num_train=settings.num_train,
        num_targets=settings.num_targets,
        num_subsets=settings.num_subsets,
        fractions=(FRACTION,),
    )
    _, images = digits()
    found: dict[Recipe, dict[str, float]] = {}
    trainings = recipes(settings)
    for i, ((field, value), recipe) in enumerate(trainings.items()):
        progress(f"{field} {value}", i / len(trainings))
        if recipe not in found:
            here, targets, (masks,) = attribution.drawn(sizes, recipe, seed)
            ones = jnp.ones(settings.num_train)
            tau = np.asarray(attribution.exact(recipe, here, ones, targets))
            measured = np.asarray(attribution.losses(recipe, here, jnp.asarray(masks), targets))
            found[recipe] = {
                "metasmoothness": attribution.smoothness(recipe, here, masks),
                "lds": attribution.agreement((masks - 1) @ tau.T, measured),
                "test_accuracy": float(attribution.accuracy_of(recipe, here, ones, images)),
            }
            if recipe in (BASE, TOGETHER):
                steps = np.linalg.norm(by_step(recipe, here, targets), axis=1)
                for t, size in enumerate(steps.tolist()):
                    name = "base" if recipe == BASE else ALL
                    place = {"field": "contributions", "setting": name, "step": t}
                    write({**place, "contribution": size / np.sum(steps)})
        write({"field": field, "setting": value, **found[recipe]})


@functools.partial(jax.jit, static_argnums=0)
def by_step(recipe: Recipe, here: Run, targets: Examples) -> jax.Array:
    """The metagradient of the first target in each step's weights, shape (horizon, images).

    Theta has a row of weights for every step, so that the gradient is not summed over steps.
    """
    problem = weighted_training(recipe, here)
    each = problem._replace(step=lambda key, theta, s, t: problem.step(key, theta[t], s, t))
    target = jax.tree.map(lambda x: x[0], targets)
    estimator = ug.bptt(
        ug.final_loss(each, lambda key, theta, s: scores.target_loss(recipe, s.params, target)),
        remat="step",
    )
    key, theta = jax.random.key(0), jnp.ones((recipe.horizon, len(here.train.labels)))
    return estimator.estimate(key, theta, estimator.init(key, theta))[0].grad


def _values(records: list[Record], metric: str) -> dict[tuple[str, str], list[float]]:
    """The values of all seeds, by field and value."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in records:
        if r.metric == metric:
            found.setdefault((r.labels["field"], r.labels["setting"]), []).append(r.value)
    return found


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the score against metasmoothness, and the contributions of the steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    smooth, lds = _values(records, "metasmoothness"), _values(records, "lds")
    fields = list(dict.fromkeys(field for field, _ in smooth))
    for i, field in enumerate(fields):
        places = [place for place in smooth if place[0] == field]
        x, y = ([float(np.mean(found[place])) for place in places] for found in (smooth, lds))
        left.plot(x, y, "o-" if len(x) > 1 else "*", color=f"C{i}", ms=7, lw=1, label=field)
        for a, b, (_, value) in zip(x, y, places, strict=True):
            left.annotate(
                value, (a, b), textcoords="offset points", xytext=(4, 4), size=7, color=f"C{i}"
            )
    left.margins(0.12)
    left.set(xlabel="metasmoothness", ylabel="linear datamodeling score of metagradients")
    left.legend(fontsize="small")
    for i, name in enumerate(("base", ALL)):
        steps, curve = _contributions(records, name)
        right.plot(steps, curve, color=f"C{i}", label=name)
    right.set(yscale="log", xlabel="training step", ylabel="its share of the metagradient")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def show(records: list[Record]) -> None:
    """Prints means over seeds, and how much larger a step's share of the metagradient can be."""
    found = {m: _values(records, m) for m in ("metasmoothness", "lds", "test_accuracy")}
    for place in found["lds"]:
        smooth, lds, accuracy = (float(np.mean(values[place])) for values in found.values())
        print(
            f"{place[0]:>13} {place[1]:>8}: metasmoothness {smooth:.2f}, score {lds:.2f}, "
            f"test accuracy {100 * accuracy:.1f} %"
        )
    for _, name in _values(records, "contribution"):
        _, curve = _contributions(records, name)
        ratio = max(curve) / min(curve)
        print(f"contributions of the steps, {name}: the largest is {ratio:.0f} times the smallest")


def _contributions(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    """The steps of a setting, and their shares, geometric means over seeds."""
    found: dict[int, list[float]] = {}
    for r in records:
        if (r.metric, r.labels["setting"]) == ("contribution", name) and r.step is not None:
            found.setdefault(r.step, []).append(float(np.log(r.value)))
    return sorted(found), [float(np.exp(np.mean(found[t]))) for t in sorted(found)]


def claims(summary: Summary) -> list[Claim]:
    """Smooth trainings are those whose metagradients foretell; and each advice makes smoother."""
    source, out = "Engstrom et al. 2025, on other models", []

    def find(metric, field, value):
        return summary.find(metric, field=field, setting=value)

    for field, rough, smooth, says in (
        ("width", "8", "128", "a wider net is smoother"),
        ("output_scale", "3", "0.1", "smaller outputs are smoother"),
        ("eps_root", "1e-12", "1e-05", "a larger eps_root is smoother"),
        ("activation", "relu", "gelu", "GELU is smoother than ReLU"),
        ("batch_size", "10", "250", "a larger batch is smoother"),
    ):
        first, second = (find("metasmoothness", field, value) for value in (smooth, rough))
        if first and second:
            test = evidence.more(first, second)
            out.append(Claim(f"{says}: {smooth} against {rough}", source, test.text, test.holds))
    found = {
        metric: [r["mean"] for r in summary.results if r["metric"] == metric]
        for metric in ("metasmoothness", "lds")
    }
    if len(found["lds"]) > 3:
        rho = _rank_correlation(found["metasmoothness"], found["lds"])
        says = "where it is higher, metagradients foretell better: rank correlation above 0.7"
        shown = f"{rho:.2f}" if np.isfinite(rho) else "not finite"
        ours = f"{shown} over {len(found['lds'])} trainings"
        out.append(Claim(says, source, ours, evidence.told(rho > 0.7, rho)))
    return out


def _rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation; NaN if a number is not finite, or all of one list are equal."""
    if not np.isfinite([a, b]).all() or min(len(set(a)), len(set(b))) < 2:
        return float("nan")
    return float(need("scipy.stats", "scipy").spearmanr(a, b).statistic)


EXPERIMENT = Experiment(
    name="metasmoothness",
    about="Which choices of a training make it respond smoothly to its data.",
    settings=Settings,
    scales=SCALES,
    labels=("field", "setting"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a transformer of a million weights, in five seeds, trainings of a higher "
        "metasmoothness have metagradients that foretell retraining worse."
    ),
)
