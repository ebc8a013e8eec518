"""Tests behind the claims: whether a difference is more than what the seeds' spread explains."""

import math
from typing import Any, NamedTuple

SURE = 0.05
"""The largest p at which a difference counts: the share of "yes" where there is no difference."""


class Finding(NamedTuple):
    """What a test found.

    Attributes:
        holds: True if the relation holds, False if the opposite does, each with p at most ``SURE``;
            None if neither can be told, for one seed, or for a run that diverged.
        text: The numbers, and the p of the relation.
    """

    holds: bool | None
    text: str


def less(low: dict[str, Any] | None, high: dict[str, Any] | None, factor: float = 1.0) -> Finding:
    """Whether ``low``'s mean is less than ``factor`` times ``high``'s: Welch's one-sided t-test.

    Args:
        low: A result of a summary, with ``mean``, ``se`` and ``n`` over seeds; None: not run.
        high: The result to compare it with.
        factor: The margin that is claimed, such as 0.5 for "at most half".
    """
    if low is None or high is None:
        return Finding(None, "not run")
    text = f"{number(low)} against {number(high)}"
    if not all(_known(found) for found in (low, high)):
        return Finding(None, text)
    errors = low["se"], abs(factor) * high["se"]
    gap = factor * high["mean"] - low["mean"]
    return _decide(gap, errors, (low["n"], high["n"]), text)


def below(found: dict[str, Any] | None, bound: float) -> Finding:
    """Whether the mean is less than a known number: a one-sided t-test over the seeds."""
    return _one_sample(found, bound, 1.0)


def above(found: dict[str, Any] | None, bound: float) -> Finding:
    """Whether the mean is more than a known number: a one-sided t-test over the seeds."""
    return _one_sample(found, bound, -1.0)


def both(*findings: Finding) -> bool | None:
    """Whether all hold: False if one does not, None if one cannot be told."""
    verdicts = [finding.holds for finding in findings]
    return False if False in verdicts else None if None in verdicts else True


def number(found: dict[str, Any]) -> str:
    """The mean and its standard error, as a claim prints them."""
    if not math.isfinite(found["mean"]):
        return "diverged (not finite in a seed)"
    return f"{found['mean']:.3g}" + (f" ± {found['se']:.1g}" if found["se"] else "")


def _one_sample(found: dict[str, Any] | None, bound: float, sign: float) -> Finding:
    if found is None:
        return Finding(None, "not run")
    if not _known(found):
        return Finding(None, number(found))
    return _decide(sign * (bound - found["mean"]), (found["se"],), (found["n"],), number(found))


def _known(found: dict[str, Any]) -> bool:
    """Whether the result has a finite mean and a spread over seeds."""
    return math.isfinite(found["mean"]) and found["n"] > 1


def _decide(gap: float, errors: tuple[float, ...], ns: tuple[int, ...], text: str) -> Finding:
    p = _p_value(gap, errors, ns)
    holds = True if p <= SURE else False if p >= 1 - SURE else None
    return Finding(holds, f"{text} (p = {p:.2g})")


def _p_value(gap: float, errors: tuple[float, ...], ns: tuple[int, ...]) -> float:
    """P of a gap this large where the true one is 0; the degrees of freedom are Welch's."""
    from scipy.stats import t

    variance = sum(se**2 for se in errors)
    if variance == 0:  # every seed gives the same number
        return 0.0 if gap > 0 else 1.0 if gap < 0 else 0.5
    spread = sum(se**4 / (n - 1) for se, n in zip(errors, ns, strict=True))
    return float(t.sf(gap / math.sqrt(variance), variance**2 / spread))
