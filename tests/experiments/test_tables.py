"""``draw``, ``show`` and ``claims`` of every experiment, on small tables; nothing is compiled.

The experiments are those of ``experiments/__main__.py``; ``make_tables.py`` makes their tables.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping

import matplotlib.text
import numpy as np
import pytest

from experiments.__main__ import EXPERIMENTS
from experiments._framework.results import Record, Summary
from tests.experiments.make_tables import TABLES, find, lines_of
from tests.helpers import counted

METHODS = ("estimator", "method", "optimizer", "kind", "series", "remat", "layout", "decay")
"""Labels whose values are the methods that an experiment compares."""

ONLY_BEST = ("SGD 0.1", "momentum 0.01", "Adam 0.0001", "Adam 0.139")
NOT_SHOWN = {
    "evaluate_optimizer": ONLY_BEST,
    "global_lr": ("grid",),
    "toy_regression": ("surface",),
    "warm_vs_cold": ("real",),
}
NOT_DRAWN = {
    "apo_cost": ("fixed preconditioner",),
    "benchmark": ("neumann", "CG"),
    "data_cleaning": ("cleaning, trained anew",),
    "distillation": ("identity, gain", "CG, gain"),
    "evaluate_optimizer": ONLY_BEST,
    "global_lr": ("grid", "pes / es_single"),
    "lr_schedule": ("grid",),
    "telescoping": ("grid",),
    "toy_regression": ("surface",),
    "warm_vs_cold": ("re-trained, best", "neumann", "minimum", "both"),
}
"""Methods that a picture leaves out or names differently."""

every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)
table = functools.cache(find)


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    with counted() as programs:
        yield
    assert programs == [0]


def other(records: list[Record]) -> list[Record]:
    """The table with other numbers: every series is multiplied by its own factor."""
    series = {(*r.labels.values(), r.metric): i for i, r in enumerate(records)}
    factors = {key: 1 + 0.1 * (i + 1) / len(records) for key, i in series.items()}
    return [r._replace(value=r.value * factors[*r.labels.values(), r.metric]) for r in records]


def missing(name: str, text: str, left_out: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The methods that the text does not name."""
    found = {
        record.labels[label]
        for record in table(name)[0]
        for label in METHODS
        if label in EXPERIMENTS[name].labels
    }
    wanted = sorted(found - set(left_out.get(name, ())))
    return [x for x in wanted if not re.search(rf"(?<!\w){re.escape(x)}(?!\w)", text)]


def numbers(axis) -> np.ndarray:
    """All numbers drawn into an axis."""
    drawn = [line.get_xydata() for line in axis.lines]
    for collection in axis.collections:
        drawn += [collection.get_offsets(), *(path.vertices for path in collection.get_paths())]
        drawn += [] if collection.get_array() is None else [collection.get_array()]
    drawn += [patch.get_extents().get_points() for patch in axis.patches]
    drawn += [image.get_array() for image in axis.images]
    flat = [np.ma.filled(np.ma.asarray(x, float), np.nan).ravel() for x in drawn]
    return np.concatenate(flat) if flat else np.zeros(0)


@every_experiment
def test_draw(name):
    """The picture has the stored lines and names the methods; other numbers change it."""
    records, summary = table(name)
    figures = [
        EXPERIMENTS[name].draw(given, summary.about["config"])
        for given in (records, other(records))
    ]
    figures[0].draw_without_rendering()
    first, second = (
        [numbers(axis) for axis in figure.axes if axis.get_label() != "<colorbar>"]
        for figure in figures
    )
    for one, two in zip(first, second, strict=True):
        assert np.isfinite(one).any()
        assert one.shape != two.shape or not np.array_equal(one, two, equal_nan=True)
    stored = json.loads((TABLES / name / "expected.json").read_text())["lines"]
    for lines, expected in zip(lines_of(figures[0]), stored, strict=True):
        assert [(label, n) for label, n, *_ in lines] == [(label, n) for label, n, *_ in expected]
        for (_, _, *found), means in zip(lines, expected, strict=True):  # none if it diverged
            assert found == pytest.approx(means[2:], rel=1e-4, abs=1e-12)
    for axis in figures[0].axes:
        assert axis.images or axis.get_xlabel() + axis.get_ylabel() + axis.get_title()
    words = "\n".join(text.get_text() for text in figures[0].findobj(matplotlib.text.Text))
    assert missing(name, words, NOT_DRAWN) == []


@every_experiment
def test_show(name, capsys):
    """The text names the methods, and other results print other numbers."""
    records, _ = table(name)
    printed = []
    for given in (records, other(records)):
        EXPERIMENTS[name].show(given)
        printed.append(capsys.readouterr().out)
    assert missing(name, printed[0], NOT_SHOWN) == []
    assert printed[0] != printed[1]


CHANGES = {
    "less": lambda mean: mean and 1e-3 * mean,
    "more": lambda mean: mean and 1e3 * mean,
    "tiny": lambda mean: 1e-12,
    "huge": lambda mean: 1e9,
    "negative": lambda mean: -1e9,
}


def changed(results: list[dict], labels: tuple[str, ...]) -> Iterator[list[dict]]:
    """The results with other means for a metric, or for one label's rows of a metric."""
    for groups in ([()], [(label,) for label in labels]):
        for change, labels_of in itertools.product(CHANGES.values(), groups):
            keys = [(r["metric"], *(r[label] for label in labels_of)) for r in results]
            for chosen in dict.fromkeys(keys):
                yield [
                    {**r, "mean": change(r["mean"]), "se": 1e-3 * (r["se"] or 0)}
                    if key == chosen
                    else r
                    for key, r in zip(keys, results, strict=True)
                ]


@every_experiment
def test_claims(name):
    """The claims equal the stored ones, and other means change each verdict."""
    _, summary = table(name)
    claims = EXPERIMENTS[name].claims(summary)
    stored = json.loads((TABLES / name / "expected.json").read_text())["claims"]
    assert [list(claim) for claim in claims] == stored
    left = {claim.says: claim.holds for claim in claims if claim.holds is not None}
    with np.errstate(all="ignore"):  # the logarithm of a negative number
        for results in changed(summary.results, EXPERIMENTS[name].labels):
            if not left:
                break
            found = EXPERIMENTS[name].claims(Summary(results, summary.about))
            verdicts = {claim.says: claim.holds for claim in found}
            left = {
                says: holds for says, holds in left.items() if verdicts.get(says, holds) == holds
            }
    assert left == {}
