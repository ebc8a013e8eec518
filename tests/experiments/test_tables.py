"""``draw``, ``show`` and ``claims`` of every experiment, on small tables; nothing is compiled.

The experiments are those of ``experiments/__main__.py``; ``make_tables.py`` makes their tables.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping

import matplotlib.text
import numpy as np
import pytest

from experiments.__main__ import EXPERIMENTS, TOPICS
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary, from_json
from tests.experiments.make_tables import TABLES, find, lines_of
from tests.helpers import counted

METHODS = ("estimator", "method", "optimizer", "kind", "series", "remat", "layout", "decay")
"""Labels whose values are the methods that an experiment compares."""

ONLY_BEST = ("SGD 0.1", "momentum 0.01", "Adam 0.0001", "Adam 0.139")
NOT_SHOWN = {
    "attribution": ("training",),
    "evaluate_optimizer": ONLY_BEST,
    "global_lr": ("grid",),
    "toy_regression": ("surface",),
    "warm_vs_cold": ("real",),
}
NOT_DRAWN = {
    "apo_cost": ("fixed preconditioner",),
    "attribution": ("training",),
    "benchmark": ("neumann", "CG"),
    "distillation": ("identity, gain", "CG, gain"),
    "evaluate_optimizer": ONLY_BEST,
    "global_lr": ("grid", "pes / es_single"),
    "lr_schedule": ("grid",),
    "telescoping": ("grid",),
    "toy_regression": ("surface",),
    "warm_vs_cold": ("re-trained, best", "neumann", "minimum", "both"),
}
"""Methods that a picture leaves out or names differently."""

UNKNOWN = re.compile("diverged|not finite")
"""Words of a claim about a series that is not finite."""

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


SEVERAL = re.compile("over seeds|[0-9] seeds")
"""Words about several seeds."""


@every_experiment
def test_one_seed_is_not_called_several(name):
    """A picture of one seed's run speaks of no spread over seeds."""
    records, summary = table(name)
    first = [r for r in records if r.seed == summary.about["seeds"][0]]
    figure = EXPERIMENTS[name].draw(first, summary.about["config"])
    words = "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    assert not SEVERAL.search(words), words


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
"""Other means: one of them is on the other side of whatever is claimed."""

FAR = 1e-3
"""A spread over seeds, relative to the mean, that lets a claim decide."""


def decisive(results: list[dict]) -> list[dict]:
    """The results of five seeds that hardly differ, so that no claim says "cannot tell"."""
    return [
        {
            **r,
            "mean": FAR * r["mean"] if r["metric"].split("[")[0].endswith("_se") else r["mean"],
            "se": FAR * abs(r["mean"]),
            "n": 5,
        }
        for r in results
    ]


def verdicts(name: str, results: list[dict], about: dict) -> list[Claim]:
    """The claims about the results."""
    with np.errstate(all="ignore"):  # the logarithm of a negative number
        return EXPERIMENTS[name].claims(Summary(results, about))


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
    for base in (summary.results, decisive(summary.results)):
        claims = verdicts(name, base, summary.about)
        left = {claim.says: claim.holds for claim in claims if claim.holds is not None}
        for results in changed(base, EXPERIMENTS[name].labels):
            if not left:
                break
            found = {claim.says: claim.holds for claim in verdicts(name, results, summary.about)}
            left = {says: holds for says, holds in left.items() if found.get(says, holds) == holds}
        assert left == {}


def series_of(results: list[dict]) -> list[list[int]]:
    """Places of the results, in groups that diverge together: a method with all its rates.

    A single rate that diverges is no news: the others are left to choose from.
    """
    groups: dict[tuple, list[int]] = {}
    for place, r in enumerate(results):
        labels = {k: v for k, v in r.items() if k not in ("mean", "se", "n", "rate")}
        groups.setdefault(tuple(labels.items()), []).append(place)
    return list(groups.values())


def with_means(
    results: list[dict], places: list[int], change: Callable[[float], float | None]
) -> list[dict]:
    """The results with other means in some places; a null is read as a summary's file is."""
    out = list(results)
    for place in places:
        mean = change(results[place]["mean"])
        known = mean is not None and math.isfinite(mean)
        out[place] = {**results[place], "mean": mean, "se": results[place]["se"] if known else None}
    return from_json(out)


