"""Which estimator has the least error at equal cost, and why.

``recommend`` is a pure function of ``Measurements``. For every estimator that is admissible it
predicts NMSE = (bias^2 + variance x cost / budget) / |g|^2 from what was measured, with its error.
There are no rules of thumb in it.
"""

from typing import Any, NamedTuple

import numpy as np

from unrollgrad.diagnostics import _table
from unrollgrad.diagnostics.jackknife import difference_se, standard_error
from unrollgrad.diagnostics.measurements import (
    HEAVY_TAIL,
    Candidate,
    Measurements,
    candidates,
)

__all__ = ["RankedEstimator", "recommend", "what_would_change"]

_REVERSE = ("bptt", "tbptt", "pes_analytic", "pes_analytic_replacement")
_DERIVATIVES = (*_REVERSE, "forward_mode", "dodge")
_WHOLE_EPISODES = ("bptt", "full_es")

FAR = 100
"""A verdict that holds up to such a factor in workers or in time needs no warning."""


class RankedEstimator(NamedTuple):
    """A row of the ranking.

    Attributes:
        name: The estimator, as in ``ug.REGISTRY``.
        settings: What its factory takes besides truncation and sigma.
        nmse: The predicted mean squared error over |g|^2, at the cost of ``num_workers`` antithetic
            pairs for an episode; NaN if the estimator is not admissible. A |g|^2 that the noise
            hides counts as its standard error.
        nmse_se: Its standard error.
        reason: Why it is where it is, in words.
        admissible: Whether it can be used at all.
        tied: Whether its error differs from that of the first by less than two standard errors.
        workers: The workers with which one episode's signal equals its noise.
        seconds: Seconds for one worker's episode.
        bytes: Bytes that one worker holds; None: not known.
    """

    name: str
    settings: dict[str, Any]
    nmse: float
    nmse_se: float
    reason: str
    admissible: bool
    tied: bool
    workers: float
    seconds: float
    bytes: int | None


def recommend(measurements: Measurements) -> list[RankedEstimator]:
    """Ranks the estimators by their predicted error at equal cost.

    The budget is what ``num_workers`` antithetic pairs cost for one episode, in seconds. An
    estimator that costs c for an episode gets budget / c workers, which divide its variance and
    leave its bias. Squared bias and variance count with their standard errors added: a bias that is
    not seen is not taken for none, nor is noise that comes from a few rare episodes taken for
    known. Inadmissible are, with the reason: estimators that need derivatives where there are none,
    where they are not finite, or where single episodes are 10^4 times the median (their sample
    variance means nothing); that need a static horizon; that exceed the memory limit. ``uoro`` and
    ``reparameterized_es`` have no closed form and are left to ``compare``.

    Args:
        measurements: What ``diagnose`` measured, or exact numbers.

    Returns:
        All estimators, the best first and those that are not admissible last.

    Example:
        >>> import unrollgrad as ug
        >>> found = ug.problems.linear_recurrence(dim=20, horizon=8, memory=0.9)
        >>> windows = ug.diagnostics.exact_windows(found.influence(found.theta), truncation=1)
        >>> cost = ug.diagnostics.StepCost(forward=1e-6, backward=3e-6, tangent=1e-6)
        >>> known = ug.diagnostics.Measurements(8, 1, 100, windows, None, cost, "a while_loop")
        >>> ug.diagnostics.recommend(known)[0].name  # all windows agree
        'pes'
    """
    m = measurements
    budget = m.num_workers * 2 * m.horizon * m.cost.forward
    norm = _norm(m)
    found = candidates(m)
    errors = [_error(c, budget) for c in found]
    obstacles = [_obstacle(m, c, error) for c, error in zip(found, errors, strict=True)]
    values = np.array([np.inf if o else e[0] for e, o in zip(errors, obstacles, strict=True)])
    order = np.argsort(values, kind="stable")
    best = order[0]
    rows = []
    for i in order:
        c, admissible = found[i], not obstacles[i]
        gap = values[i] - values[best]
        tied = admissible and bool(i == best or _within(gap, errors[i], errors[best]))
        with np.errstate(over="ignore"):
            nmse = errors[i] / norm
            workers = float(c.variance[0] / norm[0])
        reason = obstacles[i] or _reason(m, c, {x.name: x for x in found})
        row = (float(nmse[0]), standard_error(nmse)) if admissible else (float("nan"),) * 2
        rows.append(
            RankedEstimator(
                c.name, c.settings, *row, reason, admissible, tied, workers, c.seconds, c.bytes
            )
        )
    return rows


def _norm(m: Measurements) -> np.ndarray:
    """|g|^2, but at least its standard error: what the episodes' noise hides is not taken for 0."""
    norm = m.squared_norm()
    return np.maximum(norm, max(standard_error(norm), 1e-30))


def _error(c: Candidate, budget: float) -> np.ndarray:
    """bias^2 + variance x cost / budget, each with its standard error."""
    bias = np.maximum(c.squared_bias, 0.0) + standard_error(c.squared_bias)
    return bias + (c.variance + standard_error(c.variance)) * (c.seconds / budget)


