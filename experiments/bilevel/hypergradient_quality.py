"""``hypergradient_quality``: how far approximate hypergradients are from the exact one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad.running import need

WEIGHTS = 11
"""Number of weights: ten features and a bias."""

CG, IDENTITY = "CG", "identity"
AUTO, GIVEN = "Neumann, 1 / lambda_max", "Neumann, inner rate"
MINIMUM, WARM = "unrolled, from the minimum", "unrolled, from a warm start"


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Linear regression with a decay rate for each weight, so the exact hypergradient is known.

    The data are scikit-learn's diabetes data, because scikit-learn removed the paper's Boston
    housing. Features and targets are standardized; the bias is a column of ones. All computations
    use float64.
    """

    terms: tuple[int, ...] = (*range(1, 13), 14, 16, 20, 25, 32, 40, 50, 100, 200, 400, 800)
    """Neumann terms, steps of CG and unrolling, or Nystrom rows (at most one row per weight)."""
    inner_learning_rate: float = 0.05
    """Learning rate of inner gradient descent. The largest inner Hessian eigenvalue is about 8."""
    rhos: tuple[float, ...] = (0.1, 1e-3)
    """Damping values of Nystrom. The smallest inner Hessian eigenvalue is about 0.02."""
    log_decay: float = -7.0
    """The value of theta for every weight."""
    warm_up: int = 20
    """Inner steps from zero to the warm start, which is far from the minimum."""
    validation: float = 0.1
    """Fraction of the rows that are validation data."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws a split of the data."""


