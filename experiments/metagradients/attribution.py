"""``attribution``: how well four scores foretell training without some of the images."""

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
from experiments.metagradients import scores
from experiments.metagradients.digit_training import (
    Examples,
    Recipe,
    Run,
    accuracy,
    digits,
    draw_run,
    path,
    trained,
    weighted_training,
)
from unrollgrad.running import need

MLP, CONV, ROUGH = "MLP, smooth", "conv net, smooth", "MLP, rough"
EXACT, INFLUENCE, TRACIN, COSINE = "metagradient", "influence function", "TracIn", "gradient cosine"
BASELINES = (INFLUENCE, TRACIN, COSINE)

RECIPES = {
    MLP: Recipe(activation="tanh", width=64),
    CONV: Recipe(net="conv", width=16, batch_size=100, output_scale=1.0, eps_root=1e-6),
    ROUGH: Recipe(activation="relu", output_scale=1.0, eps_root=1e-12, batch_size=20),
}


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The linear datamodeling score of metagradients and of three baselines.

    A net is trained on digits once with all training images, and again without random subsets of
    them, each time from the same initial weights with the same batches, in which the images that
    are left out have weight 0. A score of the images foretells the loss of a test image without a
    subset: minus the sum of the scores of the images that are left out. The linear datamodeling
    score is Spearman's rank correlation, over the subsets, of what it foretells and what is
    measured; the mean over test images.

    Influence functions and TracIn get the damping and the checkpoints with which their score is
    highest in each seed, which they could not know in practice.
    """

    cases: tuple[str, ...] = tuple(RECIPES)
    """Nets and how they are trained, by name."""
    num_train: int = 400
    """Training images."""
    num_targets: int = 16
    """Test images."""
    num_subsets: int = 100
    """Subsets that are left out, for each fraction."""
    fractions: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Fractions of the training images that are left out. The claims are about the second."""
    dampings: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    """Candidates for the damping of the influence functions."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the images, the subsets, the initial weights and the batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        cases=(MLP,),
        num_train=60,
        num_targets=2,
        num_subsets=20,
        fractions=(0.02, 0.1),
        dampings=(1e-3,),
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_train=1000, num_targets=100, seeds=tuple(range(10))),
}

CHECKPOINTS = {"last": 1, "ten": 10}
"""Numbers of checkpoints for TracIn, evenly over the training."""

DIRECTIONS = 4
"""Subsets whose images metasmoothness takes out, half of their weight and then the rest."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the score of every method, case and fraction, metasmoothness and test accuracy."""
    for i, case in enumerate(settings.cases):
        recipe = RECIPES[case]
        begin = i / len(settings.cases)
        progress(case, begin)
        here, targets, masks = drawn(settings, recipe, seed)
        ones = jnp.ones(settings.num_train)
        foretold = _foretold(settings, recipe, here, targets)
        progress(f"{case}, subsets", begin + 0.5 / len(settings.cases))
        _, images = digits()
        numbers = {
            "test_accuracy": float(accuracy_of(recipe, here, ones, images)),
            "metasmoothness": smoothness(recipe, here, masks[1]),
        }
        write({"case": case, "method": "training", "fraction": "", **numbers})
        for fraction, some in zip(settings.fractions, masks, strict=True):
            measured = np.asarray(losses(recipe, here, jnp.asarray(some), targets))
            for method, candidates in foretold.items():
                found = [agreement((some - 1) @ tau.T, measured) for tau in candidates]
                place = {"case": case, "method": method, "fraction": f"{fraction:g}"}
                write({**place, "lds": max(found)})


def drawn(settings: Settings, recipe: Recipe, seed: int) -> tuple[Run, Examples, np.ndarray]:
    """The training run, the test images, and the weights without each subset."""
    rng, (first, second) = np.random.default_rng(seed), digits()
    rows = rng.permutation(len(first.labels))[: settings.num_train]
    train = jax.tree.map(lambda x: x[rows], first)
    rows = rng.permutation(len(second.labels))[: settings.num_targets]
    targets = jax.tree.map(lambda x: x[rows, None], second)
    masks = [
        [_without(rng, settings.num_train, fraction) for _ in range(settings.num_subsets)]
        for fraction in settings.fractions
    ]
    return draw_run(recipe, train, jax.random.key(seed)), targets, np.array(masks)


