"""How much a diagnosis measures: what a tenth of 100 updates pays for."""

from typing import NamedTuple

import numpy as np

from unrollgrad.diagnostics.windows import EPISODES, stretch_length

__all__ = ["AT_ONCE", "SIGMAS", "Plan", "plan_of"]

SHARE = 0.1
"""The part of a run of 100 updates that a diagnosis may cost."""

FEWEST, ENOUGH, MOST = 4, 8, 32
"""Random directions: always, before an episode is cut more finely, and at most."""

STRETCHES = (5, 10)
"""The fewest and the most stretches into which an episode of many windows is cut."""

SIGMAS = (6, 8)
"""The fewest and the most values of sigma that are compared."""

ROUNDS = 16
"""The most episodes for each direction that are differentiated."""

BACKWARD, TANGENT = 8, 6
"""What counts for a step that is differentiated, in steps forwards: the plan is made unseen.

Measured on ``digits``; few copies at once take longer each than the many of the pairs' program.
"""

CHEAP = 1e5
"""Floating-point operations that take no longer than the start of a step: more copies are free."""

AT_ONCE = 4
"""Episodes that are probed side by side, each with both signs of all lanes."""


class Plan(NamedTuple):
    """How much is measured: fixed before anything is timed, so that a key gives the same numbers.

    Attributes:
        stretches: The most stretches into which the episode is cut.
        lanes: Perturbed copies of an episode; each is a pair.
        directions: Random directions, an even number.
        rounds: Episodes for each direction that are differentiated; pairs run in the first two.
        rounds_at_once: Rounds in one call; divides ``rounds``.
    """

    stretches: int
    lanes: int
    directions: int
    rounds: int
    rounds_at_once: int = 1

    def unrolls(self) -> int:
        """What it costs, in unrolls forwards of whole episodes."""
        paired = 2 * AT_ONCE + EPISODES * self.directions  # the sweep's, and the windows'
        differentiated = 2 * BACKWARD * self.rounds * self.directions
        return paired * (2 * self.lanes + 1) + differentiated + 2 * TANGENT * AT_ONCE


def plan_of(num_windows: int, num_workers: int, flops: float = np.inf) -> Plan:
    """As many stretches, directions and episodes as the budget allows, in this order.

    Where a step has so few ``flops`` that its copies are free, more episodes are differentiated, as
    many at once as the pairs' program has copies: so both are timed alike, and rare large gradients
    are seen.
    """
    budget, plan = SHARE * 100 * 2 * num_workers, Plan(0, 0, 0, 0)
    for stretches in range(STRETCHES[1], STRETCHES[0] - 1, -1):
        number = -(-num_windows // stretch_length(num_windows, stretches))
        plan = Plan(stretches, max(SIGMAS[0], number + 2), 0, EPISODES)
        each = plan._replace(directions=1).unrolls() - plan.unrolls()
        plan = plan._replace(directions=int((budget - plan.unrolls()) // each) // 2 * 2)
        if plan.directions >= ENOUGH:
            break
    plan = plan._replace(directions=int(np.clip(plan.directions, FEWEST, MOST)))
    more = int(budget - plan.unrolls()) // (2 * BACKWARD * plan.directions)
    free = int(CHEAP / max(flops, 1)) // (2 * BACKWARD * plan.directions)
    if free <= max(more, 0) + EPISODES:
        return plan._replace(rounds=int(np.clip(EPISODES + more, EPISODES, ROUNDS)))
    at_once = min(max(AT_ONCE * (2 * plan.lanes + 1) // (2 * plan.directions), 1), free)
    rounds = -(-min(free, ROUNDS) // at_once) * at_once
    return plan._replace(rounds=rounds, rounds_at_once=at_once)
