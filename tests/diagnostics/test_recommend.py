"""The recommendation against the truth, on problems whose errors are known in closed form.

Regret is the true error of what is recommended over the least true error of any estimator.
"""

import functools
from collections import Counter

import numpy as np
import pytest

from tests.diagnostics import closed_forms
from unrollgrad.diagnostics import (
    Measurements,
    StepCost,
    exact_windows,
    recommend,
    what_would_change,
)
from unrollgrad.diagnostics.windows import Windows

SEEDS = (1, 2)


@functools.cache
def problems():
    return closed_forms.family(0, repeats=9)


@functools.cache
def truths():
    return [closed_forms.truth(p) for p in problems()]


@functools.cache
def rankings(seed):
    """The rankings from simulated measurements with noise."""
    return [
        recommend(closed_forms.simulated(p, 10_000 * seed + i)) for i, p in enumerate(problems())
    ]


def named(row):
    return row.name, str(row.settings)


def regret(errors, name):
    least = min(errors.values())
    return errors[name] / least if least > 0 else (1.0 if errors[name] == 0 else np.inf)


def regrets(names):
    return np.array([regret(t, n) for t, n in zip(truths(), names, strict=True)])


def test_the_family_is_large_and_varied():
    assert len(problems()) >= 400
    best = Counter(min(t, key=lambda k, t=t: t[k])[0] for t in truths())
    assert len(best) >= 7, best  # no estimator is always the best
    assert max(best.values()) < 0.4 * len(problems())


def test_exact_inputs():
    """Without noise of measurement, and with episodes that do not differ."""
    same = [p._replace(data=0.0) for p in problems()[::4]]
    found = []
    for p in same:
        top = recommend(closed_forms.exact(p))[0]
        found.append(regret(closed_forms.truth(p), named(top)))
    assert np.median(found) == pytest.approx(1, abs=1e-9)
    assert np.quantile(found, 0.9) < 1.001
    assert max(found) < 2.5  # only some noise periods of 32 windows are candidates


@pytest.mark.parametrize("seed", SEEDS)
def test_regret(seed):
    found = regrets([named(r[0]) for r in rankings(seed)])
    assert np.median(found) <= 1.05
    assert np.quantile(found, 0.9) <= 1.5


def test_it_beats_fixed_choices():
    """Always ES-Single; always backpropagation where there is any; the best fixed choice."""
    found = np.log(regrets([named(r[0]) for r in rankings(1)]))
    one = ("es_single", "{}")

    def always(name):
        return [(name, "{}") if (name, "{}") in t else one for t in truths()]

    names = {name for t in truths() for name, settings in t if settings == "{}"}
    fixed = {n: np.minimum(np.log(regrets(always(n))), 50) for n in names}
    assert np.mean(found) < 0.25 * np.mean(fixed["es_single"])
    assert np.mean(found) < 0.25 * np.mean(fixed["bptt"])
    assert np.mean(found) < 0.25 * min(np.mean(x) for x in fixed.values())


def test_shuffled_measurements_raise_the_regret():
    """The negative control: every problem gets the ranking of another one of its size."""
    draws, groups = np.random.default_rng(0), {}
    for i, p in enumerate(problems()):
        groups.setdefault((*p.sizes(), p.differentiable), []).append(i)
    names = [None] * len(problems())
    for members in groups.values():
        for i, j in zip(members, draws.permutation(members), strict=True):
            names[i] = named(rankings(1)[j][0])
    right = regrets([named(r[0]) for r in rankings(1)])
    wrong = np.minimum(regrets(names), 1e20)
    assert np.quantile(wrong, 0.9) > 3 * np.quantile(right, 0.9)
    assert np.mean(np.log(wrong)) > 4 * np.mean(np.log(right))


def test_verdicts_do_not_flip():
    """Two seeds disagree only where one of them says that the two are tied."""
    flips = 0
    for a, b in zip(*map(rankings, SEEDS), strict=True):
        tied = {named(r) for r in a if r.tied} & {named(r) for r in b}
        other = {named(r) for r in b if r.tied} & {named(r) for r in a}
        same = named(a[0]) == named(b[0])
        flips += not (same or named(b[0]) in tied or named(a[0]) in other)
    assert flips <= 0.05 * len(problems())


def test_ties_are_rare_enough_to_say_something():
    """Not everything is tied: the first is alone, or with its equals, in half of the problems."""
    second = [{r.name for r in ranking if r.tied} - {"full_es"} for ranking in rankings(1)]
    assert np.mean([len(names) <= 2 for names in second]) > 0.5


def agreeing(dim, number, cosine):
    """Windows without memory whose gradients have equal norms and this cosine."""
    shared, own = np.sqrt(cosine), np.sqrt(1 - cosine)
    slopes = np.concatenate([np.full((number, 1), shared), own * np.eye(number)], axis=1)
    slopes = np.concatenate([slopes, np.zeros((number, max(0, dim - number - 1)))], axis=1)
    return np.eye(number)[..., None] * slopes[:, None]


