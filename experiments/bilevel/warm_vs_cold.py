"""``warm_vs_cold``: which of many solutions a bilevel problem reaches (Vicol et al. 2022)."""

import dataclasses
import functools
import itertools
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
from experiments.bilevel.warm_vs_cold_figure import BOUND, chosen, draw
from experiments.problems.fourier import (
    TARGETS,
    Data,
    features,
    grid,
    one_in_each,
    one_point,
    one_point_data,
)
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Two regressions on a Fourier basis with more weights than data, in float64.

    "one point": theta is one synthetic point (x, y). The inner problem fits it, and the outer loss
    is the mean squared error on 5 real points. One real x is drawn from the middle half of each
    fifth of (-pi, pi). The synthetic x and y are initialized from a normal distribution of scale
    0.5. The inner solution is the one nearest to the initial weights; one gradient step finds it,
    up to ``damping``.

    "antidistillation": theta consists of 13 targets on a grid; there are 3 real points, one in each
    third of (-pi, pi). Many thetas have outer loss zero; the one nearest to the initial theta is
    pinv(M) y, where M maps theta to the predictions.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: more seeds."""
    targets: tuple[Literal["alternating", "normal"], ...] = ("alternating", "normal")
    """Real targets of "one point". alternating: -0.5 and 0.5 in turn plus normal noise of scale
    0.1, which one point trained from zero can hardly fit. normal: normal noise of scale 0.5."""
    frequencies: int = 10
    """Number N of frequencies in "one point"; it has 2 N + 1 weights."""
    adam_learning_rates: tuple[float, ...] = (0.05, 0.1)
    """Learning rates of the outer Adam of "one point", with optax's defaults otherwise."""
    gd_learning_rate: float = 1.0
    """Learning rate of gradient descent, a further outer optimizer of "one point"."""
    num_steps: int = 200_000
    """Outer steps of "one point". The losses after a quarter of them are written too: Adam's path
    is chaotic, and with the lower rate the warm start's loss is still falling there."""
    damping: float = 1e-4
    """The inner problem of "one point" also has the term damping / 2 |w - start|^2; the
    hypergradient is exact for this damped problem."""
    more_frequencies: int = 20
    """Number N of frequencies in "antidistillation"."""
    terms: tuple[int, ...] = (1, 5, 20, 200)
    """Neumann terms K, with alpha = 1 / lambda_max; each is compared with damping 1 / (alpha K)."""
    descent_steps: int = 2000
    """Outer steps of "antidistillation": gradient descent with rate 1 / (norm of its matrix)."""
    seeds: tuple[int, ...] = tuple(range(16))
    """Each seed draws the real points of both problems, and the initial synthetic point."""


