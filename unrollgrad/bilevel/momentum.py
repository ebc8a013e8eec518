"""STORM on params and on theta's Neumann hypergradient: MRBO and SUSTAIN."""

from collections.abc import Callable

from unrollgrad._core.descriptions import explained_by
from unrollgrad.bilevel import _estimator, _linear, data
from unrollgrad.bilevel import directions as laws
from unrollgrad.bilevel._double_loop import neumann_field
from unrollgrad.bilevel._losses import Losses
from unrollgrad.bilevel.single_loop import single_loop, soba
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric

__all__ = ["mrbo", "sustain"]


def _eta(k):
    """The default of both."""
    return 0.5 / (k + 1.0) ** (2 / 3)


@explained_by(soba)
def mrbo(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_rate: float,
    terms: int = 10,
    eta: laws.Rate = _eta,
) -> GradientEstimator:
    """MRBO: momentum by recursion on params' gradient and on theta's hypergradient.

    Both directions follow STORM, d = new + (1 - eta) (d - old), with the same batches at this
    call's point and the last one's. The hypergradient is ``stocbio``'s with one Neumann series at
    each of both points. The recursion begins with the first sample.

    Time: 2 (2 terms + 4) gradient-equivalents. Memory: 4 params, 4 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_rate: The step of the series, below 2 over the largest curvature of inner.
        terms: Products with H; the series has one term more.
        eta: How much of the past is forgotten, in [0, 1], or a function of the number of calls k;
            0.5 / (k + 1)^(2/3) by default.

    Raises:
        TypeError, ValueError: As ``soba`` and ``storm`` do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.mrbo(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), linear_rate=0.5)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.1), num_steps=200, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Yang, Ji and Liang, Provably faster algorithms for bilevel optimization, NeurIPS 2021,
        arXiv:2106.04692.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("mrbo", losses, init_params, inner_optimizer)
    field = neumann_field(losses, _linear.neumann(terms, linear_rate))
    return single_loop(chosen, field, laws.storm(eta))


@explained_by(soba)
def sustain(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_rate: float,
    terms: int = 10,
    eta: laws.Rate = _eta,
) -> GradientEstimator:
    """SUSTAIN: ``mrbo`` with one random term of the Neumann series, as in ``bsa``.

    Time: on average 2 (terms + 3) gradient-equivalents. Memory: 4 params, 4 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_rate: The step of the series, below 2 over the largest curvature of inner.
        terms: Terms of the series.
        eta: How much of the past is forgotten, in [0, 1], or a function of the number of calls k;
            0.5 / (k + 1)^(2/3) by default.

    Raises:
        TypeError, ValueError: As ``soba`` and ``storm`` do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.sustain(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), linear_rate=0.5)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.05), num_steps=400, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        2.00

    References:
        Khanduri, Zeng, Hong, Wai, Wang and Yang, A near-optimal algorithm for stochastic bilevel
        optimization via double-momentum, NeurIPS 2021, arXiv:2102.07367.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("sustain", losses, init_params, inner_optimizer)
    field = neumann_field(losses, _linear.random_neumann(terms, linear_rate))
    return single_loop(chosen, field, laws.storm(eta))
