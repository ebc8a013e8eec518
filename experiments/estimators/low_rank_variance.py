"""``low_rank_variance``: the variance of low-rank noise, against closed forms and dense noise."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import PROBLEMS
from unrollgrad.noise import Noise
from unrollgrad.running import need
from unrollgrad.types import Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """How much variance do thin factors cost, or save?

    full_es estimates the gradient from one antithetic pair per episode, at theta's first value.
    The number is the trace of the variance of an estimate, over dim(theta) times the squared norm
    of the gradient: about 1 with dense noise on a linear loss. On the linear loss all episodes are
    alike, and the variance has a closed form. The real losses are those of training tasks, whose
    episodes differ, too.
    """

    problems: tuple[Literal["linear", "learned_optimizer", "copy_task"], ...] = (
        "linear",
        "learned_optimizer",
        "copy_task",
    )
    """linear: a loss that is linear in two small matrices and a vector. learned_optimizer: a
    network that trains another; copy_task: an LSTM. There theta is all weights."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """The columns of a factor."""
    horizon: int = 16
    """Inner steps of the real losses."""
    num_samples: int = 20_000
    """Estimates on the linear loss."""
    num_samples_real: int = 2_000
    """Estimates on the real losses."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("linear", "copy_task"),
        ranks=(1,),
        horizon=4,
        num_samples=1000,
        num_samples_real=100,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", horizon=100, num_samples=200_000, num_samples_real=100_000),
}

SIGMA = {"linear": 1.0, "learned_optimizer": 0.01, "copy_task": 0.05}
"""Small values on the real losses; on the linear one sigma changes nothing."""

LEAVES = {"square": (12, 12), "long": (6, 20), "vector": (10,)}
"""Theta of the linear loss."""

AT_ONCE = 50
"""Estimates that run side by side."""

THEORY = "closed form, docs of noise.low_rank"


def laws(ranks: tuple[int, ...]) -> dict[str, Noise]:
    """Dense noise, and low-rank noise in every matrix, by name."""
    out = {"gaussian": ug.noise.gaussian(), "signs": ug.noise.rademacher()}
    for factors, name in (("gaussian", "gaussian"), ("sign", "signs")):
        for rank in ranks:
            out[f"{name}, rank {rank}"] = ug.noise.low_rank(rank, factors, dense_below=0)
    return out


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the variance with every law, and its closed form where there is one."""
    names: tuple[str, ...] = settings.problems
    for i, problem in enumerate(names):
        measured, found = _samplers(settings.without_run(), problem), {}
        for j, (name, sampler) in enumerate(measured.items()):
            progress(f"{problem}: {name}", (i + j / len(measured)) / len(names))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j)
            found[name] = [np.asarray(x, np.float64) for x in sampler(key)]
        square = _square(settings, problem, [mean for mean, _ in found.values()])
        exact = closed_forms(settings.ranks) if problem == "linear" else {}
        for name, (mean, variance) in found.items():
            numbers = {"variance": variance / square / mean.size, "norm": np.sqrt(square)}
            if name in exact:
                numbers["exact"] = exact[name]
            write({"problem": problem, "law": name, **numbers})


def _square(settings: Settings, problem: str, means: list[np.ndarray]) -> float:
    """The squared norm of the gradient: known, or from all laws' independent means in pairs."""
    if problem == "linear":
        return float(sum(np.sum(np.square(g)) for g in gradient().values()))
    total, alone = np.sum(means, axis=0), sum(np.sum(np.square(m)) for m in means)
    return float((np.sum(np.square(total)) - alone) / (len(means) * (len(means) - 1)))


@functools.lru_cache(maxsize=4)
def _samplers(
    settings: Settings, name: str
) -> dict[str, Callable[[Key], tuple[jax.Array, jax.Array]]]:
    """For each law a compiled function: the mean of many estimates, and the trace of variance."""
    problem, theta = linear() if name == "linear" else PROBLEMS[name].make(settings.horizon)[:2]
    count = settings.num_samples if name == "linear" else settings.num_samples_real

    def sampler(law):
        es = ug.full_es(problem, sigma=SIGMA[name], noise=law)

        def one(key):
            estimate, _ = es.estimate(key, theta, es.init(key, theta))
            return jnp.concatenate([g.ravel() for g in jax.tree.leaves(estimate.grad)])

        @jax.jit
        def sample(key):
            def some(total, key):
                grads = jax.vmap(one)(jax.random.split(key, AT_ONCE))
                own = grads.mean(axis=0)
                within = jnp.sum(jnp.square(grads - own))
                return (total[0] + own, total[1] + within), None

            size, times = sum(x.size for x in jax.tree.leaves(theta)), count // AT_ONCE
            begin = jnp.zeros(size), jnp.zeros(())
            (mean, within), _ = jax.lax.scan(some, begin, jax.random.split(key, times))
            return mean / times, within / (times * (AT_ONCE - 1))

        return sample

    return {name: sampler(law) for name, law in laws(settings.ranks).items()}


def gradient() -> dict[str, np.ndarray]:
    """The gradient of the linear loss."""
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in LEAVES.items()}


