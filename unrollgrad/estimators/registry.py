"""The registry of estimators, which feeds the tests, the command line and the manual."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from unrollgrad.estimators.backprop import bptt, tbptt
from unrollgrad.estimators.evolution import es_single, full_es, gpes, pes, truncated_es
from unrollgrad.estimators.forward import dodge, forward_mode
from unrollgrad.estimators.hybrid import pes_analytic, pes_analytic_replacement, reparameterized_es
from unrollgrad.estimators.uoro import uoro
from unrollgrad.types import GradientEstimator, UnrolledProblem

__all__ = ["REGISTRY", "Row"]


class Row(NamedTuple):
    """An estimator's row in the manual, and how to build it from common settings.

    Attributes:
        factory: ``factory(problem, *, ...)``.
        unbiased_for: The function whose gradient ``grad`` estimates without bias on average over an
            episode's windows, or "biased".
        variance: Variance per pair of the mean over an episode's n windows, for quadratic losses; P
            is dim(theta), g the gradient.
        time: Inner steps per call with N pairs; K is the truncation, T the horizon, B the cost of a
            backward step.
        memory: Peak memory beyond the problem's own, in states S and thetas P; random bits count.
        paper: The source.
        passes: Forward passes over a window: ``info.inner_steps`` of one worker is
            ``passes(num_pairs)`` times the steps of a call.
        reverse_mode: Whether the estimator differentiates ``step`` in reverse mode.
        least_pairs: The fewest pairs that the estimator takes.
    """

    factory: Callable[..., GradientEstimator]
    unbiased_for: str
    variance: str
    time: str
    memory: str
    paper: str
    passes: Callable[[int], int] = lambda num_pairs: 1
    reverse_mode: bool = False
    least_pairs: int = 1

    def takes(self, setting: str) -> bool:
        """Returns whether the factory has this keyword."""
        return setting in inspect.signature(self.factory).parameters

    def build(self, problem: UnrolledProblem, **settings: Any) -> GradientEstimator:
        """Calls the factory with the settings that it takes; the default is its fewest pairs."""
        if self.least_pairs > 1:
            settings = {"num_pairs": self.least_pairs, **settings}
        return self.factory(problem, **{k: v for k, v in settings.items() if self.takes(k)})


REGISTRY: dict[str, Row] = {
    "full_es": Row(
        full_es,
        unbiased_for="episode-smoothed J",
        variance="(P+1)‖g‖²",
        passes=lambda num_pairs: 2 * num_pairs,
        time="2NT",
        memory="2NS + 3NP",
        paper="Salimans et al. 2017",
    ),
    "truncated_es": Row(
        truncated_es,
        unbiased_for="biased",
        variance="(P+1)/n × mean over windows of ‖the window's own gradient‖²",
        passes=lambda num_pairs: 2 * num_pairs + 1,
        time="(2N+1)K",
        memory="(2N+1)S + 3NP",
        paper="Metz et al. 2019",
    ),
    "pes": Row(
        pes,
        unbiased_for="period-smoothed J",
        variance="gpes's, with m = n",
        passes=lambda num_pairs: 2 * num_pairs,
        time="2NK",
        memory="2NS + 4NP",
        paper="Vicol et al. 2021",
    ),
    "es_single": Row(
        es_single,
        unbiased_for="episode-smoothed J",
        variance="(P+1)‖g‖²",
        passes=lambda num_pairs: 2 * num_pairs,
        time="2NK",
        memory="2NS + 3NP",
        paper="Vicol et al. 2023; Li et al. 2023 (NRES)",
    ),
    "gpes": Row(
        gpes,
        unbiased_for="period-smoothed J",
        variance="Σⱼ(Pj+1)‖Gⱼ‖² if nothing crosses periods",
        passes=lambda num_pairs: 2 * num_pairs,
        time="2NK",
        memory="2NS + 4NP",
        paper="Li et al. 2023",
    ),
    "bptt": Row(
        bptt,
        unbiased_for="J",
        variance="only the variance of the data",
        time="T(1+B)",
        memory="TS",
        paper="Werbos 1990",
        reverse_mode=True,
    ),
    "tbptt": Row(
        tbptt,
        unbiased_for="biased",
        variance="only the variance of the data",
        time="K(1+B)",
        memory="KS",
        paper="Williams & Peng 1990",
        reverse_mode=True,
    ),
    "forward_mode": Row(
        forward_mode,
        unbiased_for="J",
        variance="only the variance of the data",
        time="K(1+P)",
        memory="P(S + P), and P times the memory of a step",
        paper="Williams & Zipser 1989 (RTRL)",
    ),
    "dodge": Row(
        dodge,
        unbiased_for="J",
        variance="(P−1)‖g‖² with one direction per episode",
        time="2K",
        memory="2S + 2P",
        paper="Silver et al. 2022",
    ),
    "uoro": Row(
        uoro,
        unbiased_for="J",
        variance="high, no closed form",
        time="K(2+2B)",
        memory="2S + 2P",
        paper="Tallec & Ollivier 2018",
        reverse_mode=True,
    ),
    "pes_analytic": Row(
        pes_analytic,
        unbiased_for="period-smoothed J",
        variance="of one window: pes's, minus the part caused by its own noise",
        passes=lambda num_pairs: 2 * num_pairs + 1,
        time="(2N+1+B)K",
        memory="(2N+1+K)S + 4NP",
        paper="Vicol et al. 2021",
        reverse_mode=True,
    ),
    "pes_analytic_replacement": Row(
        pes_analytic_replacement,
        unbiased_for="J up to O(σ²)",
        variance="lower than pes_analytic's",
        passes=lambda num_pairs: 2 * num_pairs + 1,
        time="(2N+1+B)K",
        memory="(2N+1+K)S + 5NP",
        paper="Vicol et al. 2021, as released",
        reverse_mode=True,
    ),
    "reparameterized_es": Row(
        reparameterized_es,
        unbiased_for="episode-smoothed J",
        variance="about the lower of full_es's and bptt's, unless a few samples explode",
        passes=lambda num_pairs: 2 * max(num_pairs, 3),
        time="2NT(1+B)",
        memory="2NTS + 5NP",
        paper="Metz et al. 2019",
        reverse_mode=True,
        least_pairs=3,
    ),
}
