"""The contract of a learned optimizer: its weights, and an optax transformation from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from unrollgrad.types import Key

__all__ = ["Architecture"]


class Architecture(NamedTuple):
    """A family of optimizers, one for every theta.

    Attributes:
        init: ``init(key) -> theta``, the weights with which meta-training begins.
        transform: ``transform(theta) -> optax.GradientTransformation``. Its state has the same
            structure for every theta and includes the step count.
    """

    init: Callable[[Key], Any]
    transform: Callable[..., optax.GradientTransformation]
