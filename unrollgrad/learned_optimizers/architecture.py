"""What a learned optimizer is: weights, and an optax transformation that they say."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from unrollgrad.types import Key, Theta


class Architecture(NamedTuple):
    """A family of optimizers, one for every theta.

    Attributes:
        init: ``init(key) -> theta``, where meta-training begins.
        transform: ``transform(theta) -> optax.GradientTransformation``. Its state has the same
            structure for every theta, and counts the steps itself.
    """

    init: Callable[[Key], Theta]
    transform: Callable[[Theta], optax.GradientTransformation]
