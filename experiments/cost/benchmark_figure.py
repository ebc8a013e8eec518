"""The figure, the tables and the claims of ``benchmark``."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from unrollgrad import running
from unrollgrad.running import need

Lines = dict[tuple[str, str], dict[int, float]]
"""Values by number, for each (workload, estimator)."""

CORE = ("pes", "es_single", "truncated_es", "full_es", "tbptt", "bptt")
TARGETS = {
    "medium": 5,
    "learned optimizer": 5,
    "medium, K=1": 5,
    "learned optimizer, K=1": 5,
    "meta-training": 15,
}
"""The largest accepted excess over the floor, in percent."""

PEERS = {
    ("toy regression", "fit, one worker"): 1.15,
    ("toy regression", "fit, workers of one pair"): 1.3,
    ("toy regression", "ours, an update a call"): 1.5,
    ("influence balancing", "fit, one worker"): 0.95,
    ("influence balancing", "fit, workers of one pair"): 1.1,
    ("influence balancing", "ours, an update a call"): 1.5,
}
"""The largest accepted time of an outer loop, over that of the one written by hand."""


def _table(records: list[Record], part: str, metric: str) -> Lines:
    """Means over seeds of a metric written once per seed, by (workload, estimator) and number."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in records:
        if r.labels["part"] == part and r.metric == metric:
            line = found.setdefault((r.labels["workload"], r.labels["estimator"]), {})
            line.setdefault(int(r.labels["number"]), []).append(r.value)
    return {
        series: {number: float(np.mean(values)) for number, values in sorted(line.items())}
        for series, line in found.items()
    }


