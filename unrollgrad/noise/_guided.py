"""Guided noise: less of it where the gradient is known to lie, weighed to be unbiased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import wide
from unrollgrad.noise._dense import gaussian
from unrollgrad.noise._laws import Noise, add, weighted_sum
from unrollgrad.types import ArrayTree, Numeric, Theta


@described
def guided(subspace: ArrayTree, share: Numeric, floor: float = 1e-3) -> Noise:
    """Gaussian noise that uses directions near which the gradient lies, and stays unbiased.

    U spans k directions, such as past updates, or gradients of ``tbptt``. Perturbations eps have
    variance s1 in its span and s2 in the other P - k directions, and S^-1 eps weighs the losses
    (S is the covariance), so that estimates are unbiased for quadratic losses whatever U is. If the
    span has the share rho of the gradient's squared norm, the variance of one pair is least for

        s1 / s2 = sqrt(k (1 - rho) / (rho (P - k))):

    then it is ((sqrt(k rho) + sqrt((P - k) (1 - rho)))^2 + 1) |g|^2, where Gaussian noise has
    (P + 1) |g|^2: 121 in place of 1001 for P = 1000, k = 1, rho = 0.9. There is less noise along a
    good direction, not more, since few directions are cheap to weigh. (Guided ES as published has
    more and weighs with eps: its mean is S g, biased.) The noise is scaled so that tr S = P.

    U must be independent of the noise that it guides: a subspace from this window's own pairs
    would make the estimate biased. With ``full_es``, ``truncated_es`` and ``pes`` U and rho may
    change at every call, since each window's noise keeps the weights of its own U. ``es_single``
    holds its noise for an episode and ``gpes`` for a noise period: within one U and rho must stay
    as they are, or the estimate is biased. ``share_in`` measures rho.

    Time and memory, beside a Gaussian law's: an orthonormal basis of U, O(P k^2) and k theta, and
    O(P k) per pair that is drawn.

    Args:
        subspace: A tree like theta whose leaves have a leading axis k, one direction each. Traced
            arrays are welcome: make the estimator inside your jitted update.
        share: rho, a number between 0 and 1.
        floor: The least ratio s1 / s2, and its inverse the greatest, for shares near 1 and 0;
            above 0 and at most 1.

    Returns:
        A law for ``noise=``.

    Raises:
        TypeError: If the share or the floor is not a number.
        ValueError: If the share or the floor is outside of its bounds or, in ``estimate``, the
            subspace is not like theta or has as many directions as theta has numbers.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law, theta = ug.noise.guided(jnp.eye(1, 1000), share=0.9), jnp.zeros(1000)
        >>> unit = law.sample(jax.random.key(0), law.init(theta), theta, 200)
        >>> unit.shape, bool(jnp.std(unit[:, 0]) < 0.2 * jnp.std(unit[:, 1:]))
        ((200, 1000), True)

    References:
        Maheswaranathan et al., ICML 2019, arXiv:1806.10230 (Guided ES, biased).
    """
    _check_numbers(share, floor)
    plain = gaussian()

    def sample(key, _, theta, num_pairs):
        _check(subspace, theta)
        return _times(subspace, share, floor, plain.sample(key, (), theta, num_pairs), 0.5)

    def contract(unit, weights):
        total = jax.tree.map(lambda x: x[None], weighted_sum(unit, weights))
        total = _times(subspace, share, floor, total, -1.0)
        return jax.tree.map(lambda x: x[0], total)

    return Noise(lambda theta: (), sample, add, contract)


def share_in(subspace: ArrayTree, first: Theta, second: Theta) -> jax.Array:
    """Measures the share of the gradient's squared norm in a subspace: ``guided``'s ``share``.

    It is the product of two independent estimates of the gradient, each projected on the subspace,
    over their product: noise that is not in both does not raise either, as it would with one
    estimate. With noisy estimates average both products over many pairs of them.

    Args:
        subspace: As in ``guided``.
        first: An estimate of the gradient.
        second: Another, with other noise.

    Returns:
        A number, between 0 and 1 (NaN if the estimates' product is zero).

    Raises:
        ValueError: If the subspace is not like both estimates.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> gradient = jnp.array([3.0, 4.0])
        >>> round(float(ug.noise.share_in(jnp.array([[1.0, 0.0]]), gradient, gradient)), 2)
        0.36
    """
    for name, tree in (("first", first), ("second", second)):
        _count(subspace, tree, f"`{name}`")
    basis = _basis(subspace)
    one, other = (jax.tree.map(lambda x: x[None], tree) for tree in (first, second))
    inside = jnp.sum(_products(one, basis) * _products(other, basis))
    return jnp.clip(inside / _products(one, other)[0, 0], 0.0, 1.0)


def _check_numbers(share: Numeric, floor: float) -> None:
    """Raises unless the share and the floor are numbers within their bounds."""
    for name, value, advice in (
        ("share", share, "`ug.noise.share_in` measures it"),
        ("floor", floor, "the default is 1e-3"),
    ):
        if np.ndim(value) or not jnp.issubdtype(arguments.dtype_of(value), np.number):
            raise TypeError(
                f"`{name}` must be one number; got {arguments.describe(value)}. Pass a number or a "
                f"scalar array: {advice}."
            )
    if not isinstance(share, jax.core.Tracer) and not 0 <= float(share) <= 1:
        raise ValueError(
            f"`share` must be between 0 and 1; got {share}. It is the part of the gradient's "
            "squared norm in the subspace; `ug.noise.share_in` measures it."
        )
    if not isinstance(floor, jax.core.Tracer) and not 0 < float(floor) <= 1:
        raise ValueError(
            f"`floor` must be above 0 and at most 1; got {floor}. It is the least ratio of the "
            "variances inside and outside of the subspace; the default is 1e-3, and with 1 both "
            "are equal."
        )


def _check(subspace: ArrayTree, theta: Theta) -> None:
    """Raises ValueError unless the subspace is like theta, with a leading axis 1 <= k < P."""
    k, dim = _count(subspace, theta, "theta"), sum(jnp.size(x) for x in jax.tree.leaves(theta))
    if not 1 <= k < dim:
        raise ValueError(
            f"`subspace` must have at least one direction and fewer than theta has numbers; got "
            f"{k} for {dim}. Use `ug.noise.gaussian()` if the subspace is all of them."
        )


def _count(subspace: ArrayTree, tree: ArrayTree, name: str) -> int:
    """Counts the directions; raises ValueError unless they are like the tree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(subspace)]
    if not shapes or not shapes[0]:
        raise ValueError(
            f"`subspace` must have directions; got {subspace!r}. Make a tree like {name} whose "
            "leaves have a leading axis, one direction each."
        )
    count = shapes[0][0]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *jnp.shape(x)), jnp.float32), tree)
    if difference := arguments.shape_difference(like, subspace):
        raise ValueError(
            f"`subspace` must be a tree like {name} whose leaves have a leading axis, one "
            f"direction each; it differs at {name}{difference}."
        )
    return count


