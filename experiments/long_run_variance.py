"""``long_run_variance``: the variance of an update, of an episode's mean, and of many episodes'."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import unrollgrad as ug
from experiments.experiment import Claim, Experiment, Progress, Write
from experiments.problems import PROBLEMS
from experiments.results import Record, Summary
from experiments.staggered_variance import staggered_variance
from unrollgrad.extras import need
from unrollgrad.problems import theory

RECURRENCES = ("aligned", "independent", "conflicting")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The variance of the mean of U consecutive updates at frozen theta: U = 1, n and 20 n.

    An episode has n windows, and an update is one window (of full ES a whole episode). Everything
    is in one unit: the trace of the variance of the mean, times the episode-pairs (one antithetic
    pair through one episode) that were spent on it, over the squared norm of the gradient. A flat
    line means errors of consecutive updates that are independent, a rising one that they add up, a
    falling one that they cancel, or that single updates are off by their window's own gradient.
    nres is es_single with n workers that stand at different windows, "pes staggered" likewise (what
    brings them there is not counted); the others are single workers. On the recurrences closed
    forms are known.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Defaults of everything else. paper: more of the same; this is no published figure."""
    problems: tuple[
        Literal["aligned", "independent", "conflicting", "text_lstm", "digits"], ...
    ] = ("aligned", "independent", "conflicting", "text_lstm", "digits")
    """aligned: a linear recurrence whose windows have the same gradient; independent: random ones;
    conflicting: they alternate in sign, so that their sum is small. text_lstm: all weights of an
    LSTM; digits: a learning-rate schedule."""
    estimators: tuple[
        Literal["full_es", "es_single", "nres", "gpes", "pes", "pes staggered"], ...
    ] = ("full_es", "es_single", "nres", "gpes", "pes", "pes staggered")
    """Which estimators."""
    num_windows: int = 10
    """n, windows per episode."""
    truncation: int = 5
    """Inner steps per window."""
    noise_periods: int = 2
    """Draws of noise per episode of gpes; divides the windows."""
    dim: int = 20
    """Of the recurrences' theta."""
    memory: float = 0.0
    """How much of theta's influence on the recurrences is left one step later."""
    num_samples: int = 200
    """Chains of 20 episodes on the recurrences."""
    num_samples_real: int = 20
    """Chains of 20 episodes on the other problems."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws other noise and other episodes, on the same problems at the same theta."""
    out: Path = Path("results")
    """Results go to a new folder in here."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("conflicting",),
        estimators=("full_es", "nres", "pes"),
        num_windows=4,
        truncation=1,
        dim=5,
        num_samples=200,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        num_windows=20,
        num_samples=2000,
        num_samples_real=300,
        seeds=(0, 1, 2, 3, 4),
    ),
}

REST = 0.2
"""What conflicting gradients have in common: their signs are 1 + REST and -1 + REST."""

SIGMA = {"text_lstm": 0.01, "digits": 0.03}
"""Small, so that smoothing is; on the recurrences it changes nothing."""

UPDATES = ("1", "n", "20n")
"""The numbers of updates, by name."""


class _Case(NamedTuple):
    """A problem, its estimators, and what is known of them."""

    problem: ug.UnrolledProblem
    theta: Any
    estimators: dict[str, ug.GradientEstimator]
    reference: Any
    exact: dict[str, dict[str, float]]  # by estimator and updates, not divided by |g|^2


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes three variances per problem and estimator, as soon as they are measured."""
    names: tuple[str, ...] = settings.problems
    for i, name in enumerate(names):
        case = _prepare(dataclasses.replace(settings, seeds=(), out=Path()), name)
        samples = settings.num_samples if name in RECURRENCES else settings.num_samples_real

        def report(
            estimator: str, part: int, of: int, i: int = i, name: str = name, case: _Case = case
        ) -> None:
            order = [" reference", *case.estimators]
            done = (order.index(estimator) + part / of) / len(order)
            progress(f"{name}: {estimator.strip()}", (i + done) / len(names))

        def on_row(row: dict[str, Any], name: str = name, case: _Case = case) -> None:
            _write_row(settings, name, row, case.exact, write)

        ug.diagnostics.compare(
            case.problem,
            case.theta,
            case.estimators,
            reference=case.reference,
            num_samples=samples,
            num_chains=samples,
            batch_size=samples,
            key=jax.random.fold_in(jax.random.key(seed), i),
            progress=report,
            on_row=on_row,
        )


