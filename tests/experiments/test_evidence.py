"""The tests behind the claims: their level where nothing differs, their power, and what is unknown.

Nothing is compiled.
"""

import math

import numpy as np
import pytest
from scipy import stats

from experiments._framework import curves, evidence, results

REPEATS = 4000
"""Comparisons of each simulation; the standard error of a share of 5 % is 0.35 %."""

LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(2, size=shape),
    "skewed": lambda rng, shape: rng.lognormal(sigma=1.5, size=shape),
    "few values": lambda rng, shape: rng.integers(0, 3, size=shape),
}


def result(values):
    """A result as ``results.summarise`` makes it."""
    values = np.asarray(values, float)
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(values.mean()), "se": se, "n": n}


def shares(rule, draw, seeds):
    """How often a rule says "yes" where two methods have one law."""
    values = draw(np.random.default_rng(0), (REPEATS, 2, seeds))
    return np.mean([rule(result(a), result(b)) is True for a, b in values])


def new(a, b):
    return evidence.less(a, b).holds


def sum_of_errors(a, b):
    return b["mean"] - a["mean"] > a["se"] + b["se"]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("law", LAWS)
def test_at_most_five_percent_say_yes_where_nothing_differs(law, seeds):
    """Both ways: "yes" and "no" are the same test of opposite relations."""
    error = math.sqrt(evidence.SURE * (1 - evidence.SURE) / REPEATS)
    for rule in (new, lambda a, b: evidence.more(b, a, 1.0).holds):
        assert shares(rule, LAWS[law], seeds) <= evidence.SURE + 2 * error


@pytest.mark.parametrize("seeds", [3, 5])
def test_shuffled_labels_say_yes_in_at_most_five_percent(seeds):
    """Two methods that differ by four standard deviations, until their runs' labels are mixed."""
    rng = np.random.default_rng(1)
    runs = rng.normal(size=(REPEATS, 2, seeds)) + np.array([[0.0], [4.0]])
    shuffled = rng.permuted(runs.reshape(REPEATS, -1), axis=1).reshape(runs.shape)
    yes = {
        name: [new(result(a), result(b)) is True for a, b in values]
        for name, values in (("labels", runs), ("shuffled", shuffled))
    }
    assert np.mean(yes["labels"]) > 0.8
    assert np.mean(yes["shuffled"]) <= evidence.SURE + 2 * math.sqrt(0.05 * 0.95 / REPEATS)


@pytest.mark.parametrize("law", LAWS)
def test_the_rule_before_said_yes_in_far_more(law):
    """Negative control of the simulation: a gap of more than the sum of both standard errors."""
    assert shares(sum_of_errors, LAWS[law], 3) > 1.7 * evidence.SURE


@pytest.mark.parametrize(
    ("law", "least", "most"),
    [("normal", 0.03, 0.06), ("heavy", 0.0, 0.06), ("skewed", 0.3, 0.45)],
)
def test_one_sample_at_its_bound(law, least, most):
    """The level is 5 % for symmetric laws; the known limit of a t-test is a skewed one."""
    mean = math.exp(1.5**2 / 2) if law == "skewed" else 0.0
    samples = LAWS[law](np.random.default_rng(4), (REPEATS, 5))
    below = np.mean([evidence.below(result(x), mean).holds is True for x in samples])
    above = np.mean([evidence.above(result(x), mean).holds is True for x in samples])
    assert least <= below <= most
    assert above <= 0.06


