"""``ridge_rider``: starts on the ridge between two outcomes, and branches that find both."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.diagnosis.games import DYNAMICS, RATE, Dynamics
from unrollgrad import diagnostics
from unrollgrad.running import need

SOURCE = "Lorraine et al. 2022"
METHODS = ("branches", "no climb", "random starts", "random, equal steps")
LANDSCAPE = "exponent"
"""The method's label of the lines that have the exponent as a function of the start."""

REACH = {"double well": 1.6, "mixed game": 6.0}
"""The landscapes' starts are between minus this and this."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Do branches at bifurcations find both outcomes of a dynamical system?

    A bifurcation is a start at which the first Lyapunov exponent is largest; its two branches are
    two runs. They are compared with as many runs from random starts, with branches at the random
    starts themselves (no climb), and with as many random starts as cost the same number of steps.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings."""
    problems: tuple[Literal[tuple(DYNAMICS)], ...] = tuple(DYNAMICS)  # type: ignore[valid-type]
    """The dynamics."""
    num_steps: int = 200
    """Updates of a climb."""
    num_starts: int = 64
    """Climbs of each seed; their branches are grouped."""
    num_runs: tuple[int, ...] = (2, 4, 8)
    """Runs in a group. A group counts if it has both outcomes."""
    cells: int = 41
    """Starts along each side of a landscape in the picture."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed has its own random starts."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("double well", "mixed game"),
        num_steps=30,
        num_starts=8,
        num_runs=(2, 4),
        cells=5,
        seeds=(0, 1),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=1000, num_starts=256, num_runs=(2, 4, 8, 16, 32)),
}

PASSES = 6
"""Steps that a step of a climb costs: itself and a tangent, and both again twice backwards."""


class Programs(NamedTuple):
    """What is compiled once for every problem.

    Attributes:
        starts: From keys to random starts.
        branch: From starts to bifurcations.
        at_once: The same, but branched where the start is.
        ends: From starts to outcomes.
        exponent: From starts to exponents.
    """

    starts: Any
    branch: Any
    at_once: Any
    ends: Any
    exponent: Any


@functools.cache
def programs(problem: str, num_steps: int) -> Programs:
    """The programs of a problem, which all seeds share."""
    it = DYNAMICS[problem]

    def branch(start, updates=num_steps, rate=it.learning_rate):
        return diagnostics.bifurcation(
            it.step,
            start,
            it.climb_steps,
            num_updates=updates,
            learning_rate=rate,
            distance=it.distance,
        )

    def end(start):
        return it.outcome(jax.lax.fori_loop(0, it.run_steps, lambda i, s: it.step(s), start))

    def exponent(start):
        return diagnostics.lyapunov_of_map(it.step, start, it.climb_steps).exponents[0]

    at_once = functools.partial(branch, updates=1, rate=1e-9)
    found = (it.start, branch, at_once, end, exponent)
    return Programs(*(jax.jit(jax.vmap(f)) for f in found))


def random_runs(it: Dynamics, num_steps: int) -> int:
    """The runs from random starts that cost as many steps as a climb and its two branches."""
    return 2 + math.ceil(PASSES * num_steps * it.climb_steps / it.run_steps)


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes how often a group of runs has both outcomes; with the first seed, the landscapes."""
    for i, name in enumerate(settings.problems):
        progress(name, i / len(settings.problems))
        it, do = DYNAMICS[name], programs(name, settings.num_steps)
        if seed == settings.seeds[0] and name in REACH:
            _landscape(do, name, settings.cells, write)
        keys = jax.random.split(jax.random.key(seed), settings.num_starts)
        starts = do.starts(keys)
        found, plain = do.branch(starts), do.at_once(starts)
        number = random_runs(it, settings.num_steps)
        pool = jax.random.split(jax.random.key(1000 + seed), settings.num_starts * number)
        other = np.asarray(do.ends(do.starts(pool)))
        outcomes = {
            "branches": _ends(do, found.branches),
            "no climb": _ends(do, plain.branches),
            "random starts": other[: 2 * settings.num_starts].reshape(-1, 2),
            "random, equal steps": other.reshape(-1, number),
        }
        for method, kinds in outcomes.items():
            found_both = {runs: both(kinds, runs // 2) for runs in settings.num_runs}
            write({"problem": name, "method": method, "both": found_both})
        numbers = {"before": np.mean(found.before), "exponent": np.mean(found.exponent)}
        if name == "double well":
            numbers["highest"] = float(np.max(found.exponent))
        write({"problem": name, "method": "branches", **numbers})
        if seed == settings.seeds[0] and name in REACH:
            _write_starts(name, found.state, write)


def _write_starts(name: str, states: Any, write: Write) -> None:
    """Writes where the climbs ended."""
    for j, place in enumerate(np.stack(jax.tree.leaves(states), axis=-1)):
        place = dict(zip(("x", "y"), place, strict=False))
        write({"problem": name, "method": "branches", "step": j, **place})


def _dim(name: str) -> int:
    return len(jax.tree.leaves(DYNAMICS[name].start(jax.random.key(0))))


def _ends(do: Programs, branches: Any) -> np.ndarray:
    """The outcomes of both branches of every climb, (climbs, 2)."""
    shape = jax.tree.leaves(branches)[0].shape[:2]
    return np.asarray(
        do.ends(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), branches))
    ).reshape(shape)