def _write_row(
    settings: Settings, problem: str, row: dict[str, Any], exact: dict[str, Any], write: Write
) -> None:
    """The row's variances in the settings' unit."""
    name, square = row["name"], row["reference_norm"] ** 2
    unit = _workers(settings, name) / square
    for updates, value in row["variance_of_mean"].items():
        label = UPDATES[
            [1, settings.num_windows, 20 * settings.num_windows].index(
                updates * settings.num_windows // row["num_windows"]
            )
        ]
        numbers = {
            "variance": value * unit,
            "variance_se": row["variance_of_mean_se"][updates] * unit,
        }
        if name in exact:
            numbers["exact"] = exact[name][label] / square
        write({"problem": problem, "estimator": name, "updates": label, **numbers})


def _workers(settings: Settings, name: str) -> int:
    return settings.num_windows if name in ("nres", "pes staggered") else 1


@functools.cache
def _prepare(settings: Settings, name: str) -> _Case:
    """The same for all seeds, so that they compile once."""
    horizon = settings.num_windows * settings.truncation
    if name in RECURRENCES:
        problem, theta, influence = recurrence(settings, name)
        exact = closed_forms(settings, influence)
        reference = jax.numpy.asarray(theory.gradient(influence), theta.dtype)
    else:
        problem, theta = _with_one_leaf(*PROBLEMS[name].make(horizon)[:2])
        exact, reference = {}, ug.bptt(problem)
    common = {
        "truncation": settings.truncation,
        "sigma": SIGMA.get(name, 1.0),
        "noise_period": horizon // settings.noise_periods,
        "num_pairs": 1,
    }
    one = {
        kind: ug.REGISTRY[kind].build(problem, **common)
        for kind in ("full_es", "es_single", "gpes", "pes")
    }
    staggered = {
        name: ug.average(one[kind], settings.num_windows, stagger="burn_in")
        for name, kind in {"nres": "es_single", "pes staggered": "pes"}.items()
    }
    found: dict[str, ug.GradientEstimator] = {**one, **staggered}
    asked: dict[str, None] = dict.fromkeys(settings.estimators)
    return _Case(problem, theta, {name: found[name] for name in asked}, reference, exact)


def _with_one_leaf(problem: ug.UnrolledProblem, theta: Any) -> tuple[ug.UnrolledProblem, jax.Array]:
    """Theta as one vector: one leaf's noise compiles many times faster than that of fourteen."""
    vector, unravel = ravel_pytree(theta)

    def init(key, theta):
        return problem.init(key, unravel(theta))

    def step(key, theta, state, t):
        return problem.step(key, unravel(theta), state, t)

    return problem._replace(init=init, step=step), vector


def recurrence(settings: Settings, name: str) -> tuple[ug.UnrolledProblem, jax.Array, np.ndarray]:
    """A linear recurrence, its theta, and its influence, (T, T, P)."""
    horizon = settings.num_windows * settings.truncation
    gradients = "independent" if name == "independent" else "identical"
    problem, theta, influence = ug.problems.linear_recurrence(
        settings.dim, horizon, gradients=gradients, memory=settings.memory
    )
    if name != "conflicting":
        return problem, theta, influence(theta)
    windows = np.arange(horizon) // settings.truncation
    signs = np.where(windows % 2 == 0, 1.0, -1.0) + REST

    def step(key, theta, state, t):
        state, loss = problem.step(key, theta, state, t)
        return state, jax.numpy.asarray(signs, loss.dtype)[t] * loss

    return problem._replace(step=step), theta, signs[:, None, None] * influence(theta)