def _within(gap: float, a: np.ndarray, b: np.ndarray) -> bool:
    return bool(gap <= 2 * difference_se(a, b) or gap <= 1e-9 * abs(b[0]))


def _obstacle(m: Measurements, c: Candidate, error: np.ndarray) -> str:
    """Why the candidate cannot be used; empty if it can."""
    d = m.derivatives
    if c.name in _DERIVATIVES and d is not None:
        if d.nonfinite:
            return f"gradients of {d.nonfinite:.0%} of the episodes are not finite"
        if c.name not in ("tbptt", *_REVERSE[2:]) and d.tail > HEAVY_TAIL:
            return f"heavy tail: the largest of the squared gradients is {d.tail:.1g} medians"
    if not m.static_horizon and c.name in _WHOLE_EPISODES:
        return "it needs a static horizon, and this one is sampled"
    total = None if c.bytes is None else c.bytes * m.num_workers
    if m.memory_limit is not None and total is not None and total > m.memory_limit:
        return (
            f"{_table.readable_bytes(total)} for {m.num_workers} workers exceed the limit of "
            + _table.readable_bytes(m.memory_limit)
        )
    if not np.isfinite(error[0]):
        return "its error or its cost is not finite"
    return ""


def _reason(m: Measurements, c: Candidate, others: dict[str, Candidate]) -> str:
    """The number that decides, in words."""
    norm, es = _norm(m)[0], others["es_single"].variance[0]
    noise = f"variance {c.variance[0] / norm:.2g} |g|² per worker"
    if c.name in ("tbptt", "truncated_es"):
        squared, se = max(c.squared_bias[0], 0.0), standard_error(c.squared_bias)
        unseen = bool(squared < 2 * se)
        bias = np.sqrt((squared + 2 * se * unseen) / norm)
        return f"bias {'below ' * unseen}{bias:.2g} |g| from what it forgets, {noise}"
    if c.name in ("bptt", "forward_mode"):
        bias = np.sqrt(max(c.squared_bias[0], 0.0) / norm)
        seen = bias > 0.1 and c.squared_bias[0] > 2 * standard_error(c.squared_bias)
        from_smoothed = f"{bias:.2g} |g| from the smoothed gradient, " if seen else ""
        return f"{from_smoothed}only the episodes' noise: {noise}"
    if c.name in ("pes", "gpes") and es > 0:
        cosine, se = m.windows.cosine() if m.windows.influence.shape[0] > 1 else (np.nan, 0.0)
        agree = f"cosine of the windows {cosine:.2f} ± {se:.2f}: " if np.isfinite(cosine) else ""
        ratio = c.variance[0] / es
        words = f"{1 / ratio:.2g} times less" if ratio < 1 else f"{ratio:.2g} times more"
        return f"{agree}{words} variance than es_single"
    if c.name == "full_es":
        return "as es_single, with one update for each episode"
    return noise


def what_would_change(measurements: Measurements, ranking: list[RankedEstimator]) -> list[str]:
    """What would change the verdict: workers, memory, cost, the agreement of windows.

    Args:
        measurements: What ``recommend`` got.
        ranking: What it returned.

    Returns:
        Sentences, the nearest change first.
    """
    m, first = measurements, ranking[0]
    budget = m.num_workers * 2 * m.horizon * m.cost.forward
    found = {(c.name, str(c.settings)): c for c in candidates(m)}
    best, said = found[first.name, str(first.settings)], []
    for row in ranking[1:]:
        if not row.admissible:
            continue
        other = found[row.name, str(row.settings)]
        noise = best.variance[0] * best.seconds - other.variance[0] * other.seconds
        bias = max(other.squared_bias[0], 0.0) - max(best.squared_bias[0], 0.0)
        if row.name != "full_es" and noise * bias > 0:  # one has less noise, the other less bias
            workers = m.num_workers * noise / bias / budget
            side = "fewer" if workers < m.num_workers else "more"
            said.append((abs(np.log(workers / m.num_workers)), side, workers, row))
    lines = [
        f"With {workers:.2g} workers or {side}, {label(row)} would be ahead."
        for far, side, workers, row in sorted(said, key=lambda x: x[0])[:2]
        if far < np.log(FAR)
    ]
    limit = [r for r in ranking if "exceed the limit" in r.reason and r.bytes is not None]
    free = recommend(m._replace(memory_limit=None))[0] if limit else first
    if (free.name, free.settings) != (first.name, first.settings) and free.bytes is not None:
        needed = _table.readable_bytes(free.bytes * m.num_workers)
        lines.append(f"With {needed} of memory, {label(free)} would be ahead.")
    second = next((r for r in ranking[1:] if r.admissible and not r.tied), None)
    if second is not None and 0 < first.nmse and second.nmse < FAR * first.nmse:
        lines.append(
            f"{label(second)} would be ahead if it were {second.nmse / first.nmse:.2g} times "
            "faster or less noisy."
        )
    return lines


def label(row: RankedEstimator) -> str:
    """The row's name with its settings, such as ``gpes(noise_period=20)``."""
    settings = ", ".join(f"{k}={v}" for k, v in row.settings.items())
    return f"{row.name}({settings})" if settings else row.name
