"""Which rate to lower: what the history of a bilevel run says."""

from collections.abc import Mapping

import numpy as np

__all__ = ["advice"]

_LAST = 100


def advice(history: Mapping[str, np.ndarray]) -> str:
    """Says whether a run diverges, and which of its three rates to lower.

    A step along a direction of curvature c multiplies the error by 1 - rate c, which grows if rate
    c > 2: then the inner or the linear rate is too large for the largest curvature seen. If both
    fit and v grows all the same, theta moves faster than params and v can follow: the outer rate
    must be well below the inner rate times the cube of the least curvature, in units where outer
    has curvature one. A run that ends with numbers that are not finite, without any growth before,
    met a bad batch. ``fit`` adds this text to the error of such a run, or, if a finite sum has rows
    that are not finite, their numbers.

    The curvature seen is that along v, which a diverging system turns towards the largest one; it
    is an estimate. With another optimizer than ``optax.sgd`` a rate is the length of the step over
    the length of the direction.

    Args:
        history: ``FitResult.history`` of a bilevel estimator, or arrays with the fields of
            ``BilevelInfo`` and ``loss``.

    Raises:
        ValueError: If the fields are missing (``average`` does not keep them).

    Example:
        >>> import numpy as np, unrollgrad as ug
        >>> grows = 2.0 ** np.arange(50)
        >>> history = {"v_norm": grows, "curvature": np.full(50, 30.0), "loss": grows,
        ...            "inner_rate": np.full(50, 0.1), "linear_rate": np.full(50, 0.1),
        ...            "outer_rate": np.full(50, 0.01)}
        >>> ug.bilevel.advice(history).split(":")[0]
        'lower the inner rate'
    """
    fields = ("v_norm", "curvature", "inner_rate", "linear_rate", "outer_rate", "loss")
    missing = [name for name in fields if name not in history]
    if missing:
        raise ValueError(
            f"`history` has no {', '.join(missing)}. Pass the history of a bilevel estimator that "
            "runs alone, not under `average`."
        )
    table = np.array([np.asarray(history[name], np.float64) for name in fields])
    finite = np.all(np.isfinite(table), axis=0)
    if not finite.any():
        return "no finite step was recorded: look at the losses at the first params."
    norm, curvature, inner, linear, outer, loss = table[:, finite][:, -_LAST:]
    half = max(len(norm) // 2, 1)
    growth = norm[-1] / max(np.median(norm[:half]), np.finfo(float).tiny)
    risen = abs(loss[-1]) / max(np.median(np.abs(loss[:half])), np.finfo(float).tiny)
    top, rates = np.max(curvature), [float(np.max(x)) for x in (inner, linear, outer)]
    seen = (
        f"over the last {len(norm)} finite steps the norm of v grew by a factor of {growth:.3g}; "
        f"the largest curvature seen is {top:.3g}, the inner rate {rates[0]:.3g}, the linear rate "
        f"{rates[1]:.3g}, the outer rate {rates[2]:.3g}"
    )
    for name, rate in zip(("inner", "linear"), rates[:2], strict=True):
        if rate * top > 2:
            return f"lower the {name} rate: it must be below 2 / curvature = {2 / top:.3g}; {seen}."
    if growth > 2 or risen > 2:
        ratio = rates[2] / rates[0] if rates[0] else np.inf
        return (
            f"lower the outer rate: it is {ratio:.3g} of the inner one, and theta moves faster "
            f"than params and v follow (outer rate << inner rate * curvature^3); {seen}."
        )
    if not finite.all():
        return (
            f"a batch whose loss or gradient is not finite: nothing grew before it. Look at the "
            f"data, and for logarithms and divisions in the losses; {seen}."
        )
    return f"nothing grows: {seen}."
