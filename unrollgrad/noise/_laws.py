"""What a perturbation law is, and how arrays of noise perturb theta and weigh losses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core.dtypes import rounded, wide
from unrollgrad.types import ArrayTree, Key, Sigma, Theta


def add(theta: Theta, unit: Theta, scale: Sigma) -> Theta:
    """Computes theta + scale unit in at least float32, and rounds to theta's dtypes.

    It is the ``perturb`` of a law that draws arrays like theta.
    """

    def leaf(x, s, u):
        eps = jnp.asarray(s, wide(x.dtype)) * u
        return rounded(x.astype(eps.dtype) + eps, x.dtype).astype(x.dtype)

    return jax.tree.map(leaf, theta, arguments.broadcast_sigma(scale, theta), unit)


def weighted_sum(unit: Theta, weights: jax.Array) -> Theta:
    """Sums weight times noise over the leading axis.

    It is the ``contract`` of a law that draws arrays like theta.
    """

    def leaf(u):
        # Full precision: TF32 or bfloat16 products would cost digits where losses differ little.
        precision = jax.lax.Precision.HIGHEST
        return jnp.tensordot(weights.astype(u.dtype), u, axes=1, precision=precision)

    return jax.tree.map(leaf, unit)


class Noise(NamedTuple):
    """A perturbation law: zero mean, identity covariance.

    An estimator perturbs with ``perturb`` and weighs with ``contract``, and asks nothing else of
    what ``sample`` draws. Without the two, noise is arrays like theta, which are added and summed.

    Attributes:
        init: ``init(theta) -> law_state``.
        sample: ``sample(key, law_state, theta, num_pairs) -> factors``, a pure function of its key;
            leading axis ``num_pairs``.
        perturb: ``perturb(theta, factors, scale) -> theta``: theta + scale times the perturbation
            that one pair's factors (without the leading axis) stand for; scale is sigma or -sigma.
        contract: ``contract(factors, weights) -> theta``: the sum over pairs of weight times
            perturbation, in at least float32. Estimators that sum arrays of noise over windows call
            it pair by pair when a window ends; factors they draw again later, so that a law that
            draws factors must stay the same within an episode.
    """

    init: Callable[..., object]
    sample: Callable[..., ArrayTree]
    perturb: Callable[..., Theta] = add
    contract: Callable[..., Theta] = weighted_sum

    def __repr__(self):
        made = getattr(self.init, "about", None)
        name = getattr(self.sample, "__name__", type(self.sample).__name__)
        return f"Noise({name})" if made is None else made.text


def sample(law: Noise, key: Key, theta: Theta, num_pairs: int) -> ArrayTree:
    """Draws the law's perturbations, or their factors.

    Raises:
        TypeError: If a law without ``perturb`` draws other than a tree like theta with a leading
            axis ``num_pairs``.
    """
    unit = law.sample(key, law.init(theta), theta, num_pairs)
    if law.perturb is not add:
        return unit
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_pairs, *x.shape), x.dtype), theta)
    if difference := arguments.shape_difference(like, unit):
        raise TypeError(
            f"`noise` must draw a tree like theta with a leading axis num_pairs={num_pairs}; its "
            f"sample differs at theta{difference}."
        )
    return unit