@pytest.mark.parametrize("dim", [17, 50, 500])
def test_the_switch_between_pes_and_es_single(dim):
    """At the window cosine P / (2 (P + 1)), within 5 %."""
    number, cost = 16, StepCost(1.0, np.nan, np.nan)

    def prefers_pes(cosine):
        windows = exact_windows(agreeing(dim, number, cosine), 1)
        rows = recommend(Measurements(number, 1, 10, windows, None, cost, "a while_loop"))
        order = [r.name for r in rows if r.name in ("pes", "es_single")]
        return order[0] == "pes"

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if prefers_pes(middle) else (middle, high)
    assert high == pytest.approx(dim / (2 * (dim + 1)), rel=0.05)


def test_exact_ties_are_said_to_be_ties():
    """With one window all of the family are one estimator; derivatives without noise are, too."""
    p = closed_forms.problem(np.random.default_rng(0), 1, 5, "agree")
    rows = recommend(closed_forms.exact(p._replace(differentiable=False)))
    tied = {r.name for r in rows if r.tied}
    assert rows[0].name == "es_single"
    assert tied == {"es_single", "full_es"}  # one window: truncated_es pays for a third pass
    rows = recommend(closed_forms.exact(p._replace(differentiable=True, data=0.0)))
    assert {r.name for r in rows if r.tied} >= {"bptt", "forward_mode"}


def differentiable(**changes):
    p = closed_forms.problem(np.random.default_rng(3), 8, 5, "mixed")
    measured = closed_forms.exact(p._replace(differentiable=True, data=0.0))
    return measured._replace(**changes)


def test_nothing_inadmissible_is_recommended():
    plain = differentiable()
    d = plain.derivatives
    assert d is not None
    cases = {
        "not finite": differentiable(derivatives=d._replace(nonfinite=0.1)),
        "heavy tail": differentiable(derivatives=d._replace(tail=1e6)),
        "static horizon": differentiable(static_horizon=False),
        "exceed the limit": differentiable(
            memory_limit=1000, cost=plain.cost._replace(backprop_bytes=10_000, state_bytes=1)
        ),
    }
    assert recommend(plain)[0].name == "bptt"
    for reason, measured in cases.items():
        rows = recommend(measured)
        row = next(r for r in rows if r.name == "bptt")
        assert not row.admissible
        assert reason in row.reason
        assert np.isnan(row.nmse)
        assert rows[0].admissible
        assert rows[0].name != "bptt"
        shown = [r.admissible for r in rows]
        assert shown == sorted(shown, reverse=True)
    measured = cases["exceed the limit"]
    assert any("memory" in s for s in what_would_change(measured, recommend(measured)))


def test_a_bias_that_is_not_seen_is_not_taken_for_none():
    """Its standard error counts: with ever more workers an unbiased estimator is ahead."""
    p = closed_forms.problem(np.random.default_rng(5), 8, 20, "mixed")
    p = p._replace(differentiable=False, data=0.0)
    for workers, unbiased in ((4, False), (10**7, True)):
        rows = recommend(closed_forms.simulated(p._replace(num_workers=workers), 0))
        assert (rows[0].name != "truncated_es") == unbiased


def test_workers_for_a_signal_to_noise_ratio_of_one():
    p = closed_forms.problem(np.random.default_rng(0), 4, 5, "agree")
    rows = recommend(closed_forms.exact(p._replace(differentiable=False)))
    assert next(r for r in rows if r.name == "es_single").workers == pytest.approx(6)  # P + 1


def test_what_would_change_the_verdict():
    """The number of workers that it names is where the other one's error is as small."""
    p = closed_forms.problem(np.random.default_rng(5), 8, 20, "mixed")
    p = p._replace(differentiable=False, data=0.0, num_workers=40)
    measured = closed_forms.exact(p)
    rows = recommend(measured)
    line = next(x for x in what_would_change(measured, rows) if "workers or" in x)
    workers, name = float(line.split()[1]), line.split(", ")[1].split(" would")[0].split("(")[0]
    for factor in (0.8, 1.25):
        again = recommend(measured._replace(num_workers=int(workers * factor)))
        position = [r.name for r in again].index
        ahead = position(name) < position(rows[0].name)
        assert ahead == ((factor > 1) == ("more" in line))


def test_windows_without_episodes_of_their_own():
    """``Windows`` of one episode: no data noise can be told, and none is invented."""
    windows = exact_windows(agreeing(6, 4, 0.5), 1)
    assert isinstance(windows, Windows)
    assert windows.cosine() == (pytest.approx(0.5), 0.0)
