"""Tests behind the claims: whether a difference is more than what the seeds' spread explains.

Every verdict is True, False, or None for "cannot tell". The tests are one-sided t-tests; where no
seed differs from another there is no spread to divide by, and the p is that of a test by ranks.
Two samples of one law say "yes" in at most 5 %, also where it is skewed or heavy-tailed. One sample
against a known number does so for a symmetric law; few seeds of a skewed one, such as losses, say
"below" too often where their mean is that number, so that only a small p convinces there.
"""

import math
from typing import Any, NamedTuple, TypeGuard

SURE = 0.05
"""The largest p at which a difference counts: the share of "yes" where there is no difference."""

Result = dict[str, Any]
"""A result of a summary: ``mean``, ``se`` and ``n``; see ``experiments._framework.results``."""


class Finding(NamedTuple):
    """What a test found.

    Attributes:
        holds: True if the relation holds, False if the opposite does, each with p at most ``SURE``;
            None if neither can be told, for one seed, or for a run that diverged.
        text: The numbers, and the p of the relation.
    """

    holds: bool | None
    text: str


def less(first: Result | None, second: Result | None, factor: float = 1.0) -> Finding:
    """Whether ``first``'s mean is less than ``factor`` times ``second``'s, by Welch's t-test.

    Args:
        first: A result with its spread over seeds; None: not run.
        second: The result to compare it with, from independent runs.
        factor: The margin that is claimed, such as 0.5 for "at most half".
    """
    return _two_samples(first, second, factor, 1.0)


def more(first: Result | None, second: Result | None, factor: float = 1.0) -> Finding:
    """Whether ``first``'s mean is more than ``factor`` times ``second``'s; see ``less``."""
    return _two_samples(first, second, factor, -1.0)


def below(found: Result | None, bound: float) -> Finding:
    """Whether the mean is less than a known number: a one-sided t-test over the seeds."""
    return _one_sample(found, bound, 1.0)


def above(found: Result | None, bound: float) -> Finding:
    """Whether the mean is more than a known number: a one-sided t-test over the seeds."""
    return _one_sample(found, bound, -1.0)


def within(found: Result | None, low: float, high: float) -> Finding:
    """Whether the mean lies between two known numbers: the test of either bound must say so."""
    tests = above(found, low), below(found, high)
    return min(tests, key=lambda test: (False, None, True).index(test.holds))


def agrees(
    found: Result | None, low: float, high: float, blind: float, errors: float = 3.0
) -> Finding:
    """Whether nothing contradicts that the mean lies in a range: it is few errors outside.

    For equalities, which no test can prove; hence the limit on the standard error.

    Args:
        found: A result with its standard error; None: not run.
        low: The range's least number.
        high: The range's largest number; the same as ``low`` for an equality.
        blind: The standard error above which an agreement counts for nothing.
        errors: How many standard errors outside the range contradict it.
    """
    if not _known(found):
        return Finding(None, number(found) + _one_seed(found))
    outside = max(low - found["mean"], found["mean"] - high)
    if outside > errors * found["se"]:
        return Finding(False, number(found))
    return Finding(True if found["se"] <= blind else None, number(found))


def ratio(top: Result | None, bottom: Result | None) -> Result | None:
    """The quotient of two independent results, with its standard error to first order."""
    if top is None or bottom is None:
        return None
    n, a, b = min(top["n"], bottom["n"]), top["mean"], bottom["mean"]
    if not (math.isfinite(a) and math.isfinite(b)) or b == 0:
        return {"mean": math.nan, "se": math.nan, "n": n}
    if not (_known(top) and _known(bottom)):
        return {"mean": a / b, "se": None if n < 2 else math.nan, "n": n}
    return {"mean": a / b, "se": math.hypot(top["se"], a / b * bottom["se"]) / abs(b), "n": n}


def of_samples(value: Result | None, error: Result | None, samples: int) -> Result | None:
    """A result whose error is not the seeds' spread but that of the samples of all seeds together.

    Args:
        value: The mean over seeds of a number that each seed estimates from samples.
        error: The mean over seeds of the standard errors of these numbers.
        samples: The number of each seed's samples.
    """
    if value is None or error is None:
        return None
    if not (math.isfinite(value["mean"]) and math.isfinite(error["mean"])):
        return {"mean": math.nan, "se": math.nan, "n": value["n"]}
    se = error["mean"] / math.sqrt(value["n"])
    return {"mean": value["mean"], "se": se, "n": samples * value["n"]}


