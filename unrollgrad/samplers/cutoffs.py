"""Laws of the number of last steps that are differentiated, for ``bptt(problem, last=law)``."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad.types import Key

__all__ = ["Cutoff", "alignprop_cutoff", "cutoff"]


class Cutoff(NamedTuple):
    """A law of K: ``law(key)`` draws it.

    Attributes:
        probabilities: The probabilities of K = 1, 2, ...; they sum to 1.
    """

    probabilities: tuple[float, ...]

    def __call__(self, key: Key) -> jax.Array:
        """Draws K, an int32 scalar of at least 1."""
        chances = jnp.log(jnp.asarray(self.probabilities, jnp.float32))
        return 1 + jax.random.categorical(key, chances).astype(jnp.int32)


def cutoff(probabilities: Any) -> Cutoff:
    """A law of the number K of steps, from the end, that ``bptt`` differentiates.

    ``bptt(problem, last=cutoff(p), unbiased=True)`` divides the contribution of the k-th step from
    the end by P(K >= k), known exactly here. With all steps equally likely, that is
    ``cutoff([1 / T] * T)``, the mean number of differentiated steps is (T + 1)/2.

    Args:
        probabilities: The probabilities of K = 1, 2, ...; numbers in proportion to them will do.

    Raises:
        ValueError: If they are negative, not finite or all zero.

    Example:
        >>> import jax
        >>> from unrollgrad import samplers
        >>> samplers.cutoff([2, 1, 1]).probabilities
        (0.5, 0.25, 0.25)
    """
    weights = np.asarray(probabilities, np.float64)
    if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.any():
        raise ValueError(
            "`probabilities` must be a list of numbers that are not negative, not all zero; got "
            f"{probabilities!r}."
        )
    return Cutoff(tuple(float(x) for x in weights / weights.sum()))


def alignprop_cutoff(
    num_steps: int = 50, *, mean: float | None = None, std: float | None = None
) -> Cutoff:
    """AlignProp's law of the number of differentiated steps.

    The number of steps without a gradient is the whole part of a normal draw, drawn again until it
    is in [1, ``num_steps``); the rest are differentiated, by default about 9 of 50. No draw
    differentiates all steps, so this law cannot be combined with ``unbiased=True``.

    Args:
        num_steps: Sampling steps (T).
        mean: The mean of the normal law, in steps. Default: 0.84 ``num_steps``, AlignProp's 42 for
            50 steps.
        std: Its standard deviation, in steps. Default: 0.1 ``num_steps``, AlignProp's 5.

    Raises:
        ValueError: If the law gives no probability to [1, num_steps), or num_steps is below 2.

    Example:
        >>> from unrollgrad import samplers
        >>> law = samplers.alignprop_cutoff(50)
        >>> round(sum(k * p for k, p in enumerate(law.probabilities, 1)), 1)
        9.1

    References:
        Prabhudesai et al., Aligning text-to-image diffusion models with reward backpropagation,
        2023, arXiv:2310.03739.
    """
    if arguments.positive_int("num_steps", num_steps) < 2:
        raise ValueError(f"`num_steps` must be at least 2; got {num_steps}.")
    mean = 0.84 * num_steps if mean is None else mean
    std = 0.1 * num_steps if std is None else std
    if not std > 0:
        raise ValueError(f"`std` must be positive; got {std}.")
    below = [0.5 * math.erfc((mean - n) / std / 2**0.5) for n in range(1, num_steps + 1)]
    without = np.diff(below)  # of 1, ..., num_steps - 1 steps without a gradient
    if not np.any(without > 0):
        raise ValueError(
            f"a normal law of mean {mean} and std {std} gives no probability to [1, {num_steps}). "
            "Leave `mean` and `std` out for 0.84 and 0.1 of `num_steps`, as in AlignProp."
        )
    return cutoff(without[::-1])
