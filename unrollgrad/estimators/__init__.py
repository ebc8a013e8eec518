"""The estimators, and the registry of them that feeds tests, command line and README."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from unrollgrad.estimators.backprop import bptt, tbptt
from unrollgrad.estimators.evolution import es_single, full_es, gpes, pes, truncated_es
from unrollgrad.types import GradientEstimator, UnrolledProblem

__all__ = [
    "REGISTRY",
    "Row",
    "bptt",
    "es_single",
    "full_es",
    "gpes",
    "pes",
    "tbptt",
    "truncated_es",
]


class Row(NamedTuple):
    """What the README says of an estimator, and how to build it from common settings.

    Attributes:
        factory: ``factory(problem, *, ...)``.
        unbiased_for: What its mean over an episode's windows is the gradient of; "biased" if none.
        variance: Per pair, of the mean over an episode's n windows, for quadratic losses; P is
            dim(theta), g the gradient.
        passes: Forward passes over a window for N pairs: ``info.inner_steps`` of one worker is
            ``passes(num_pairs)`` times the steps of a call.
        time: Inner steps per call for N pairs; K the truncation, T the horizon, B the cost of a
            backward step.
        memory: Beyond the problem's own, in states S and thetas P.
        paper: Where it comes from.
        reverse_mode: Whether it differentiates ``step`` in reverse mode.
    """

    factory: Callable[..., GradientEstimator]
    unbiased_for: str
    variance: str
    passes: Callable[[int], int]
    time: str
    memory: str
    paper: str
    reverse_mode: bool = False

    def takes(self, setting: str) -> bool:
        """Whether the factory has this keyword."""
        return setting in inspect.signature(self.factory).parameters

    def build(self, problem: UnrolledProblem, **settings: Any) -> GradientEstimator:
        """Calls the factory with those of the settings that it takes."""
        return self.factory(problem, **{k: v for k, v in settings.items() if self.takes(k)})


def _both_signs(num_pairs: int) -> int:
    return 2 * num_pairs


def _once(num_pairs: int) -> int:
    return 1


REGISTRY: dict[str, Row] = {
    "full_es": Row(
        full_es,
        unbiased_for="smoothed J",
        variance="(P+1)‖g‖²",
        passes=_both_signs,
        time="2NT",
        memory="2NS + 3NP",
        paper="Salimans et al. 2017",
    ),
    "truncated_es": Row(
        truncated_es,
        unbiased_for="biased",
        variance="(P+1)/n × mean over windows of ‖own g‖²",
        passes=lambda num_pairs: 2 * num_pairs + 1,
        time="(2N+1)K",
        memory="(2N+1)S + 3NP",
        paper="Metz et al. 2019",
    ),
    "pes": Row(
        pes,
        unbiased_for="smoothed J",
        variance="≈ (P/2)‖g‖² where windows agree, × n where they conflict",
        passes=_both_signs,
        time="2NK",
        memory="2NS + 4NP",
        paper="Vicol et al. 2021",
    ),
    "es_single": Row(
        es_single,
        unbiased_for="smoothed J",
        variance="(P+1)‖g‖²",
        passes=_both_signs,
        time="2NK",
        memory="2NS + 3NP",
        paper="Vicol et al. 2023; Li et al. 2023 (NRES)",
    ),
    "gpes": Row(
        gpes,
        unbiased_for="smoothed J",
        variance="usually between pes and es_single",
        passes=_both_signs,
        time="2NK",
        memory="2NS + 4NP",
        paper="Li et al. 2023",
    ),
    "bptt": Row(
        bptt,
        unbiased_for="J",
        variance="of the data alone",
        passes=_once,
        time="T(1+B)",
        memory="TS",
        paper="Werbos 1990",
        reverse_mode=True,
    ),
    "tbptt": Row(
        tbptt,
        unbiased_for="biased",
        variance="of the data alone",
        passes=_once,
        time="K(1+B)",
        memory="KS",
        paper="Williams & Peng 1990",
        reverse_mode=True,
    ),
}
