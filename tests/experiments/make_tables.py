"""Small tables of every experiment, for ``test_tables.py``, from recorded folders of results.

Run ``python -m tests.experiments.make_tables FOLDER...`` from the root of the repository. For each
folder's experiment it writes ``tables/NAME``: the thinned table; the config; and the claims and the
picture's lines, which somebody has to check. For a new experiment pass the folder of a smoke run
with two seeds. With an experiment's name in place of a folder it keeps the table.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.__main__ import EXPERIMENTS
from experiments._framework import results
from experiments._framework.results import Record, Summary

TABLES = Path(__file__).with_name("tables")
SEEDS = 3
STEPS = 5
"""The number of points kept of a curve, including the last."""
RATES = 3
"""The number of step sizes kept of a grid, for each method."""
SIDE = 3
"""The number of cells kept of a grid over two parameters."""


class Fewer(NamedTuple):
    """Further rows to leave out of a table.

    Attributes:
        labels: The values that are kept, by label.
        whole: Metrics for which every step is kept.
        config: Changes to the config that describe the smaller table.
    """

    labels: Mapping[str, list[str]] = MappingProxyType({})
    whole: tuple[str, ...] = ()
    config: Mapping[str, Any] = MappingProxyType({})


TERMS = [1, 5, 11, 50, 800]
OPTIMIZERS = [f"Adam {rate}" for rate in ("0.0001", "0.01", "0.139")]
OPTIMIZERS += ["SGD 0.1", "SGD 1.39", "momentum 0.01", "momentum 0.139"]
OPTIMIZERS += ["scheduled_adam", "scheduled_adam_mlps"]
FEWER = {
    "apo_learning_rate": Fewer({"base": ["SGD"]}, config={"points": STEPS}),
    "benchmark": Fewer({"workload": ["tiny", "leaky", "learned", "implicit"]}),
    "distillation": Fewer(whole=("pixel",)),
    "evaluate_optimizer": Fewer({"family": ["mlp"], "optimizer": OPTIMIZERS}),
    "hypergradient_quality": Fewer({"terms": [str(k) for k in TERMS]}, config={"terms": TERMS}),
    "l2_regression": Fewer({"start": ["-5", "5"]}),
    "reward_digits": Fewer(whole=("pixel",)),
    "reward_mixture": Fewer(whole=("share",)),
    "warm_vs_cold": Fewer(whole=("target", "x", "y")),
}


def find(name: str) -> tuple[list[Record], Summary]:
    """The table of an experiment, and its summary, as a run makes it.

    Raises:
        FileNotFoundError: If there is no table.
    """
    folder = TABLES / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; see {__file__} for how it is made.")
    config, records = results.read_json(folder / "config.json"), results.read(folder)
    about = {"experiment": name, "seeds": config["seeds"], "config": config}
    return records, Summary(results.from_json(_strict(results.summarise(records))), about)


def _strict(found: list[dict]) -> list[dict]:
    """Numbers as in strict JSON: null replaces numbers that are not finite."""
    return [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in r.items()}
        for r in found
    ]


def make(source: Path) -> Path:
    """Writes the table, the config and the claims for a folder of results."""
    config, records = results.read_json(source / "config.json"), results.read(source)
    experiment = EXPERIMENTS[config["experiment"]]
    config["seeds"] = config["seeds"][:SEEDS]
    config.update(FEWER.get(experiment.name, Fewer()).config)
    folder = TABLES / experiment.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results.write_json(folder / "config.json", config)
    with results.writer(folder, experiment.labels) as write:
        for r in thinned(records, experiment.name, config["seeds"]):
            step = {} if r.step is None else {"step": r.step}
            write(r.seed, {**r.labels, **step, r.metric: float(f"{r.value:.9g}")})
    return expect(experiment.name, source.name)


def again(name: str) -> Path:
    """Writes the claims and the picture's lines of a table that is there, after a change of text.

    Somebody has to check them.
    """
    stored = results.read_json(TABLES / name / "expected.json")
    return expect(name, stored["source"])


def expect(name: str, source: str) -> Path:
    """Writes ``expected.json`` beside an experiment's table."""
    experiment, (records, summary) = EXPERIMENTS[name], find(name)
    claims = [list(claim) for claim in experiment.claims(summary)]
    lines = lines_of(experiment.draw(records, summary.about["config"]))
    found = {"source": source, "claims": claims, "lines": lines}
    text = re.sub(r"\n {3,}", " ", json.dumps(found, indent=1, ensure_ascii=False))
    (TABLES / name / "expected.json").write_text(text + "\n")
    return TABLES / name


def lines_of(figure: Any) -> list[list[list[Any]]]:
    """For each axis, each line's label, number of points, and mean x and y."""
    return [
        [[_name(line.get_label()), *_means(line.get_xydata())] for line in axis.lines]
        for axis in figure.axes
    ]


def _name(label):
    return "" if label.startswith("_") else label  # a label made by matplotlib


def _means(points: np.ndarray) -> list[float]:
    finite = points[np.isfinite(points).all(axis=1)]
    return [len(points), *(float(f"{x:.5g}") for x in (finite.mean(axis=0) if len(finite) else ()))]


def thinned(records: list[Record], name: str, seeds: list[int]) -> list[Record]:
    """Keeps few seeds, few steps of each curve, few rates, few cells of each grid."""
    records = [r for r in records if r.seed in seeds]
    fewer = FEWER.get(name, Fewer())
    for label, values in fewer.labels.items():
        records = [r for r in records if r.labels[label] in values]
    records = _few_rates(records)
    steps: dict[tuple, dict[int | None, None]] = {}  # ordered sets
    grids: dict[tuple, dict[int, dict[str, float]]] = {}
    for r in records:
        steps.setdefault(_series(r), {})[r.step] = None
        if r.labels.get("estimator") == "grid" and r.step is not None:
            grids.setdefault(_run(r), {}).setdefault(r.step, {})[r.metric] = r.value
    cells = {run: _few_cells(grid) for run, grid in grids.items() if "log_theta0" in grid[0]}
    kept = {series: _few(list(found)) for series, found in steps.items()}
    return [
        r
        for r in records
        if r.metric in fewer.whole or r.step in (None, *cells.get(_run(r), kept[_series(r)]))
    ]


def _run(r):
    return r.seed, *r.labels.values()


def _series(r):
    return *_run(r), r.metric


def _few(steps):
    stride = max(1, len(steps) // STEPS)
    return steps[::-1][::stride]


def _few_rates(records):
    """Keeps the first, a middle and the last rate for each method of each case."""
    found: dict[tuple, list[str]] = {}
    for r in records:
        if "rate" in r.labels:
            line = found.setdefault(_case(r), [])
            if r.labels["rate"] not in line:
                line.append(r.labels["rate"])
    few = {case: line[:: max(1, len(line) // RATES)] for case, line in found.items()}
    return [r for r in records if "rate" not in r.labels or r.labels["rate"] in few[_case(r)]]


def _case(r):
    return tuple(v for k, v in r.labels.items() if k != "rate")


def _few_cells(grid):
    values = {}
    for metric in ("log_theta0", "log_theta1"):
        line = sorted({cell[metric] for cell in grid.values()})
        values[metric] = line[:: max(1, (len(line) - 1) // (SIDE - 1))]
    return [step for step, cell in grid.items() if all(cell[k] in v for k, v in values.items())]


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(again(given) if (TABLES / given).is_dir() else make(Path(given)))