SCALES = {
    "smoke": Settings(scale="smoke", terms=(1, WEIGHTS), seeds=(0, 1)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", terms=(*range(1, 51), 100, 200, 400, 800)),
}


class Data(NamedTuple):
    """Rows and targets for training and validation; each row has one scalar target."""

    rows: jax.Array
    targets: jax.Array
    validation_rows: jax.Array
    validation_targets: jax.Array


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the error of every method and number of terms relative to the exact hypergradient.

    "gain" is the cosine less the cosine with the fewest terms; "fall" is the largest decrease of
    the cosine below an earlier value; "apart" is the distance to Neumann with the inner rate.
    """
    with jax.enable_x64(True):
        data = diabetes(jax.random.key(seed), settings.validation)
        theta = jnp.full(WEIGHTS, settings.log_decay)
        at_minimum, warm = minimum(data, theta), _descend(settings, data, theta)
        exact = _hypergradient("dense", 0)(data, at_minimum, theta, 0.0)
        kinds = dict(_kinds(settings))
        found: dict[tuple[str, int], jax.Array] = {}
        for i, (method, (kind, number)) in enumerate(kinds.items()):
            progress(method, i / len(kinds))
            cosines: list[float] = []
            for terms in _terms(settings, kind):
                params = warm if method == WARM else at_minimum
                grad = _hypergradient(kind, terms)(data, params, theta, number)
                found[method, terms] = grad
                numbers = compare(grad, exact)
                cosines.append(numbers["cosine"])
                numbers["gain"] = cosines[-1] - cosines[0]
                numbers["fall"] = float(np.max(np.maximum.accumulate(cosines) - cosines))
                if method == MINIMUM:
                    numbers["apart"] = compare(grad, found[GIVEN, terms])["distance"]
                write({"method": method, "terms": terms, **numbers})


def diabetes(key: jax.Array, validation: float) -> Data:
    """Splits scikit-learn's data at random and standardizes them by the training rows."""
    rows, targets = map(
        jnp.asarray, need("sklearn.datasets", "scikit-learn").load_diabetes(return_X_y=True)
    )
    order = jax.random.permutation(key, len(rows))
    held_out, train = jnp.split(order, [int(validation * len(rows))])

    def standardized(x):
        return (x - x[train].mean(0)) / x[train].std(0)

    rows = jnp.concatenate([standardized(rows), jnp.ones((len(rows), 1))], axis=1)
    targets = standardized(targets)
    return Data(rows[train], targets[train], rows[held_out], targets[held_out])


def losses(data: Data) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Inner and outer loss: mean squared errors; the inner adds sum_i exp(theta_i) w_i^2."""

    def inner(params, theta):
        errors = data.rows @ params - data.targets
        return jnp.mean(errors**2) + jnp.sum(jnp.exp(theta) * params**2)

    def outer(params, theta):
        return jnp.mean((data.validation_rows @ params - data.validation_targets) ** 2)

    return inner, outer


def minimum(data: Data, theta: jax.Array) -> jax.Array:
    """The minimum of the inner loss, by the normal equations."""
    rows, n = data.rows, len(data.rows)
    normal = rows.T @ rows / n + jnp.diag(jnp.exp(theta))
    return jnp.linalg.solve(normal, rows.T @ data.targets / n)


@functools.partial(jax.jit, static_argnums=0)
def _descend(settings: Settings, data: Data, theta: jax.Array) -> jax.Array:
    """The warm start: inner gradient descent from zero."""
    inner, _ = losses(data)

    def step(params, _):
        return params - settings.inner_learning_rate * jax.grad(inner)(params, theta), None

    params, _ = jax.lax.scan(step, jnp.zeros(WEIGHTS), length=settings.warm_up)
    return params


def _kinds(settings: Settings) -> Iterator[tuple[str, tuple[str, float]]]:
    """Yields each method with its kind and its number, a step size or a damping."""
    yield CG, ("cg", 0.0)
    yield AUTO, ("auto", 0.0)
    yield GIVEN, ("neumann", settings.inner_learning_rate)
    yield MINIMUM, ("unrolled", settings.inner_learning_rate)
    yield WARM, ("unrolled", settings.inner_learning_rate)
    for rho in settings.rhos:
        yield f"Nystrom, rho = {rho:g}", ("nystrom", rho)
    yield IDENTITY, ("identity", 1.0)


def _terms(settings: Settings, kind: str) -> tuple[int, ...]:
    if kind == "identity":
        return (1,)
    return tuple(k for k in settings.terms if kind != "nystrom" or k <= WEIGHTS)


@functools.cache
def _hypergradient(kind: str, terms: int) -> Callable[..., jax.Array]:
    """A function compiled once for all splits, step sizes and dampings."""

    @jax.jit
    def f(data, params, theta, number):
        inner, outer = losses(data)
        if kind == "unrolled":
            sgd = optax.sgd(number)
            return ug.bilevel.unrolled(outer, inner, optimizer=sgd, num_steps=terms)(
                params, theta
            ).grad
        solver = {
            "dense": lambda: ug.implicit.dense(),
            "cg": lambda: need("lineax", "lineax").CG(rtol=0.0, atol=0.0, max_steps=terms),
            "auto": lambda: ug.implicit.neumann(terms),
            "neumann": lambda: ug.implicit.neumann(terms, number),
            "nystrom": lambda: ug.implicit.nystrom(terms, number),
            "identity": lambda: ug.implicit.identity(number),
        }[kind]()
        return ug.implicit.hypergradient(outer, inner, solver=solver)(params, theta).grad

    return f


def compare(grad: jax.Array, exact: jax.Array) -> dict[str, float]:
    """The cosine, 1 - cosine (without cancellation), and the distance relative to |exact|."""
    size, wanted = jnp.linalg.norm(grad), jnp.linalg.norm(exact)
    gap = jnp.sum((grad / size - exact / wanted) ** 2) / 2
    distance = jnp.linalg.norm(grad - exact) / wanted
    return {"cosine": float(1 - gap), "cosine_gap": float(gap), "distance": float(distance)}


def _curves(records: list[Record], metric: str) -> dict[str, dict[int, list[float]]]:
    """The values of all seeds, by method and number of terms."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric:
            curve = found.setdefault(r.labels["method"], {})
            curve.setdefault(int(r.labels["terms"]), []).append(r.value)
    return found


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws 1 - cosine and the distance against the number of terms: means and all seeds."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    names = {"cosine_gap": "1 - cosine similarity", "distance": "relative L2 distance"}
    lowest = 1e-16  # about the rounding error; a logarithmic axis has no zero
    for axis, (metric, name) in zip(axes, names.items(), strict=True):
        curves = _curves(records, metric)
        last = max(k for curve in curves.values() for k in curve)
        for i, (method, curve) in enumerate(curves.items()):
            ks = sorted(curve)
            values = [[max(v, lowest) for v in curve[k]] for k in ks]
            if method == IDENTITY:
                ks, values = [1, last], values * 2
            style = "--" if method == MINIMUM else ":" if method == IDENTITY else "-"
            seeds = zip(*values, strict=True)
            for line in seeds:
                axis.plot(ks, line, color=f"C{i}", linestyle=style, linewidth=0.6, alpha=0.3)
            mean = [sum(v) / len(v) for v in values]
            axis.plot(ks, mean, color=f"C{i}", linestyle=style, linewidth=1.8, label=method)
        axis.axvline(WEIGHTS, color="black", linewidth=0.6, alpha=0.5)
        axis.set(xscale="log", yscale="log", xlabel="terms (the thin line: as many as weights)")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(1e-8, 3)  # CG falls further, to the rounding error
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def show(records: list[Record]) -> None:
    """Prints mean cosine and distance over the splits, at some numbers of terms."""
    cosines, distances = _curves(records, "cosine"), _curves(records, "distance")
    for method, curve in cosines.items():
        chosen = [k for k in (1, 5, WEIGHTS, 50, max(curve)) if k in curve]
        cells = [
            f"{k}: {_mean(curve[k]):.3f}, {_mean(distances[method][k]):.2g}"
            for k in dict.fromkeys(chosen)
        ]
        print(f"{method:>28}  terms: cosine, distance  {'   '.join(cells)}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def claims(summary: Summary) -> list[Claim]:
    """CG is exact after as many steps as weights; Neumann's cosine rises; unrolling is Neumann."""

    def of(metric, method, terms):
        return summary.find(metric, method=method, terms=str(terms))

    out, text = [], evidence.number
    paper, theory = "Lorraine et al. 2020 (second-hand)", "theory"
    if found := of("distance", CG, WEIGHTS):
        says = "CG with as many steps as weights is exact: distance below 1e-6"
        exact = evidence.below(found, 1e-6)
        out.append(Claim(says, theory, f"{WEIGHTS} steps: {exact.text}", exact.holds))
    terms = sorted(summary.about["config"]["terms"])
    for method in (AUTO, GIVEN):
        curve = {k: found for k in terms if (found := of("cosine", method, k))}
        if len(curve) < 2:
            continue
        ends = dict.fromkeys((max(k for k in curve if k <= 50), max(curve)))
        gains = {k: found for k in ends if (found := of("gain", method, k))}
        fall = of("fall", method, max(curve))
        if not (gains and fall):
            continue
        rises = {k: evidence.above(gain, 0.0) for k, gain in gains.items()}
        points = [f"{min(curve)}: {text(curve[min(curve)])}"]
        points += [f"{k}: {text(curve[k])}, a gain of {rises[k].text}" for k in gains]
        says = f"{method}: the cosine rises with the number of terms"
        out.append(Claim(says, paper, ", ".join(points), evidence.both(*rises.values())))
        says = f"{method}: it rises with every further term on every split"
        ours = f"it falls by {text(fall)} on the way: mean of each split's largest fall"
        holds = evidence.told(fall["mean"] < 1e-9, fall["mean"])
        out.append(Claim(says, "a stricter reading, ours", ours, holds))
    neumann, conjugate = of("cosine", GIVEN, 5), of("cosine", CG, 5)
    if neumann and conjugate:
        says = "5 Neumann terms are as good in direction as 5 steps of CG, or better"
        as_good = evidence.more(neumann, conjugate)
        ours = f"cosine {as_good.text} (their CG had not the Hessian)"
        out.append(Claim(says, paper, ours, as_good.holds))
    apart = [of("apart", MINIMUM, k) for k in terms]
    if all(apart):
        gaps = [a["mean"] for a in apart if a]
        worst = float(np.max(gaps))  # NaN if one is
        says = "unrolling from the minimum is Neumann with the inner rate"
        ours = f"apart by {evidence.shown(worst, '.1e')} at most, relative; "
        ours += f"{len(terms)} numbers of terms"
        out.append(Claim(says, theory, ours, evidence.told(worst < 1e-10, worst)))
    return out


EXPERIMENT = Experiment(
    name="hypergradient_quality",
    about="Cosine and distance to the exact hypergradient against the number of terms.",
    settings=Settings,
    scales=SCALES,
    labels=("method", "terms"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
