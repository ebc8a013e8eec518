"""What a diagnosis measures follows the budget, down to a floor. No programs."""

import itertools

import pytest

from unrollgrad.diagnostics._plan import AT_ONCE, MOST, SHARE, plan_of

WINDOWS = (1, 4, 5, 10, 25, 100)


@pytest.mark.parametrize("num_windows", WINDOWS)
def test_within_the_budget(num_windows):
    for num_workers in (21, 24, 32, 64, 256, 4096):
        budget = SHARE * 100 * 2 * num_workers
        plan = plan_of(num_windows, num_workers)
        assert plan.unrolls() <= budget
        full = plan.directions == MOST
        assert full or plan.unrolls() > 0.7 * budget  # it is used


@pytest.mark.parametrize("num_windows", WINDOWS)
def test_cheap_steps_differentiate_more_episodes(num_windows):
    """As many at once as the pairs' program has copies."""
    plain, cheap = plan_of(num_windows, 32), plan_of(num_windows, 32, 40.0)
    assert plain.directions == cheap.directions
    assert cheap.rounds >= 16 > plain.rounds
    assert cheap.rounds % cheap.rounds_at_once == 0
    copies = AT_ONCE * (2 * cheap.lanes + 1)
    assert 0.6 * copies < 2 * cheap.directions * cheap.rounds_at_once <= copies
    assert plan_of(num_windows, 32, 1e4) == plain


@pytest.mark.parametrize("num_windows", WINDOWS)
def test_the_floor(num_windows):
    """Four directions with two episodes each, whatever is paid for."""
    least = plan_of(num_windows, 1)
    assert (least.directions, least.rounds) == (4, 2)
    assert least.unrolls() <= 416


def test_more_workers_never_measure_less():
    plans = [plan_of(10, n) for n in range(1, 300)]
    for a, b in itertools.pairwise(plans):
        assert b.unrolls() >= a.unrolls() - 100  # finer stretches take some directions away
        assert b.stretches >= a.stretches
        assert b.directions % 2 == 0