def both(kinds: np.ndarray, size: int) -> float:
    """The share of groups of so many rows that have both outcomes."""
    groups = len(kinds) // size
    if groups == 0:
        raise ValueError(f"`num_runs`: {2 * size} runs are more than {len(kinds)} climbs have.")
    grouped = kinds[: groups * size].reshape(groups, -1)
    return float(np.mean((grouped == 0).any(axis=1) & (grouped == 1).any(axis=1)))


def _landscape(do: Programs, name: str, cells: int, write: Write) -> None:
    """The exponent on a line, or on a square, of starts."""
    side = np.linspace(-REACH[name], REACH[name], cells, dtype=np.float32)
    places = np.stack(np.meshgrid(*[side] * _dim(name), indexing="ij"), -1).reshape(-1, _dim(name))
    start = tuple(jnp.asarray(places.T)) if _dim(name) > 1 else jnp.asarray(places[:, 0])
    values = np.asarray(do.exponent(start))
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        place = dict(zip(("x", "y"), place, strict=False))
        write({"problem": name, "method": LANDSCAPE, "step": i, "exponent": value, **place})


def _at(records: list[Record], problem: str, method: str) -> dict[int, dict[str, float]]:
    """The numbers of the first seed's lines that have a place, by step."""
    seed = min(r.seed for r in records)
    found: dict[int, dict[str, float]] = {}
    for r in records:
        here = r.labels["problem"] == problem and r.labels["method"] == method
        if here and r.seed == seed and r.step is not None and r.metric in ("x", "y", "exponent"):
            found.setdefault(r.step, {})[r.metric] = r.value
    return {i: numbers for i, numbers in found.items() if "x" in numbers}


