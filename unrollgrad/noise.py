"""Perturbation laws for the evolution-strategies family.

A law is a pair of pure functions. ``init(theta) -> law_state`` prepares what the law needs to know;
``sample(key, law_state, theta, num_pairs) -> unit`` draws unit-variance perturbations: a tree like
theta, each leaf with a leading axis ``num_pairs``, at least float32. Sigma is applied by the
estimator, so that the same draw serves every sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.types import Key, Theta


class Noise(NamedTuple):
    """A perturbation law: zero mean, identity covariance.

    Attributes:
        init: ``init(theta) -> law_state``.
        sample: ``sample(key, law_state, theta, num_pairs) -> unit``, a pure function of its key.
    """

    init: Callable[[Theta], Any]
    sample: Callable[[Key, Any, Theta, int], Theta]


def wide(dtype: Any) -> Any:
    """The dtype in which a leaf is perturbed and accumulated: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def gaussian() -> Noise:
    """Independent standard normal perturbations: the law that smooths J by a Gaussian.

    Each leaf and each pair has a key of its own, so more pairs keep the draws of the first ones.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.gaussian(), {"w": jnp.zeros(3)}
        >>> law.sample(jax.random.key(0), law.init(theta), theta, 4)["w"].shape
        (4, 3)
    """

    def sample(key, law_state, theta, num_pairs):
        del law_state

        def leaf(index, x):
            key_leaf = jax.random.fold_in(key, index)
            keys = jax.vmap(lambda i: jax.random.fold_in(key_leaf, i))(jnp.arange(num_pairs))
            return jax.vmap(lambda k: jax.random.normal(k, x.shape, wide(x.dtype)))(keys)

        leaves, structure = jax.tree.flatten(theta)
        return structure.unflatten([leaf(i, x) for i, x in enumerate(leaves)])

    return Noise(init=lambda theta: (), sample=sample)