SCALES = {
    "smoke": Settings(
        scale="smoke", adam_learning_rates=(0.1,), num_steps=1000, terms=(1, 20), seeds=(0, 1)
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", seeds=tuple(range(32))),
}

KEPT = 500
"""Number of thetas kept from a path of "one point" for re-training; every tenth is written."""
RANK = 1e-10
"""Singular values below this fraction of the largest count as zero."""

Ends = dict[tuple[str, str], tuple[jax.Array, jax.Array]]
"""The final theta and outer loss, by case and method."""


def fill(settings: Settings) -> Settings:
    """Checks the settings and returns them unchanged.

    Raises:
        ValueError: If ``num_steps`` is not a multiple of the number of thetas that are kept.
    """
    if settings.num_steps % KEPT or settings.num_steps < KEPT:
        raise ValueError(f"`num_steps` must be a multiple of {KEPT}; got {settings.num_steps}.")
    return settings


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the losses during each run of "one point", and the ends of "antidistillation"."""
    with jax.enable_x64(True):
        optimizers = [f"adam {rate:g}" for rate in settings.adam_learning_rates]
        optimizers.append(f"gd {settings.gd_learning_rate:g}")
        for i, name in enumerate(optimizers):
            progress(f"one point, {name}", i / (len(optimizers) + 1))
            _write_one_point(settings, name, jax.random.key(seed), write)
        progress("antidistillation", len(optimizers) / (len(optimizers) + 1))
        _write_antidistillation(settings, jax.random.key(seed), write)


class Paths(NamedTuple):
    """Outer losses of "one point".

    Attributes:
        cold: The losses with cold starts, after every step.
        warm: The losses with warm starts, after every step.
        again: The losses after training again from zero, for each kept theta of ``warm``.
    """

    cold: jax.Array
    warm: jax.Array
    again: jax.Array


@functools.lru_cache(maxsize=8)
def _descents(settings: Settings, name: str) -> Callable[[Data], Paths]:
    """The descents of "one point" on a batch of data sets, compiled once for all seeds."""
    kind, rate = name.split()
    optimizer = {"adam": optax.adam, "gd": optax.sgd}[kind](float(rate))

    def descend(data: Data) -> Paths:
        problem = one_point(data, settings.frequencies, settings.damping)
        zero = jnp.zeros(2 * settings.frequencies + 1)
        solved = {
            start: ug.bilevel.solve(
                problem.inner,
                problem.hypergradient,
                zero,
                data.theta,
                inner_optimizer=problem.optimizer,
                inner_steps=1,
                outer_optimizer=optimizer,
                num_steps=settings.num_steps,
                start=start,
                every=settings.num_steps // KEPT,
            )
            for start in ("cold", "warm")
        }

        def again(theta):
            grad = jax.grad(problem.inner)(zero, theta)
            step, _ = problem.optimizer.update(grad, problem.optimizer.init(zero))
            return problem.outer(optax.apply_updates(zero, step), theta)

        cold, warm = (solved[start].outer_losses for start in ("cold", "warm"))
        return Paths(cold, warm, jax.vmap(again)(solved["warm"].thetas))

    return jax.jit(jax.vmap(descend))


def _write_one_point(settings: Settings, name: str, key: jax.Array, write: Write) -> None:
    drawn = [one_point_data(kind, key) for kind in settings.targets]
    data = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    paths = jax.tree.map(np.asarray, _descents(settings, name)(data))
    every, last = settings.num_steps // KEPT, settings.num_steps // 10
    for i, kind in enumerate(settings.targets):
        labels = {"part": "one point", "case": f"{kind}, {name}"}
        cold, warm, again = (path[i] for path in paths)
        at = slice(every - 1, None, every)  # the same steps at which thetas are kept
        curves = {"cold": cold[at], "warm": warm[at], "re-trained": again}
        for method, curve in curves.items():
            for j in range(9, KEPT, 10):
                write({**labels, "method": method, "step": (j + 1) * every, "loss": curve[j]})
        ends = {
            "cold": cold[-last:].mean(),
            "warm": warm[-last:].mean(),
            "re-trained": again[-1],
            "re-trained, best": again.min(),
        }
        for method, end in ends.items():
            write({**labels, "method": method, "end": end, "over_cold": end / ends["cold"]})
        early, quarter = settings.num_steps // 40, settings.num_steps // 4
        ratio = warm[quarter - early : quarter].mean() / cold[quarter - early : quarter].mean()
        write({**labels, "method": "warm", "quarter_over_cold": ratio})
        below = ends["warm"] < BOUND * ends["cold"]
        for method in ("re-trained", "re-trained, best"):
            both = below and ends[method] > BOUND * ends["cold"]
            write({**labels, "method": method, "satisfied": float(both)})


def _write_antidistillation(settings: Settings, key: jax.Array, write: Write) -> None:
    keys = jax.random.split(key)
    x, y = one_in_each(keys[0], 3, 0.6), jax.random.normal(keys[1], (3,))
    part = {"part": "antidistillation"}
    for i in range(3):
        write({**part, "case": "real", "method": "real", "step": i, "x": x[i], "y": y[i]})
    nearest, ends = _displacements(settings)(x, y)
    ends = {**ends, ("minimum", "minimum"): (nearest, jnp.zeros(()))}
    norm = jnp.linalg.norm(nearest)
    distances = {k: jnp.linalg.norm(theta - nearest) / norm for k, (theta, _) in ends.items()}
    for (case, method), (theta, loss) in ends.items():
        labels = {**part, "case": case, "method": method}
        for i in range(TARGETS):
            write({**labels, "step": i, "target": theta[i]})
        write({**labels, "distance": distances[case, method], "loss": loss})
    for terms in settings.terms:
        case = f"K = {terms}"
        (neumann, _), (damped, _) = ends[case, "neumann"], ends[case, "damping"]
        gap = jnp.linalg.norm(neumann - damped)
        ratio = distances[case, "damping"] / distances[case, "neumann"]
        own = gap / jnp.linalg.norm(neumann)
        numbers = {"gap": gap / norm, "gap_own": own, "ratio": ratio}
        write({**part, "case": case, "method": "both", **numbers})


@functools.lru_cache(maxsize=1)
def _displacements(settings: Settings) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, Ends]]:
    """A function of real x and y: the theta nearest to zero, and the ends of all methods."""
    rows = features(grid(), settings.more_frequencies)
    zero, start = jnp.zeros(rows.shape[1]), jnp.zeros(TARGETS)
    hessian = rows.T @ rows
    inverse = jnp.linalg.pinv(hessian, rtol=RANK, hermitian=True)
    alpha = 1 / float(jnp.linalg.eigvalsh(hessian)[-1])
    newton = optax.stateless(lambda updates, params: -inverse @ jnp.asarray(updates))
    solvers: dict[tuple[str, str], tuple[Any, float]] = {
        ("pinv", "pinv"): (ug.implicit.dense(RANK), 0.0)
    }
    for terms in settings.terms:
        case, damping = f"K = {terms}", 1 / (alpha * terms)
        solvers[case, "neumann"] = ug.implicit.neumann(terms, alpha), 0.0
        solvers[case, "damping"] = need("lineax", "lineax").CG(1e-12, 1e-12, max_steps=200), damping

    @jax.jit
    def displacements(x, y):
        real = features(x, settings.more_frequencies)

        def inner(w, theta):
            return jnp.sum((rows @ w - theta) ** 2) / 2

        def outer(w, theta):
            return jnp.mean((real @ w - y) ** 2)

        def descend(solver, damping):
            f = ug.implicit.hypergradient(outer, inner, solver=solver, damping=damping)

            def slope(theta):
                return f(inverse @ rows.T @ theta, theta).grad

            matrix = jax.vmap(slope)(jnp.eye(TARGETS)) - slope(start)  # slope is affine in theta
            result = ug.bilevel.solve(
                inner,
                f,
                zero,
                start,
                inner_optimizer=newton,
                inner_steps=1,
                outer_optimizer=optax.sgd(1 / jnp.linalg.norm(matrix, 2)),
                num_steps=settings.descent_steps,
                start="cold",
                every=settings.descent_steps,
            )
            return result.theta, result.outer_losses[-1]

        nearest = jnp.linalg.pinv(real @ inverse @ rows.T) @ y
        ends = [descend(solver, damping) for solver, damping in solvers.values()]
        return nearest, ends

    def named(x, y):
        nearest, ends = displacements(x, y)
        return nearest, dict(zip(solvers, ends, strict=True))

    return named


def show(records: list[Record]) -> None:
    """Prints the outer losses of "one point" for every seed, and the mean distances."""
    ends = chosen(records, "one point", "end")
    for case, method in ends:
        values = "  ".join(f"{v:.3f}" for v in ends[case, method].values())
        print(f"{case:>22} {method:>17}  outer loss, by seed: {values}")
    found = {m: chosen(records, "antidistillation", m) for m in ("distance", "gap", "ratio")}
    for (case, method), values in found["distance"].items():
        print(f"{case:>22} {method:>17}  distance {np.mean(list(values.values())):.4f}")
    for series, values in found["gap"].items():
        gap, ratio = (np.mean(list(v.values())) for v in (values, found["ratio"][series]))
        print(f"{series[0]:>22} {'both':>17}  gap {gap:.3f}, ratio of distances {ratio:.2f}")


def claims(summary: Summary) -> list[Claim]:
    """Warm starts store more in the weights than in theta; few terms reach another solution."""
    text = evidence.number
    ends = [r for r in summary.results if r["metric"] == "over_cold" and r["method"] == "warm"]
    out = [_of_one_point(summary, r["case"]) for r in ends]
    cases = {r["case"]: r for r in summary.results if r["metric"] == "gap"}
    source = "Vicol et al. 2022; filters of Neumann and damping"
    for case, gap in cases.items():
        where = {"part": "antidistillation", "case": case}
        neumann, damped, ratio, own = (
            summary.find(metric, **where, method=method)
            for metric, method in (
                ("distance", "neumann"),
                ("distance", "damping"),
                ("ratio", "both"),
                ("gap_own", "both"),
            )
        )
        near = evidence.below(gap, 0.2)
        ours = (
            f"|neumann - damped| is {near.text} of |nearest|, {text(own)} of |neumann|; "
            f"distances {text(neumann)} and {text(damped)}, their ratio {text(ratio)}"
        )
        says = f"{case}: Neumann and damping 1 / (alpha K) land within 20 % of |nearest solution|"
        out.append(Claim(says, source, ours, near.holds))
    for method in ("neumann", "damping"):
        means = [
            (case, summary.find("distance", part="antidistillation", case=case, method=method))
            for case in cases
        ]
        falls = [evidence.less(b, a) for (_, a), (_, b) in itertools.pairwise(means)]
        ours = ", ".join(f"{case}: {text(found)}" for case, found in means)
        says = f"{method}: the distance to the nearest solution falls with K"
        out.append(Claim(says, source, ours, evidence.both(*falls) if falls else None))
    pinv = summary.find("distance", part="antidistillation", case="pinv", method="pinv")
    if pinv:
        says = "the pseudo-inverse ends at the nearest solution"
        nearest = evidence.below(pinv, 1e-3)
        out.append(Claim(says, source, f"distance {nearest.text}", nearest.holds))
    losses = [
        r["mean"]
        for r in summary.results
        if r["part"] == "antidistillation" and r["metric"] == "loss"
    ]
    if losses:
        says = "all of them reach outer loss zero"
        largest = float(np.max(losses))  # NaN if one is
        ours, holds = f"at most {evidence.shown(largest, '.1e')}", largest < 1e-12
        out.append(Claim(says, source, ours, evidence.told(holds, largest)))
    return out


def _of_one_point(summary: Summary, case: str) -> Claim:
    """The claim of a case: means over the seeds, in multiples of cold's."""
    where = {"part": "one point", "case": case}
    text, parts, ratios, counts = evidence.number, [], {}, []
    for method in ("cold", "warm", "re-trained", "re-trained, best"):
        end, over, hit = (
            summary.find(metric, **where, method=method)
            for metric in ("end", "over_cold", "satisfied")
        )
        parts.append(f"{method} {text(end)}" + (f" ({text(over)} x)" if method != "cold" else ""))
        ratios[method] = over
        if hit:
            counts.append(f"{evidence.shown(hit['mean'] * hit['n'], '.0f')} of {hit['n']}")
    quarter = summary.find("quarter_over_cold", **where, method="warm")
    parts.append(f"warm after a quarter of the steps {text(quarter)} x")
    parts.append(f"both in {counts[0]} seeds, with the path's best theta in {counts[1]}")
    ours, source = "; ".join(parts), "Vicol et al. 2022"
    if " gd " in case:
        says = f"{case}: plain descent freezes, warm does not end below {BOUND} x cold"
        return Claim(says, source, ours, evidence.above(ratios["warm"], BOUND).holds)
    says = (
        f"{case}: warm ends below {BOUND} x cold, training again from zero with its last theta "
        "does not (means over seeds)"
    )
    stores = evidence.below(ratios["warm"], BOUND), evidence.above(ratios["re-trained"], BOUND)
    return Claim(says, source, ours, evidence.both(*stores))


EXPERIMENT = Experiment(
    name="warm_vs_cold",
    about="Warm and cold starts, exact and few-term hypergradients: which solution it is.",
    settings=Settings,
    scales=SCALES,
    labels=("part", "case", "method"),
    fill=fill,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