def _without(rng: np.random.Generator, size: int, fraction: float) -> np.ndarray:
    """Weights that are 0 for a random subset and 1 for the rest."""
    out = np.ones(size, np.float32)
    out[rng.permutation(size)[: round(fraction * size)]] = 0
    return out


def _foretold(
    settings: Settings, recipe: Recipe, here: Run, targets: Examples
) -> dict[str, list[np.ndarray]]:
    """The scores of the training images for each test image; of the baselines some candidates."""
    ones = jnp.ones(settings.num_train)
    nets = _path(recipe, here, ones)
    places = {
        name: np.linspace(0, recipe.horizon, n + 1).astype(int)[1:]
        for name, n in CHECKPOINTS.items()
    }
    pairs = {
        t: _dots(recipe, jax.tree.map(lambda x, t=t: x[t], nets), here.train, targets)
        for t in {t for some in places.values() for t in some.tolist()}
    }
    return {
        EXACT: [np.asarray(exact(recipe, here, ones, targets))],
        INFLUENCE: [
            np.asarray(_influence(recipe, here, ones, targets, damping))
            for damping in settings.dampings
        ],
        TRACIN: [np.sum([pairs[t][0] for t in some.tolist()], axis=0) for some in places.values()],
        COSINE: [np.asarray(pairs[recipe.horizon][1])],
    }