def slope(line: dict[int, float]) -> float:
    """The log-log slope of a line; NaN if a point is not finite."""
    if not np.isfinite(list(line.values())).all():
        return math.nan
    return float(np.polyfit(np.log(list(line)), np.log(list(line.values())), 1)[0])


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Panels that were measured: ratios with quartiles, time by workers, compile time, memory."""
    parts = {r.labels["part"] for r in records}
    panels: dict[str, Callable[[Any, list[Record]], None]] = {
        "estimators": _draw_ratios,
        "workers": _draw_workers,
        "truncation": _draw_compiling,
        "size": _draw_memory,
        "peers": _draw_peers,
    }
    shown = [panel for part, panel in panels.items() if part in parts] or [_draw_ratios]
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(7 * min(2, len(shown)), 4.5 * (1 + len(shown) // 3)), layout="constrained"
    )
    axes = figure.subplots(1 + len(shown) // 3, min(2, len(shown)), squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, panel in zip(axes, shown, strict=False):
        panel(axis, records)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return figure


def _draw_workers(axis: Any, records: list[Record]) -> None:
    _draw_lines(axis, _table(records, "workers", "median_seconds"), "workers", "s / episode")


def _draw_memory(axis: Any, records: list[Record]) -> None:
    lines = _table(records, "size", "copies_per_pair")
    _draw_lines(axis, lines, "numbers in theta (and in a state)", "copies of theta per pair")
    values = [value for line in lines.values() for value in line.values()]
    axis.set(yscale="linear", ylim=(0, 1.2 * max(values)))


def _draw_peers(axis: Any, records: list[Record]) -> None:
    lines = _table(records, "peers", "microseconds_per_update")
    names = list(dict.fromkeys(name for _, name in lines))
    workloads = list(dict.fromkeys(workload for workload, _ in lines))
    for i, workload in enumerate(workloads):
        values = [next(iter(lines[workload, name].values()), np.nan) for name in names]
        places = np.arange(len(names)) + 0.8 * ((i + 0.5) / len(workloads) - 0.5)
        axis.barh(places, values, 0.8 / len(workloads), label=workload)
    axis.set_yticks(range(len(names)), names)
    axis.set(xscale="log", xlabel="microseconds per outer update")


def _draw_compiling(axis: Any, records: list[Record]) -> None:
    floor: str | None = "their floors"
    for part, style in (("truncation", "o-"), ("horizon", "s--")):
        for (_, estimator), line in _table(records, part, "estimator_compile_seconds").items():
            axis.plot(list(line), list(line.values()), style, label=f"{estimator}, {part}")
        for line in _table(records, part, "floor_compile_seconds").values():
            axis.plot(list(line), list(line.values()), style, color="0.7", label=floor)
            floor = None
    axis.set(xscale="log", xlabel="inner steps", ylabel="s to compile")
    curves.from_zero(axis)


def _draw_ratios(axis: Any, records: list[Record]) -> None:
    lines = {
        name: _table(records, "estimators", f"{name}_ratio")
        for name in ("median", "lower", "upper")
    }
    workloads = list(dict.fromkeys(workload for workload, _ in lines["median"]))
    estimators = list(dict.fromkeys(estimator for _, estimator in lines["median"]))
    for i, workload in enumerate(workloads):
        for j, estimator in enumerate(estimators):
            middle, low, high = (
                next(iter(lines[name].get((workload, estimator), {0: np.nan}).values()))
                for name in ("median", "lower", "upper")
            )
            x = j + 0.8 * ((i + 0.5) / len(workloads) - 0.5)
            error = [[middle - low], [high - middle]]
            label = workload if j == 0 else None
            axis.errorbar(x, middle, error, fmt="o", ms=4, color=f"C{i}", label=label)
    axis.axhline(1.05, color="k", linestyle=":", label="5 % more")
    axis.set_xticks(range(len(estimators)), estimators, rotation=45, ha="right")
    axis.set(ylabel="time / the floor's", yscale="log")
    values = [x for line in lines["upper"].values() for x in line.values()]
    ticks = [0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5]
    axis.set_yticks(ticks, [str(t) for t in ticks], minor=False)
    axis.minorticks_off()
    axis.set_ylim(None, max([1.3, *(1.1 * x for x in values)]))


def _draw_lines(axis: Any, lines: Lines, x: str, y: str) -> None:
    for (_, estimator), line in lines.items():
        axis.plot(list(line), list(line.values()), "o-", label=estimator)
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)


def show(records: list[Record]) -> None:
    """Prints the tables."""
    _print_estimators(records)
    for part in ("estimators", "workers", "devices", "truncation", "horizon"):
        for (workload, name), line in _table(records, part, "out_of_memory").items():
            print(f"out of memory: {name} on {workload}, {', '.join(map(str, line))}")
    for part, metric, unit in (
        ("workers", "median_seconds", "s"),
        ("workers", "median_ratio", "of the floor"),
        ("devices", "median_seconds", "s"),
        ("truncation", "estimator_compile_seconds", "s to compile"),
        ("horizon", "estimator_compile_seconds", "s to compile"),
        ("size", "median_seconds", "s"),
        ("size", "copies_per_pair", "copies of theta per pair"),
        ("products", "median_ratio", "of bare products"),
        ("peers", "microseconds_per_update", "us per outer update"),
        ("peers", "median_ratio", "of the loop by hand"),
    ):
        for (workload, estimator), line in _table(records, part, metric).items():
            values = ", ".join(f"{number}: {value:.3g}" for number, value in line.items())
            name = f"{estimator}, {workload}" if part == "peers" else estimator
            print(f"{part:>10} {name:>12}  {values} {unit}")


def _print_estimators(records: list[Record]) -> None:
    """Prints the table of all estimators on all workloads, compared with the floor."""
    console, table = running.console(), need("rich.table", "rich").Table
    main = table(title="beside the floor, medians (quartiles)", title_justify="left", box=None)
    for name in ("workload", "estimator", "ratio", "", "estimates/s", "us/step", "compile s"):
        main.add_column(name, justify="left" if name in ("workload", "estimator") else "right")
    main.add_column("floor's", justify="right")
    main.add_column("MiB", justify="right")
    columns = (
        "median_ratio",
        "lower_ratio",
        "upper_ratio",
        "estimates_per_second",
        "microseconds_per_step",
        "estimator_compile_seconds",
        "floor_compile_seconds",
        "estimator_mebibytes",
    )
    tables = {name: _table(records, "estimators", name) for name in columns}
    for series, line in tables["median_ratio"].items():
        for number in line:
            x = {name: tables[name][series][number] for name in columns}
            main.add_row(
                *series,
                f"{x['median_ratio']:.2f}",
                f"({x['lower_ratio']:.2f} to {x['upper_ratio']:.2f})",
                f"{x['estimates_per_second']:.3g}",
                f"{x['microseconds_per_step']:.3g}",
                f"{x['estimator_compile_seconds']:.1f}",
                f"{x['floor_compile_seconds']:.1f}",
                f"{x['estimator_mebibytes']:.1f}",
            )
    console.print(main)


def claims(summary: Summary) -> list[Claim]:
    """Our targets for time, growth, memory, compile time and repeatability."""
    records = [
        Record(0, None, {k: r[k] for k in ("part", "workload", "estimator", "number")}, *pair)
        for r in summary.results
        for pair in [(r["metric"], r["mean"])]
    ]
    return [
        *_claims_of_time(records),
        *_claims_of_growth(records),
        *_claims_of_memory(records),
        *_claims_of_compiling(records),
        *_claims_of_repeats(summary),
        *_claims_of_peers(records),
    ]


_FLOORS: dict[tuple[float, ...], str] = {(1.0,): ", its floor not", (0.0,): ", its floor too"}


def _claims_of_time(records: list[Record]) -> Iterator[Claim]:
    ratios = _table(records, "estimators", "median_ratio")
    too_large = _table(records, "estimators", "out_of_memory")
    fits = _table(records, "estimators", "floor_fits")
    for workload, percent in TARGETS.items():
        measured = [e for e in CORE if (workload, e) in ratios]
        line = {e: next(iter(ratios[workload, e].values())) for e in measured}
        if line:
            texts = [f"{name} {evidence.shown(value, '.2f')}" for name, value in line.items()]
            alone, known = False, list(line.values())
            for e in CORE:
                if (workload, e) in too_large:
                    floors = set(fits.get((workload, e), {}).values())
                    alone |= floors == {1.0}
                    known += floors
                    texts.append(f"{e} out of memory" + _FLOORS.get(tuple(floors), ""))
            yield _claim(
                f"{workload}: at most {percent} % over the floor",
                ", ".join(texts),
                max(line.values()) <= 1 + percent / 100 and not alone,
                *known,
            )


def _claims_of_growth(records: list[Record]) -> Iterator[Claim]:
    for series, line in _table(records, "workers", "median_seconds").items():
        line = {k: v for k, v in line.items() if k >= 8}
        if len(line) > 1:
            yield _claim(
                f"{series[1]}: cost linear in workers from {min(line)} to {max(line)} (log-log "
                "slope 1 ± 0.1)",
                f"slope {evidence.shown(slope(line), '.2f')}",
                abs(slope(line) - 1) <= 0.1,
                slope(line),
            )
    for part in ("horizon", "size"):
        for (_, name), line in _table(records, part, "median_seconds").items():
            if len(line) > 1:
                of = {"horizon": "the horizon", "size": "dim(theta)"}[part]
                yield _claim(
                    f"{name}: time at most linear in {of}, from {min(line)} to {max(line)} "
                    "(log-log slope at most 1.1)",
                    f"slope {evidence.shown(slope(line), '.2f')}",
                    slope(line) <= 1.1,
                    slope(line),
                )


def _claims_of_memory(records: list[Record]) -> Iterator[Claim]:
    for (_, name), line in _table(records, "size", "copies_per_pair").items():
        most, thetas = line[max(line)], 2 + (name == "pes")
        bound = 1.1 * (2 + thetas)
        yield _claim(
            f"{name}: peak memory of a pair at most its two states and {thetas} theta, + 10 %",
            f"{evidence.shown(most, '.2f')} copies for {bound:.1f}",
            most <= bound,
            most,
        )


def _claims_of_compiling(records: list[Record]) -> Iterator[Claim]:
    ours = _table(records, "estimators", "estimator_compile_seconds")
    floors = _table(records, "estimators", "floor_compile_seconds")
    for workload in dict.fromkeys(workload for workload, _ in ours):
        line = {
            e: seconds / floors[w, e][n]
            for (w, e), line in ours.items()
            for n, seconds in line.items()
            if w == workload
        }
        text = ", ".join(f"{name} {evidence.shown(value, '.1f')}" for name, value in line.items())
        yield _claim(
            f"{workload}: compiles in at most 3 times the floor's time",
            text,
            max(line.values()) <= 3,
            *line.values(),
        )
    for part in ("truncation", "horizon"):
        for (_, name), line in _table(records, part, "estimator_compile_seconds").items():
            if len(line) > 1:
                times = list(line.values())
                spread = float(np.max(times) / np.min(times)) - 1  # NaN if one is
                yield _claim(
                    f"{name}: compile time independent of the {part}, within 20 %",
                    f"{evidence.shown(100 * spread, '.0f')} % between {min(line)} and {max(line)}",
                    spread <= 0.2,
                    spread,
                )


def _claims_of_peers(records: list[Record]) -> Iterator[Claim]:
    micros = _table(records, "peers", "microseconds_per_update")
    for (workload, name), most in PEERS.items():
        if (workload, name) in micros:
            by_hand = "by hand, an update a call" if name.endswith("a call") else "by hand"
            (ours,), (theirs,) = micros[workload, name].values(), micros[workload, by_hand].values()
            yield _claim(
                f"{workload}, {name}: at most {most} times the same by hand",
                f"{evidence.shown(ours / theirs, '.2f')} ({evidence.shown(ours, '.0f')} and "
                f"{evidence.shown(theirs, '.0f')} microseconds per update)",
                ours / theirs <= most,
                ours,
                theirs,
            )


def _claims_of_repeats(summary: Summary) -> Iterator[Claim]:
    """The standard error bounds how far one run's median ratio is from the mean over runs."""
    far = {
        f"{r['estimator']} on {r['workload']}": (r["n"] - 1) * r["se"] / r["mean"]
        for r in summary.results
        if r["part"] == "estimators" and r["metric"] == "median_ratio" and r["n"] > 1
        if r["workload"] in TARGETS and r["estimator"] in CORE
    }
    if far:
        worst = max(far, key=lambda name: far[name] if math.isfinite(far[name]) else math.inf)
        yield _claim(
            "every run's median ratio within 5 % of the mean over the runs",
            f"at most {evidence.shown(100 * far[worst], '.1f')} % away ({worst})",
            far[worst] <= 0.05,
            far[worst],
        )


def _claim(says: str, ours: str, holds: bool, *numbers: float) -> Claim:
    """A claim on one machine's times and sizes: plain numbers, without a spread over seeds."""
    return Claim(says, "our target", ours, evidence.told(bool(holds), *numbers))