def test_a_difference_is_found():
    """Power: five seeds find three standard deviations, nearly always."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(500, 2, 5)) + np.array([[0.0], [3.0]])
    assert np.mean([new(result(a), result(b)) is True for a, b in values]) > 0.95
    assert np.mean([new(result(b), result(a)) is False for a, b in values]) > 0.95


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_p_is_scipys(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        a, b = rng.normal(size=n), 1 + 3 * rng.normal(size=n + 1)
        expected = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
        found = evidence.less(result(a), result(b))
        assert found.text.endswith(f"(p = {expected:.2g})")
        half = stats.ttest_ind(a, 0.5 * b, equal_var=False, alternative="less").pvalue
        assert evidence.less(result(a), result(b), 0.5).text.endswith(f"(p = {half:.2g})")
        one = stats.ttest_1samp(a, 0.3, alternative="greater").pvalue
        assert evidence.above(result(a), 0.3).text.endswith(f"(p = {one:.2g})")


def test_the_p_depends_neither_on_scale_nor_on_shift():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 9.0, 10.0])
    text = evidence.less(result(a), result(b)).text[-10:]
    for scale in (1e-120, 1e120):
        assert evidence.less(result(scale * a), result(scale * b)).text[-10:] == text


@pytest.mark.parametrize(
    ("n", "holds"), [(2, None), (3, True), (5, True)], ids=["2 seeds", "3 seeds", "5 seeds"]
)
def test_two_samples_without_spread_are_told_apart_by_ranks(n, holds):
    low, high = result([4.0] * n), result([5.0] * n)
    found = evidence.less(low, high)
    assert found == (holds, f"4 against 5 (p = {1 / math.comb(2 * n, n):.2g})")
    assert evidence.less(high, low).holds == (None if holds is None else False)
    assert evidence.less(low, low).holds is None


@pytest.mark.parametrize(("n", "holds"), [(3, None), (5, True)], ids=["3 seeds", "5 seeds"])
def test_one_sample_without_spread_is_told_from_a_bound_by_its_signs(n, holds):
    found = result([4.0] * n)
    assert evidence.below(found, 5.0) == (holds, f"4 (p = {0.5**n:.2g})")
    assert evidence.above(found, 5.0).holds == (None if holds is None else False)


UNKNOWN = {
    "a seed diverged": {"mean": math.nan, "se": math.nan, "n": 3},
    "infinite": {"mean": math.inf, "se": math.nan, "n": 3},
    "no spread known": {"mean": 1.0, "se": math.nan, "n": 3},
    "one seed": {"mean": 1.0, "se": None, "n": 1},
    "one diverged seed": {"mean": math.nan, "se": None, "n": 1},
    "not run": None,
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_decides_nothing(case):
    """No test says yes or no, none raises, and the text says what happened."""
    unknown, known = UNKNOWN[case], result([100.0, 101.0, 102.0])
    findings = [
        evidence.less(unknown, known),
        evidence.less(known, unknown),
        evidence.more(unknown, known),
        evidence.below(unknown, 1e9),
        evidence.above(unknown, -1e9),
        evidence.within(unknown, -1e9, 1e9),
        evidence.agrees(unknown, -1e9, 1e9, blind=1e9),
        evidence.less(evidence.ratio(unknown, known), known),
        evidence.below(evidence.ratio(known, unknown), 1e9),
    ]
    assert {finding.holds for finding in findings} == {None}
    diverged = unknown is not None and not math.isfinite(unknown["mean"] or 0.0)
    word = "not run" if unknown is None else "diverged" if diverged else "1"
    for finding in findings[:7]:
        assert word in finding.text
        assert "nan" not in finding.text
    assert evidence.below(known, math.nan).holds is None


def test_a_range_needs_both_sides():
    found = result([1.0, 1.1, 1.2, 1.0, 1.1])
    assert evidence.within(found, 0.9, 1.3).holds is True
    assert evidence.within(found, 1.2, 1.3).holds is False
    assert evidence.within(found, 0.5, 1.0).holds is False
    assert evidence.within(found, 1.07, 1.3).holds is None


def test_an_equality_is_contradicted_or_too_coarse_or_agreed_with():
    found = {"mean": 1.1, "se": 0.05, "n": 100}
    assert evidence.agrees(found, 1.0, 1.0, blind=0.3).holds is True
    assert evidence.agrees(found, 1.0, 1.0, blind=0.04).holds is None
    assert evidence.agrees(found, 0.5, 0.9, blind=0.3).holds is False
    assert evidence.agrees(found, 2.0, 3.0, blind=0.01).holds is False
    assert evidence.agrees(found, 1.0, math.inf, blind=0.3).holds is True


def test_the_error_of_a_ratio_is_that_of_simulated_ratios():
    rng = np.random.default_rng(3)
    top, bottom = 3 + 0.1 * rng.normal(size=100_000), -2 + 0.05 * rng.normal(size=100_000)
    a, b = {"mean": 3.0, "se": 0.1, "n": 9}, {"mean": -2.0, "se": 0.05, "n": 5}
    found = evidence.ratio(a, b)
    assert found["mean"] == -1.5
    assert found["se"] == pytest.approx(np.std(top / bottom), rel=0.02)
    assert found["n"] == 5
    assert evidence.below(evidence.ratio(a, {"mean": 0.0, "se": 0.1, "n": 5}), 1.0).holds is None


def test_a_plain_number_that_is_not_finite_decides_nothing():
    assert evidence.told(True, 1.0) is True
    assert evidence.told(False, 1.0, 2.0) is False
    for unknown in (math.nan, math.inf):
        assert evidence.told(True, 1.0, unknown) is None
    assert evidence.told(True) is None


def test_all_of_several_findings():
    yes, no, maybe = (evidence.Finding(holds, "") for holds in (True, False, None))
    assert evidence.both(yes, yes) is True
    assert evidence.both(yes, maybe, no) is False
    assert evidence.both(yes, maybe) is None
    assert evidence.both() is None


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (1263.4, 38.0, "1263 ± 38"),
        (0.42151, 0.00131, "0.4215 ± 0.0013"),
        (91.96, 0.52, "91.96 ± 0.52"),
        (0.0996, 0.0996, "0.10 ± 0.10"),
        (0.0, 0.02, "0.000 ± 0.020"),
        (1.7e-12, 2e-12, "1.7e-12 ± 2e-12"),
        (1.26e5, 1.1e4, "1.26e+05 ± 1.1e+04"),
        (2423.2, 0.0, "2423"),
        (0.8, None, "0.8"),
        (5.0, 1e-9, "5 ± 1e-09"),
    ],
)
def test_a_mean_has_as_many_digits_as_its_error(mean, se, text):
    assert evidence.number({"mean": mean, "se": se, "n": 3}) == text


def test_equal_numbers_are_printed_without_an_error():
    """Their mean rounds; what is left over is no standard error."""
    assert evidence.number({"mean": 0.0128, "se": 9e-19, "n": 5}) == "0.0128"


def test_a_null_of_a_summary_is_not_a_number():
    """The standard error of one seed stays unknown."""
    found = [
        {"mean": None, "se": None, "n": 3},
        {"mean": None, "se": None, "n": 1},
        {"mean": 2.0, "se": None, "n": 1},
        {"mean": 2.0, "se": None, "n": 3},
    ]
    read = [(r["mean"], r["se"], r["n"]) for r in results.from_json(found)]
    nan = math.nan
    expected = [(nan, nan, 3), (nan, None, 1), (2.0, None, 1), (2.0, nan, 3)]
    assert str(read) == str(expected)


@pytest.mark.parametrize(("relation", "holds"), [("<", False), (">", True)])
def test_a_comparison_prints_the_named_estimator_first(relation, holds):
    rows = {"pes": [7.0, 8.0, 9.0], "es_single": [1.0, 1.5, 2.0]}
    found = [{"estimator": k, "metric": "length", **result(x)} for k, x in rows.items()]
    comparison = curves.Comparison("length", "pes", relation, "es_single", "says", "source")
    claim = curves.compare(results.Summary(found, {}), comparison)
    assert claim.holds is holds
    assert claim.ours.startswith("8.00 ± 0.58 against 1.50 ± 0.29 (p = ")