exact = jax.jit(scores.exact, static_argnums=0)
_influence = jax.jit(scores.influence, static_argnums=0)
_dots = jax.jit(scores.dots, static_argnums=0)
_path = jax.jit(path, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def losses(recipe: Recipe, here: Run, weights: jax.Array, targets: Examples) -> jax.Array:
    """The loss of each target after training with each row of weights: one program for all."""

    def of(weights):
        params = trained(recipe, here, weights)
        return jax.vmap(lambda target: scores.target_loss(recipe, params, target))(targets)

    return jax.vmap(of)(weights)


@functools.partial(jax.jit, static_argnums=0)
def accuracy_of(recipe: Recipe, here: Run, weights: jax.Array, images: Examples) -> jax.Array:
    """The accuracy on other images after training with these weights."""
    return accuracy(recipe, trained(recipe, here, weights), images)


def smoothness(recipe: Recipe, here: Run, masks: np.ndarray) -> float:
    """The mean metasmoothness in the directions in which subsets lose their weight."""
    problem, ones = weighted_training(recipe, here), jnp.ones(masks.shape[1])
    measure = functools.partial(ug.diagnostics.metasmoothness, problem, ones, key=jax.random.key(0))
    found = [measure(jnp.asarray(mask - 1), 0.5).smoothness for mask in masks[:DIRECTIONS]]
    return float(np.mean(found))


def agreement(foretold: np.ndarray, measured: np.ndarray) -> float:
    """Spearman's rank correlation over subsets, the mean over targets; shapes (subsets, targets).

    It is 0 for a target whose prediction or measurement is constant.
    """
    rank = need("scipy.stats", "scipy").rankdata
    first, second = (rank(x, axis=0) - (len(x) + 1) / 2 for x in (foretold, measured))
    sizes = np.sqrt(np.sum(first**2, 0) * np.sum(second**2, 0))
    products = np.sum(first * second, 0)
    return float(np.mean(np.divide(products, sizes, out=np.zeros_like(sizes), where=sizes > 0)))


def _values(records: list[Record], case: str, method: str, metric: str) -> dict[str, list[float]]:
    """The values of all seeds by fraction."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.labels["case"] == case and r.labels["method"] == method and r.metric == metric:
            found.setdefault(r.labels["fraction"], []).append(r.value)
    return found


def _mean_and_se(values: list[float]) -> tuple[float, float]:
    se = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), float(se)


def _cases(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r.labels["case"] for r in records))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the score against the fraction that is left out, an axis for each case."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4.2), layout="constrained")
    cases = _cases(records)
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    places = [100 * fraction for fraction in config["fractions"]]
    for axis, case in zip(axes, cases, strict=True):
        for i, method in enumerate((EXACT, *BASELINES)):
            found = _values(records, case, method, "lds")
            means, errors = zip(*(_mean_and_se(values) for values in found.values()), strict=True)
            axis.errorbar(
                places[: len(means)], means, errors, color=f"C{i}", marker="osv^"[i], label=method
            )
        smooth = _values(records, case, "training", "metasmoothness")[""]
        axis.set_title(f"{case}: metasmoothness {np.mean(smooth):.2f}")
        axis.set(xscale="log", xlabel="images left out, %")
        axis.set_xticks(places, [f"{x:g}" for x in places])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="linear datamodeling score", ylim=(min(0, axes[0].get_ylim()[0]), 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def show(records: list[Record]) -> None:
    """Prints metasmoothness, accuracy, and the scores by fraction, means over seeds."""
    for case in _cases(records):
        numbers = {
            metric: _mean_and_se(_values(records, case, "training", metric)[""])[0]
            for metric in ("metasmoothness", "test_accuracy")
        }
        print(
            f"{case}: metasmoothness {numbers['metasmoothness']:.3f}, "
            f"test accuracy {100 * numbers['test_accuracy']:.1f} %"
        )
        for method in (EXACT, *BASELINES):
            found = _values(records, case, method, "lds")
            cells = []
            for fraction, values in found.items():
                mean, se = _mean_and_se(values)
                cells.append(f"{100 * float(fraction):g} % out: {mean:.3f} ± {se:.3f}")
            print(f"{method:>20}  {'   '.join(cells)}")


def claims(summary: Summary) -> list[Claim]:
    """The score of metagradients is above 0.95 and above the baselines; it falls with roughness."""
    source = "Ilyas and Engstrom 2025 (MAGIC), on other models"
    fraction = f"{summary.about['config']['fractions'][1]:g}"
    out = []

    def lds(case, method):
        return summary.find("lds", case=case, method=method, fraction=fraction)

    share = f"{100 * float(fraction):g} %"
    for case in (MLP, CONV):
        if not (found := lds(case, EXACT)):
            continue
        high = evidence.above(found, 0.95)
        says = f"{case}: with {share} left out, the score of metagradients is above 0.95"
        out.append(Claim(says, source, high.text, high.holds))
        tests = {name: evidence.more(found, lds(case, name)) for name in BASELINES}
        ours = "; ".join(f"{name}: {test.text}" for name, test in tests.items())
        says = f"{case}: it is above the scores of {', '.join(BASELINES)}"
        out.append(Claim(says, source, ours, evidence.both(*tests.values())))
    if found := lds(ROUGH, EXACT):
        falls = evidence.less(found, lds(MLP, EXACT), 0.5)
        place = {"method": "training", "fraction": ""}
        rough, smooth = (
            summary.find("metasmoothness", case=case, **place) for case in (ROUGH, MLP)
        )
        lower = evidence.less(rough, smooth)
        says = "where metasmoothness is low, the score of metagradients is less than half as high"
        ours = f"score {falls.text}; metasmoothness {lower.text}"
        source = "Engstrom et al. 2025"
        out.append(Claim(says, source, ours, evidence.both(falls, lower)))
    return out


EXPERIMENT = Experiment(
    name="attribution",
    about="How well metagradients, influence functions, TracIn and cosines foretell retraining.",
    settings=Settings,
    scales=SCALES,
    labels=("case", "method", "fraction"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a network of a million weights whose training is smooth, in five seeds, influence "
        "functions with a curvature of any kind foretell retraining as well as metagradients."
    ),
)
