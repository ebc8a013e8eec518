"""Algorithms with an inner loop and a linear solve: stocBiO, AmIGO, BSA, TTSA and FSLA."""

from collections.abc import Callable

from unrollgrad._core.descriptions import explained_by
from unrollgrad.bilevel import _estimator, _linear, data
from unrollgrad.bilevel import directions as laws
from unrollgrad.bilevel._double_loop import double_loop
from unrollgrad.bilevel._losses import Losses
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric

__all__ = ["amigo", "bsa", "fsla", "stocbio", "ttsa"]


@explained_by(soba)
def stocbio(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_rate: float,
    inner_steps: int = 10,
    terms: int = 10,
) -> GradientEstimator:
    """stocBiO: warm inner steps, then a truncated Neumann series with a fresh batch per factor.

    With q = linear_rate sum_{j=0..terms} prod_{i<=j} (I - linear_rate H_i) d outer / d params, at
    the new params, ``grad`` = d outer / d theta - B^T q. In a direction of curvature mu the
    implicit term has the relative error -(1 - linear_rate mu)^(terms + 1), and params lag behind a
    moving minimum by r^N / (1 - r^N) of its last move, r = 1 - inner rate mu, N = inner_steps.

    Time: inner_steps + 2 terms + 3 gradient-equivalents. Memory: 2 params, 2 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_rate: The step of the series, below 2 over the largest curvature of inner.
        inner_steps: Inner steps per call.
        terms: Products with H; the series has one term more.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.stocbio(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), linear_rate=0.5)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.2), num_steps=100, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Ji, Yang and Liang, Bilevel optimization: convergence analysis and enhanced design, ICML
        2021, arXiv:2010.07962.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("stocbio", losses, init_params, inner_optimizer)
    return double_loop(chosen, _linear.neumann(terms, linear_rate), inner_steps)


@explained_by(soba)
def amigo(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    inner_steps: int = 10,
    linear_steps: int = 10,
) -> GradientEstimator:
    """AmIGO: warm inner steps, then warm steps on the linear system.

    v moves ``linear_steps`` times along H v - d outer / d params at the new params, from the last
    call's v, with one batch of outer and a fresh batch of inner per step; ``grad`` = d outer /
    d theta - B^T v. Warm starts of both make a few steps suffice where theta is slow.

    Time: inner_steps + 2 linear_steps + 3 gradient-equivalents. Memory: 2 params, 2 theta, and the
    optimizers.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        inner_steps: Inner steps per call.
        linear_steps: Steps of v per call.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.amigo(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.2), num_steps=100, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization,
        ICLR 2022, arXiv:2111.14580.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("amigo", losses, init_params, inner_optimizer)
    return double_loop(chosen, _steps(chosen, linear_optimizer, linear_steps), inner_steps)


@explained_by(soba)
def fsla(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    eta: laws.Rate = lambda k: 0.5 / (k + 1.0) ** 0.5,
) -> GradientEstimator:
    """FSLA: one step of params, one of v at the new params, and STORM on theta's direction.

    The variables move one after the other, each from the new values of those before (``soba`` uses
    the old values of all). theta's direction d = new + (1 - eta) (d - old) compares this call's
    point with the last one's on the same fresh batches.

    Time: 1 + 2 + 1 + 6 = 10 gradient-equivalents. Memory: 4 params, 4 theta, and the optimizers.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        eta: How much of the past is forgotten, in [0, 1], or a function of the number of calls k;
            0.5 / sqrt(k + 1) by default.

    Raises:
        TypeError, ValueError: As ``soba`` and ``storm`` do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.fsla(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.1), num_steps=200, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Li, Gu and Huang, A fully single loop algorithm for bilevel optimization without Hessian
        inverse, AAAI 2022, arXiv:2112.04660.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("fsla", losses, init_params, inner_optimizer)
    return double_loop(chosen, _steps(chosen, linear_optimizer, 1), 1, laws.storm(eta))


@explained_by(soba)
def bsa(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_rate: float,
    inner_steps: int = 10,
    terms: int = 10,
) -> GradientEstimator:
    """BSA: warm inner steps, then one random term of the Neumann series.

    q = terms linear_rate prod_{j<k} (I - linear_rate H_j) d outer / d params with k uniform in
    0..terms - 1: in the mean ``stocbio``'s series of ``terms`` terms, at half its cost and with
    more variance. ``grad`` = d outer / d theta - B^T q.

    Time: on average inner_steps + terms + 2 gradient-equivalents. Memory: 2 params, 2 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_rate: The step of the series, below 2 over the largest curvature of inner.
        inner_steps: Inner steps per call.
        terms: Terms of the series.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.bsa(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), linear_rate=0.5)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.05), num_steps=400, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        2.00

    References:
        Ghadimi and Wang, Approximation methods for bilevel programming, 2018, arXiv:1802.02246.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("bsa", losses, init_params, inner_optimizer)
    return double_loop(chosen, _linear.random_neumann(terms, linear_rate), inner_steps)


@explained_by(soba)
def ttsa(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_rate: float,
    terms: int = 10,
) -> GradientEstimator:
    """TTSA: ``bsa`` with one inner step per call, and theta on a slower time scale.

    Its analysis has an inner rate like k^-0.4 and an outer one like k^-0.6.

    Time: on average terms + 3 gradient-equivalents. Memory: 2 params, 2 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_rate: The step of the series, below 2 over the largest curvature of inner.
        terms: Terms of the series.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.ttsa(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), linear_rate=0.5)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.05), num_steps=400, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        2.00

    References:
        Hong, Wai, Wang and Yang, A two-timescale stochastic algorithm framework for bilevel
        optimization, SIAM J. Optim. 2023, arXiv:2007.05170.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("ttsa", losses, init_params, inner_optimizer)
    return double_loop(chosen, _linear.random_neumann(terms, linear_rate), 1)


def _steps(
    chosen: _estimator.Settings, linear_optimizer: InnerOptimizer | None, number: int
) -> _linear.Solver:
    if linear_optimizer is None:
        return _linear.steps(chosen.inner_optimizer, number)
    return _linear.steps(_estimator.optimizer("linear_optimizer", linear_optimizer), number)
