"""``training.side_by_side``: curves of methods that end, diverge or are interrupted."""

import os
import signal

import jax
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments._framework import training

pytestmark = pytest.mark.experiments

PROBLEM, THETA = ug.problems.influence_balancing(horizon=100)
WORKERS = ug.average(ug.pes(PROBLEM, truncation=1, sigma=0.1), 4)
GOOD, BAD = (training.Method(WORKERS, optax.sgd(rate), 7) for rate in (1e-4, 1e30))


def lines(methods, interrupted_at=None):
    """The lines of the methods; Ctrl-C comes with that evaluation."""
    written, count = [], 0

    def evaluate(theta):
        nonlocal count
        count += 1
        if count == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)
        return {"theta": theta}

    plan = training.Plan(methods, evaluate, points=3)
    key = jax.random.key(0)
    try:
        training.side_by_side(plan, key, THETA, written.append, lambda text, done: None)
    except KeyboardInterrupt:
        written.append("interrupted")
    return written


def test_a_method_that_diverges_does_not_stop_the_next():
    found = lines({"bad": BAD, "good": GOOD})
    assert [(x["estimator"], x["step"]) for x in found] == [
        (name, step) for name in ("bad", "good") for step in (0, 3, 6, 7)
    ]
    assert np.isnan([float(x["theta"]) for x in found[1:4]]).all()
    assert np.isfinite([float(x["theta"]) for x in found[4:]]).all()
    assert [x["inner_steps"] for x in found[4:]] == [0, 24, 48, 56]
    state, theta = WORKERS.init(jax.random.key(1), THETA), THETA
    for i in range(3):
        estimate, state = WORKERS.estimate(jax.random.fold_in(jax.random.key(0), i), theta, state)
        theta = theta - 1e-4 * estimate.grad
    np.testing.assert_allclose(found[5]["theta"], theta, rtol=1e-6)


@pytest.mark.parametrize(("evaluation", "steps"), [(2, [0, 3]), (4, [0, 3, 6, 7])])
def test_ctrl_c_ends_all_and_loses_nothing(evaluation, steps):
    """Evaluation 4 is the first method's last: ``fit`` itself would go on as if nothing were."""
    *found, last = lines({"first": GOOD, "second": GOOD}, evaluation)
    assert last == "interrupted"
    assert [(x["estimator"], x["step"]) for x in found] == [("first", step) for step in steps]