def shares(records: list[Record]) -> dict[str, dict[str, dict[int, np.ndarray]]]:
    """The share of groups with both outcomes: by problem, method and runs, for every seed."""
    out: dict[str, dict[str, dict[int, list[float]]]] = {}
    for r in records:
        if found := re.fullmatch(r"both\[(\d+)\]", r.metric):
            line = out.setdefault(r.labels["problem"], {}).setdefault(r.labels["method"], {})
            line.setdefault(int(found[1]), []).append(r.value)
    return {
        problem: {m: {n: np.array(x) for n, x in line.items()} for m, line in methods.items()}
        for problem, methods in out.items()
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the landscapes with the starts that were found, and how often both outcomes are."""
    found = shares(records)
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(4.6 * max(len(found), 2), 8), layout="constrained"
    )
    top, bottom = figure.subplots(2, max(len(found), 2), squeeze=False)
    for axis in [*top, *bottom]:
        axis.set_axis_off()
    _draw_line(top[0], records)
    if _at(records, "mixed game", LANDSCAPE):
        _draw_square(figure, top[1], records)
    for axis, (problem, methods) in zip(bottom, found.items(), strict=False):
        axis.set_axis_on()
        for method, (color, marker, dash) in curves.styles(methods).items():
            runs = sorted(methods[method])
            mean = np.array([methods[method][n].mean() for n in runs])
            axis.plot(runs, mean, dash, color=color, marker=marker, label=method)
        axis.set(
            xlabel="runs (equal steps: what as many branches cost)",
            ylabel=f"share with both outcomes ({curves.seeds_of(records, 'mean of')})",
            title=f"{problem}: {DYNAMICS[problem].about}",
            ylim=(-0.03, 1.05),
        )
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3)
    lines, names = bottom[0].get_legend_handles_labels()
    place = top[2] if len(top) > 2 else bottom[0]
    place.legend(lines, names, loc="center", title="runs" if len(top) > 2 else None)
    return figure


def _draw_line(axis: Any, records: list[Record]) -> None:
    """The exponent of the double well against the start."""
    landscape = _at(records, "double well", LANDSCAPE).values()
    axis.set_axis_on()
    axis.plot([p["x"] for p in landscape], [p["exponent"] for p in landscape], "C0-")
    starts = [p["x"] for p in _at(records, "double well", "branches").values()]
    top = math.log(1 + RATE)
    axis.plot(starts, [top] * len(starts), "C3|", ms=12, label="starts that the climbs found")
    axis.axhline(top, color="0.4", lw=0.8, ls=":", label="log(1 + rate · curvature)")
    axis.set(
        xlabel="start",
        ylabel="first exponent",
        title="double well: the exponent peaks at the barrier",
    )
    axis.legend(loc="lower center")
    axis.grid(alpha=0.3)


def _draw_square(figure: Any, axis: Any, records: list[Record]) -> None:
    """The exponent of the mixed game against the two players' logits."""
    landscape = list(_at(records, "mixed game", LANDSCAPE).values())
    x, y, value = (np.array([p[k] for p in landscape]) for k in ("x", "y", "exponent"))
    axis.set_axis_on()
    points = axis.scatter(x, y, c=value, cmap="Greys", marker="s", s=6e4 / max(len(x), 400))
    starts = _at(records, "mixed game", "branches").values()
    axis.plot([p["x"] for p in starts], [p["y"] for p in starts], "C3+", ms=7)
    axis.set(
        xlabel="logit of player 1 (high: tit for tat)",
        ylabel="logit of player 2",
        title="mixed game: starts that the climbs found (+)",
        xlim=(-REACH["mixed game"], REACH["mixed game"]),
        ylim=(-REACH["mixed game"], REACH["mixed game"]),
    )
    figure.colorbar(points, ax=axis, label="first exponent of the start")


def show(records: list[Record]) -> None:
    """Prints the shares, and the exponents before and after the climbs."""
    for problem, methods in shares(records).items():
        for method, line in methods.items():
            text = "  ".join(f"{n} runs {x.mean():.2f}" for n, x in sorted(line.items()))
            print(f"{problem:>16}  {method:>19}: both outcomes with {text}")
        before, after = (_mean(records, problem, metric) for metric in ("before", "exponent"))
        print(
            f"{problem:>16}  {LANDSCAPE:>19}: the climb raises it from {before:.3f} to {after:.3f}"
        )


def _mean(records: list[Record], problem: str, metric: str) -> float:
    found = [r for r in records if r.metric == metric and r.step is None]
    return float(np.mean([r.value for r in found if r.labels["problem"] == problem]))


def claims(summary: Summary) -> list[Claim]:
    """The closed form at the barrier's top, and how often branches find both outcomes."""
    out = []
    highest = summary.find("highest", problem="double well", method="branches")
    if highest is not None:
        exact = math.log(1 + RATE)
        off = abs(highest["mean"] - exact)
        text = f"{evidence.shown(highest['mean'], '.7f')} against {exact:.7f}"
        says = "the exponent is largest at the barrier's top: log(1 + rate · |curvature|)"
        out.append(Claim(says, "theory", text, evidence.told(off < 1e-5, off)))
    for problem in summary.about["config"]["problems"]:
        out += _comparisons(summary, problem)
    return out


def _comparisons(summary: Summary, problem: str) -> list[Claim]:
    """Against the other methods, at the smallest number of runs."""
    runs = min(summary.about["config"]["num_runs"])
    mine = summary.find(f"both[{runs}]", problem=problem, method="branches")
    out = []
    for method in METHODS[1:]:
        other = summary.find(f"both[{runs}]", problem=problem, method=method)
        if mine is None or other is None:
            continue
        if method == "random starts":
            says = f"{problem}: branches find both outcomes more often than as many random starts"
        elif method == "no climb":
            says = f"{problem}: the climb is needed, branches at random starts find both less often"
        else:
            says = f"{problem}: branches find both more often than random starts of the same cost"
        finding = evidence.more(mine, other)
        out.append(Claim(says, SOURCE, f"of groups of {runs} runs: {finding.text}", finding.holds))
    return out


EXPERIMENT = Experiment(
    name="ridge_rider",
    about="Branches at bifurcations, where the Lyapunov exponent is largest, find both outcomes.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "method"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With starts from a wider law, as many random ones as a climb costs find both ends of the "
        "iterated dilemma as often as branches do, in each of five seeds."
    ),
)
