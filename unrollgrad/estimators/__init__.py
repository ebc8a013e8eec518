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
        time: Inner steps per call for N pairs; K the truncation, T the horizon, B the cost of a
            backward step.
        memory: Beyond the problem's own, in states S and thetas P.
        paper: Where it comes from.
        reverse_mode: Whether it differentiates ``step`` in reverse mode.
    """

    factory: Callable[..., GradientEstimator]
    unbiased_for: str
    variance: str
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


REGISTRY: dict[str, Row] = {
    "full_es": Row(full_es, "smoothed J", "(P+1)|g|²", "2NT", "2N(S+P)", "Salimans et al. 2017"),
    "truncated_es": Row(
        truncated_es,
        "biased",
        "(P+1)|window g|²",
        "(2N+1)K",
        "(2N+1)S + 2NP",
        "Metz et al. 2019",
    ),
    "pes": Row(
        pes,
        "smoothed J",
        "≈ (P/2)|g|² if windows agree; × n if they conflict",
        "2NK",
        "2NS + 3NP",
        "Vicol et al. 2021",
    ),
    "es_single": Row(
        es_single,
        "smoothed J",
        "(P+1)|g|²",
        "2NK",
        "2N(S+P)",
        "Vicol et al. 2023; Li et al. 2023 (NRES)",
    ),
    "gpes": Row(
        gpes,
        "smoothed J",
        "between pes and es_single",
        "2NK",
        "2NS + 3NP",
        "Li et al. 2023",
    ),
    "bptt": Row(bptt, "J", "of the data only", "T(1+B)", "TS", "Werbos 1990", True),
    "tbptt": Row(tbptt, "biased", "of the data only", "K(1+B)", "KS", "Williams & Peng 1990", True),
}
