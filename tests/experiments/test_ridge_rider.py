"""``python -m experiments ridge_rider`` at smoke scale, and how outcomes are counted."""

import dataclasses

import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.diagnosis import games, ridge_rider
from tests.helpers import present


def test_a_group_counts_if_it_has_both():
    kinds = np.array([[0, 1], [0, 0], [1, -1], [0, -1], [1, 1]])
    assert ridge_rider.both(kinds, 1) == 0.2
    assert ridge_rider.both(kinds, 2) == 1.0  # the last row has no partner
    with pytest.raises(ValueError, match="12 runs are more than 5 climbs have"):
        ridge_rider.both(kinds, 6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0)),
        ((0.9, 0.7, 0.2), (0.4, 0.8, 0.3)),
        ((0, 0, 0), (1, 1, 1)),
    ],
)
def test_rewards_equal_the_sum_over_rounds(first, second):
    discount, payoffs = 0.9, np.array([-1.0, -3.0, 0.0, -2.0])  # CC, CD, DC, DD
    joint = np.outer([first[0], 1 - first[0]], [second[0], 1 - second[0]]).ravel()
    total = np.zeros(2)
    for t in range(400):
        total += (
            (1 - discount)
            * discount**t
            * np.array([joint @ payoffs, joint[[0, 2, 1, 3]] @ payoffs])
        )
        new = np.zeros(4)
        for state, (mine, others) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            p, q = first[1 + others], second[1 + mine]
            new += joint[state] * np.outer([p, 1 - p], [q, 1 - q]).ravel()
        joint = new
    np.testing.assert_allclose(games.discounted(first, second, discount), total, rtol=1e-6)


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(ridge_rider.SCALES["smoke"], num_steps=100, out=tmp_path)
    folder = present(framework.execute(ridge_rider.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    well = {"problem": "double well", "method": "branches"}
    assert summary.find("both[2]", **well)["mean"] > 0.8
    assert summary.find("both[2]", problem="double well", method="no climb")["mean"] < 0.3
    assert ridge_rider.claims(summary)[0].holds
    assert "mixed game" in capsys.readouterr().out