def _times(
    subspace: ArrayTree, share: Numeric, floor: float, tree: ArrayTree, power: float
) -> ArrayTree:
    """Multiplies each direction with the covariance to the power; leading axis ``num_pairs``."""
    basis = _basis(subspace)
    k, dim = len(jax.tree.leaves(basis)[0]), sum(x[0].size for x in jax.tree.leaves(basis))
    share = jnp.asarray(share, jnp.float32)
    ratio = jnp.sqrt(k * (1 - share) / (jnp.maximum(share, 1e-30) * (dim - k)))
    ratio = jnp.clip(ratio, floor, 1 / floor)
    outside = dim / (k * ratio + dim - k)
    inside, outside = (outside * ratio) ** power, outside**power
    more = (inside - outside) * _products(tree, basis)

    def leaf(x, q):
        along = jnp.tensordot(more.astype(x.dtype), q.astype(x.dtype), 1, precision=_HIGHEST)
        return outside.astype(x.dtype) * x + along

    return jax.tree.map(leaf, tree, basis)


def _basis(subspace: ArrayTree) -> ArrayTree:
    """Makes the directions orthonormal; one that depends on the others becomes zero."""
    values, vectors = jnp.linalg.eigh(_products(subspace, subspace))
    least = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    good = values > jnp.maximum(least, 0)
    mix = vectors * jnp.where(good, jax.lax.rsqrt(jnp.where(good, values, 1)), 0)[None]
    return jax.tree.map(
        lambda u: jnp.tensordot(
            mix.T.astype(wide(u.dtype)), u.astype(wide(u.dtype)), 1, precision=_HIGHEST
        ),
        subspace,
    )


def _products(left: ArrayTree, right: ArrayTree) -> jax.Array:
    """Computes the products of all directions of two trees with leading axes."""

    def leaf(x, y):
        x, y = (z.reshape(len(z), -1).astype(wide(x.dtype, y.dtype)) for z in (x, y))
        return jnp.matmul(x, y.T, precision=_HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, left, right)))


_HIGHEST = jax.lax.Precision.HIGHEST