@every_experiment
def test_a_run_that_diverged_decides_nothing(name):
    """Each series in turn is not finite: no claim raises, disappears, or holds silently.

    A claim that prints the series says that it diverged. A claim whose verdict another mean of the
    series changes cannot tell, or, if something else contradicts it, still does not hold. Where
    nothing is finite, nothing is told.
    """
    _, summary = table(name)
    _check_diverged(name, summary.results, {})
    opposites = {kind: CHANGES[kind] for kind in ("tiny", "huge", "negative")}
    _check_diverged(name, decisive(summary.results), opposites)


def _check_diverged(name, base, changes):
    about = table(name)[1].about
    before = verdicts(name, base, about)
    unmoved = set(range(len(before)))
    for places in series_of(base):
        after = verdicts(name, with_means(base, places, lambda mean: math.nan), about)
        others = [verdicts(name, with_means(base, places, f), about) for f in changes.values()]
        for i, (claim, was) in enumerate(zip(after, before, strict=True)):
            where = f"{base[places[0]]} in {was}: {claim}"
            moves = any(other[i].holds != was.holds for other in others)
            assert claim.says == was.says, where
            assert claim == was or UNKNOWN.search(claim.ours), where
            assert claim.holds in (was.holds, None), where
            assert not (moves and claim.holds), where
            unmoved -= {i} if claim != was else set()
    assert not unmoved, [before[i] for i in unmoved]
    everything = list(range(len(base)))
    for unknown in (lambda mean: math.nan, lambda mean: None):  # null in a summary's file
        nothing = verdicts(name, with_means(base, everything, unknown), about)
        assert {claim.holds for claim in nothing} <= {None}


def _bad_claims(kind):
    """Claims that a run which diverged deceives: "pes's loss is not above 1", and the like."""

    def claims(summary):
        ends = {r["estimator"]: r["mean"] for r in summary.results if r["metric"] == "loss"}
        if kind == "raises":
            return [Claim("", "", f"{round(ends['pes'])}", ends["pes"] < 1)]
        known = {k: x for k, x in ends.items() if math.isfinite(x)}
        if kind == "disappears":
            return [Claim(f"{k}", "", f"{x}", x < 1) for k, x in known.items()]
        if kind == "holds silently":
            return [Claim("", "", "diverged", not any(x > 1 for x in ends.values()))]
        return [Claim("", "", f"{ends['pes']}", None if math.isnan(ends["pes"]) else True)]

    return claims


@pytest.mark.parametrize("kind", ["raises", "disappears", "holds silently", "does not say so"])
def test_a_claim_that_is_deceived_is_found(kind, monkeypatch):
    """Negative control of the test above."""
    name = "influence_balancing"
    monkeypatch.setitem(EXPERIMENTS, name, EXPERIMENTS[name]._replace(claims=_bad_claims(kind)))
    with pytest.raises(ValueError if kind == "raises" else AssertionError):
        _check_diverged(name, decisive(table(name)[1].results), CHANGES)


@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if "rate" in e.labels])
def test_a_rate_that_diverged_is_not_chosen(name):
    """One rate of a grid in turn is not finite: no claim raises or disappears."""
    _, summary = table(name)
    says = [claim.says for claim in verdicts(name, summary.results, summary.about)]
    for place in range(len(summary.results)):
        results = with_means(summary.results, [place], lambda mean: math.nan)
        assert [claim.says for claim in verdicts(name, results, summary.about)] == says


FEW_SEEDS = {
    **dict.fromkeys(TOPICS["cost"], "times of one machine; a seed would draw nothing"),
    **dict.fromkeys(TOPICS["tools"], "a user's own runs; errors are over the samples"),
    "control_tuning": "it chooses settings and makes no claim",
    "implicit_bias": "nothing is drawn",
    "long_run_variance": "errors are over the samples of all seeds together",
}
"""Experiments that need no five seeds, and why."""


@every_experiment
def test_claims_rest_on_five_seeds(name):
    """The seeds of the defaults, and of the published settings, which are four in some papers."""
    scales = EXPERIMENTS[name].scales
    assert len(scales["cpu"].seeds) >= (1 if name in FEW_SEEDS else 5)
    assert len(scales["paper"].seeds) >= (1 if name in FEW_SEEDS else 4)