def closed_forms(settings: Settings, influence: np.ndarray) -> dict[str, dict[str, float]]:
    """By estimator and updates, for one episode-pair."""
    n, truncation = settings.num_windows, settings.truncation
    periods = {
        "es_single": None,
        "gpes": len(influence) // settings.noise_periods,
        "pes": truncation,
    }
    out = {}
    for name, period in periods.items():
        episode = theory.episode_variance(influence, truncation, period)
        single = theory.window_variance(influence, truncation, period) / n
        out[name] = {"1": single, "n": episode, "20n": episode}
    for name, kind in {"nres": "es_single", "pes staggered": "pes"}.items():
        out[name] = {
            label: staggered_variance(influence, truncation, periods[kind], updates)
            for label, updates in zip(UPDATES, (1, n, 20 * n), strict=True)
        }
    return {**out, "full_es": {k: v for k, v in out["es_single"].items() if k != "1"}}


def _table(records: list[Record]) -> dict[tuple[str, str, str], dict[str, np.ndarray]]:
    """By problem, estimator and updates, each metric's numbers by seed."""
    out: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in records:
        key = r.labels["problem"], r.labels["estimator"], r.labels["updates"]
        out.setdefault(key, {}).setdefault(r.metric, []).append(r.value)
    return {k: {m: np.array(x) for m, x in metrics.items()} for k, metrics in out.items()}


def _pooled(metrics: dict[str, np.ndarray]) -> tuple[float, float]:
    """The mean variance over seeds, and its standard error, which is that of all samples."""
    errors = metrics["variance_se"]
    return float(metrics["variance"].mean()), float(np.sqrt(np.sum(errors**2)) / len(errors))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """A panel per problem, a line per estimator; crosses are closed forms."""
    problems = config["problems"]
    columns = min(3, len(problems))
    rows = -(-len(problems) // columns)
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(1 + 3.3 * columns, 1 + 3.3 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(problems) :]:
        axis.remove()
    table = _table(records)
    for axis, problem in zip(axes.flat, problems, strict=False):
        _panel(axis, table, problem, config)
    figure.supylabel("variance of the mean of U updates, per episode-pair spent, / |g|²")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _panel(axis: Any, table: Any, problem: str, config: dict[str, Any]) -> None:
    windows = config["num_windows"]
    places = dict(zip(UPDATES, (1, windows, 20 * windows), strict=True))
    for i, name in enumerate(config["estimators"]):
        shift = 1.13 ** (i - 2.5)  # lines on each other could not be told apart
        here = {u: table[problem, name, u] for u in UPDATES if (problem, name, u) in table}
        at = [places[u] * shift for u in here]
        means, errors = np.array([_pooled(x) for x in here.values()]).reshape(-1, 2).T
        style = "--" if "staggered" in name or name == "nres" else "-"
        axis.errorbar(
            at, means, errors, fmt="o" + style, color=f"C{i}", ms=4, capsize=3, label=name
        )
        known = [x["exact"].mean() for x in here.values() if "exact" in x]
        if known:
            axis.plot(at, known, "kx", ms=6, label=None if i else "closed form")
    axis.set(xscale="log", yscale="log", xlabel="U, consecutive updates", title=problem)
    axis.set_xticks(list(places.values()), ["1", "n", "20 n"])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.3)