def times(found: Result, factor: float) -> Result:
    """A multiple of a result."""
    se = found["se"] if found["se"] is None else abs(factor) * found["se"]
    return {**found, "mean": factor * found["mean"], "se": se}


def both(*findings: Finding) -> bool | None:
    """Whether all hold: False if one does not, None if one cannot be told or there is none."""
    verdicts = [finding.holds for finding in findings] or [None]
    return False if False in verdicts else None if None in verdicts else True


def told(holds: bool | None, *numbers: float) -> bool | None:
    """A verdict on numbers without a spread over seeds (times, counts, rounding errors).

    Args:
        holds: The verdict if all numbers are known.
        *numbers: The numbers behind it; if one is not finite, nothing can be told.
    """
    return holds if numbers and all(map(math.isfinite, numbers)) else None


def number(found: Result | None) -> str:
    """The mean and its standard error, as a claim prints them."""
    if found is None:
        return "not run"
    if not math.isfinite(found["mean"]):
        return "diverged (not finite in a seed)"
    mean, se = found["mean"], found["se"]
    if not se or se < 0:
        return shown(mean)
    if not math.isfinite(se):
        return f"{shown(mean)} ± unknown"
    if not 1e-3 <= max(abs(mean), se) < 1e5:
        return f"{mean:.3g} ± {se:.2g}"
    digits = max(0, 1 - math.floor(math.log10(float(f"{se:.2g}"))))  # two digits of the error
    return f"{mean:.{digits}f} ± {se:.{digits}f}" if digits < 9 else f"{mean:.3g} ± {se:.2g}"


def shown(value: float, digits: str = "") -> str:
    """A number without a spread over seeds, as a claim prints it. Default: three digits or all."""
    if not math.isfinite(value):
        return "diverged (not finite)"
    return format(value, digits or (".0f" if 100 <= abs(value) < 1e5 else ".3g"))


def _two_samples(
    first: Result | None, second: Result | None, factor: float, sign: float
) -> Finding:
    if first is None or second is None:
        return Finding(None, "not run")
    text = f"{number(first)} against {number(second)}"
    if not (_known(first) and _known(second)):
        return Finding(None, text + _one_seed(first, second))
    bound = times(second, factor)
    gap = sign * (bound["mean"] - first["mean"])
    return _decide(gap, (first["se"], bound["se"]), (first["n"], second["n"]), text)


def _one_sample(found: Result | None, bound: float, sign: float) -> Finding:
    if not _known(found):
        return Finding(None, number(found) + _one_seed(found))
    return _decide(sign * (bound - found["mean"]), (found["se"],), (found["n"],), number(found))


def _one_seed(*results: Result | None) -> str:
    return " (one seed)" if any(found is not None and found["n"] < 2 for found in results) else ""


def _known(found: Result | None) -> TypeGuard[Result]:
    """Whether the result has a finite mean and a finite spread over seeds."""
    if found is None or found["n"] < 2 or found["se"] is None:
        return False
    return math.isfinite(found["mean"]) and math.isfinite(found["se"])


def _decide(gap: float, errors: tuple[float, ...], ns: tuple[int, ...], text: str) -> Finding:
    if not math.isfinite(gap):
        return Finding(None, text)
    p = _p_value(gap, errors, ns)
    holds = True if p <= SURE else False if p >= 1 - SURE else None
    return Finding(holds, f"{text} (p = {p:.2g})")


def _p_value(gap: float, errors: tuple[float, ...], ns: tuple[int, ...]) -> float:
    """P of a gap this large where the true one is 0; the degrees of freedom are Welch's."""
    from scipy.special import stdtr

    largest = max(errors)
    if largest == 0:
        return _p_without_spread(gap, ns)
    shares = [(se / largest) ** 2 for se in errors]  # relative: no underflow
    variance = sum(shares)
    spread = sum(share**2 / (n - 1) for share, n in zip(shares, ns, strict=True))
    return float(stdtr(variance**2 / spread, -gap / largest / math.sqrt(variance)))


def _p_without_spread(gap: float, ns: tuple[int, ...]) -> float:
    """P by ranks, for equal numbers in each sample: of one sample's signs, of two's order."""
    if gap == 0:
        return 0.5
    least = 0.5 ** ns[0] if len(ns) == 1 else 1 / math.comb(sum(ns), ns[0])
    return least if gap > 0 else 1 - least