def linear() -> tuple[ug.UnrolledProblem, Theta]:
    """A loss that is linear in theta, computed by products with it."""
    g = gradient()

    def step(key, theta, state, t):
        products = [jnp.sum((jnp.eye(len(g[k])) @ theta[k]) * g[k]) for k in ("square", "long")]
        return state, sum(products) + g["vector"] @ theta["vector"]

    theta = jax.tree.map(jnp.zeros_like, g)
    return ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 1), theta


def closed_forms(ranks: tuple[int, ...]) -> dict[str, float]:
    """The variance on the linear loss by law, in the experiment's unit."""
    squares = {k: float(np.sum(np.square(g))) for k, g in gradient().items()}
    dim, total = sum(int(np.prod(s)) for s in LEAVES.values()), sum(squares.values())
    out = {"gaussian": dim + 1.0, "signs": dim - 1.0}
    matrices = {k: sum(s) for k, s in LEAVES.items() if len(s) == 2}
    for rank in ranks:
        thin = sum((m + 1) * squares[k] for k, m in matrices.items()) * 2 / rank / total
        out[f"gaussian, rank {rank}"] = dim + 1 + thin
        own = sum(squares[k] for k in matrices) * 2 * (1 - 1 / rank) / total
        out[f"signs, rank {rank}"] = dim - 1 + own
    return {name: value / dim for name, value in out.items()}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """A panel for each problem: the variance by rank, dense noise as a line, closed forms."""
    problems = config["problems"]
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(3.6 * len(problems) + 0.6, 4), layout="constrained"
    )
    axes = np.ravel(figure.subplots(1, len(problems), squeeze=False))
    ranks = config["ranks"]
    for axis, problem in zip(axes, problems, strict=True):
        here = [r for r in records if r.labels["problem"] == problem]
        for kind, style in curves.styles(("gaussian", "signs")).items():
            dense = _values(here, kind)
            look: Any = {"color": style.color}
            axis.axhline(dense.mean(), ls=":", **look, label=f"dense, {kind}")
            means, ses = np.array([_mean_se(_values(here, f"{kind}, rank {r}")) for r in ranks]).T
            look |= {"marker": style.marker, "ls": style.dash, "capsize": 3}
            axis.errorbar(range(len(ranks)), means, ses, **look, label=f"low rank, {kind}")
            exact = [_values(here, f"{kind}, rank {r}", "exact") for r in ranks]
            if all(len(x) for x in exact):
                at = [x[0] for x in exact]
                label = "closed form" if kind == "gaussian" else None
                axis.plot(range(len(ranks)), at, "+", color="black", ms=12, label=label)
        axis.set(xticks=range(len(ranks)), xticklabels=ranks, xlabel="rank", title=problem)
        axis.margins(x=0.2)
        curves.from_zero(axis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("variance / (dim(theta) |gradient|²)")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"one antithetic pair, {curves.seeds_of(records)}")
    return figure


def _values(records: list[Record], law: str, metric: str = "variance") -> np.ndarray:
    return np.array([r.value for r in records if r.labels["law"] == law and r.metric == metric])


def _mean_se(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(se)


def show(records: list[Record]) -> None:
    """Prints the variances."""
    problems = dict.fromkeys(r.labels["problem"] for r in records)
    for problem in problems:
        here = [r for r in records if r.labels["problem"] == problem]
        for law in dict.fromkeys(r.labels["law"] for r in here):
            mean, se = _mean_se(_values(here, law))
            exact = _values(here, law, "exact")
            known = f", closed form {exact[0]:.4g}" if len(exact) else ""
            print(f"{problem:>18}  {law:>16}: {mean:.4g} ± {se:.2g}{known}")


def claims(summary: Summary) -> list[Claim]:
    """The closed forms; rank-one signs are never worse than dense noise; Gaussian factors are."""
    config, out = summary.about["config"], []
    if "linear" in config["problems"]:
        out += _formulas(summary, config["ranks"])
    for problem in config["problems"]:
        dense, signs = (_find(summary, problem, law) for law in ("gaussian", "signs, rank 1"))
        finding = evidence.agrees(evidence.ratio(signs, dense), 0.0, 1.0, blind=0.1)
        says = f"{problem}: signs of rank 1 have at most the variance of dense Gaussian noise"
        out.append(Claim(says, THEORY, f"ratio {finding.text}", finding.holds))
        thin = _find(summary, problem, "gaussian, rank 1")
        finding = evidence.more(thin, dense)
        says = f"{problem}: Gaussian factors of rank 1 have more variance than dense Gaussian noise"
        out.append(Claim(says, THEORY, finding.text, finding.holds))
    return out


def _formulas(summary: Summary, ranks: list[int]) -> list[Claim]:
    out = []
    for law, exact in closed_forms(tuple(ranks)).items():
        found = _find(summary, "linear", law)
        finding = evidence.agrees(found, 0.98 * exact, 1.02 * exact, blind=0.01 * exact)
        says = f"linear, {law}: the variance is within 2 % of its closed form, {exact:.4g}"
        out.append(Claim(says, THEORY, finding.text, finding.holds))
    return out


def _find(summary: Summary, problem: str, law: str) -> evidence.Result | None:
    return summary.find("variance", problem=problem, law=law)


EXPERIMENT = Experiment(
    name="low_rank_variance",
    about="The variance of low-rank noise by rank and factors; closed forms and dense noise too.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "law"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a network of a million weights, signs of rank one have over 5 % more variance than "
        "dense Gaussian noise, with a standard error of 1 % or less."
    ),
)