def show(records: list[Record]) -> None:
    """Prints the variances, and in brackets the closed forms."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (problem, name, updates), metrics in _table(records).items():
        mean, se = _pooled(metrics)
        text = f"{updates}: {mean:.3g} ± {se:.1g}"
        text += f" ({metrics['exact'].mean():.3g})" if "exact" in metrics else ""
        lines.setdefault((problem, name), []).append(text)
    print("variance of the mean of U updates, per episode-pair, / |g|^2 (closed form)")
    for (problem, name), parts in lines.items():
        print(f"{problem:>12} {name:>13}  " + "   ".join(parts))


def claims(summary: Summary) -> list[Claim]:
    """NRES and ES-Single are full ES in the long run; PES is less or more, as gradients agree."""
    config = summary.about["config"]
    windows, measured = config["num_windows"], config["estimators"]
    ranges = {"aligned": (0.0, 1.0), "independent": (windows / 4, math.inf)}
    ranges["conflicting"] = ranges["independent"]
    out = []
    for problem in config["problems"]:
        if problem in RECURRENCES:
            out.append(_exact_claim(summary, problem))
        if "full_es" in measured:
            out += [_same_claim(summary, problem, name) for name in EQUAL if name in measured]
            out += [
                _pes_claim(summary, problem, name, *ranges[problem])
                for name in ("pes", "pes staggered")
                if name in measured and problem in ranges
            ]
    return out


SOURCE = "theory, for quadratic losses"

BLIND = 0.3
"""A ratio known to less than this fraction says nothing."""

EQUAL = ("es_single", "nres")
"""Whose long-run variance is that of full ES."""

CUT = 1 / 20
"""A worker of nres that begins inside an episode sees the ends of two instead of a whole one."""


def _value(summary: Summary, problem: str, name: str, updates: str) -> tuple[float, float]:
    """The variance, and its standard error from the samples of all seeds."""
    numbers = []
    for metric in ("variance", "variance_se"):
        found = summary.find(metric, problem=problem, estimator=name, updates=updates)
        numbers.append(math.nan if found is None or found["mean"] is None else found["mean"])
    return numbers[0], numbers[1] / math.sqrt(len(summary.about["seeds"]))


def _ratio(summary: Summary, problem: str, name: str) -> tuple[float, float]:
    """The long-run variance over full ES's, and its standard error."""
    (a, a_se), (b, b_se) = (_value(summary, problem, x, "20n") for x in (name, "full_es"))
    return a / b, a / b * math.hypot(a_se / a, b_se / b)


def _exact_claim(summary: Summary, problem: str) -> Claim:
    away, errors = {}, []
    for name in summary.about["config"]["estimators"]:
        for updates in UPDATES:
            labels = {"problem": problem, "estimator": name, "updates": updates}
            exact = summary.find("exact", **labels)
            if exact is not None:
                value, se = _value(summary, problem, name, updates)
                away[f"{name} at U = {updates}"] = (value - exact["mean"]) / se
                errors.append(se / exact["mean"])
    worst = max(away, key=lambda k: abs(away[k]))
    return Claim(
        f"{problem}: all {len(away)} variances are those of the closed forms, within four standard "
        "errors",
        SOURCE,
        f"at most {abs(away[worst]):.2g} of them away ({worst}); errors of "
        f"{100 * min(errors):.1g} to {100 * max(errors):.1g} %",
        None if max(errors) > BLIND else abs(away[worst]) <= 4,
    )


def _same_claim(summary: Summary, problem: str, name: str) -> Claim:
    ratio, se = _ratio(summary, problem, name)
    end = CUT if name == "nres" else 0.0
    besides = f" and the {100 * end:.0f} % of the one episode in 20 that is cut" if end else ""
    return Claim(
        f"{problem}: in the long run {name} has full_es's variance per episode-pair, within three "
        f"standard errors{besides}",
        SOURCE,
        f"{ratio:.3g} ± {se:.1g} times",
        None if se > BLIND * ratio else abs(ratio - 1) <= 3 * se + end,
    )


def _pes_claim(summary: Summary, problem: str, name: str, low: float, high: float) -> Claim:
    ratio, se = _ratio(summary, problem, name)
    what = "less than full_es's" if high == 1.0 else f"at least {low:.3g} = n/4 times full_es's"
    return Claim(
        f"{problem}: in the long run {name}'s variance per episode-pair is {what}",
        SOURCE,
        f"{ratio:.3g} ± {se:.1g} times",
        None if se > BLIND * ratio else low <= ratio - 2 * se and ratio + 2 * se <= high,
    )


EXPERIMENT = Experiment(
    name="long_run_variance",
    about="The variance of one update against that of many: PES, GPES, ES-Single, NRES, full ES.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "estimator", "updates"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
