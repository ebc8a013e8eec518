"""The published single-loop algorithms: ``soba`` with other estimators of its directions."""

from collections.abc import Callable

from unrollgrad._core.descriptions import explained_by
from unrollgrad.bilevel import _estimator, _field, data
from unrollgrad.bilevel import directions as laws
from unrollgrad.bilevel._losses import Losses
from unrollgrad.bilevel.saga import saga
from unrollgrad.bilevel.single_loop import single_loop, soba
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric

__all__ = ["ma_soba", "saba", "spaba", "srba"]


@explained_by(soba)
def ma_soba(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    beta: laws.Rate = 0.1,
) -> GradientEstimator:
    """MA-SOBA: ``soba`` with a moving average of theta's direction.

    ``soba(..., directions=moving_average(beta))``. theta follows d = (1 - beta) d + beta sample;
    params and v follow samples. Time: 4 gradient-equivalents. Memory: that of ``soba``, and a
    theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        beta: The weight of the new sample, in (0, 1], or a function of the number of steps done.

    Raises:
        TypeError, ValueError: As ``soba`` and ``moving_average`` do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 1)
        >>> estimator = ug.bilevel.ma_soba(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.1), beta=0.5)
        >>> estimator.init(jax.random.key(0), 0.0).made_by.estimator
        'ma_soba'

    References:
        Chen, Xiao and Balasubramanian, JMLR 2024, arXiv:2306.12067.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("ma_soba", losses, init_params, inner_optimizer)
    law = laws.moving_average(beta)
    return single_loop(chosen, _field.single_loop(losses), law, linear_optimizer)


@explained_by(soba, saga)
def saba(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.FiniteSum,
    inner_data: data.FiniteSum,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    full_start: bool = False,
    touched: Callable[[object], ArrayTree] | None = None,
    max_bytes: int = 2**30,
) -> GradientEstimator:
    """SABA: ``soba`` with SAGA's memory of every batch.

    ``soba(..., directions=saga(...))``. Constant rates suffice: the error on strongly convex finite
    sums falls at a linear rate, without a noise floor. Time: 4 gradient-equivalents. Memory: that
    of ``soba``, and (N_inner (2d + p) + N_outer (d + p)) numbers for N batches, d params, p thetas.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        outer_data: A finite sum.
        inner_data: A finite sum.
        full_start: As in ``saga``.
        touched: As in ``saga``.
        max_bytes: As in ``saga``.

    Raises:
        TypeError, ValueError: As ``soba`` and ``saga`` do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 1)
        >>> estimator = ug.bilevel.saba(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.1))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.02), num_steps=500, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Dagréou, Ablin, Vaiter and Moreau, NeurIPS 2022, arXiv:2201.13409.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("saba", losses, init_params, inner_optimizer)
    law = saga(full_start=full_start, touched=touched, max_bytes=max_bytes)
    return single_loop(chosen, _field.single_loop(losses), law, linear_optimizer)


@explained_by(soba)
def srba(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    period: int | None = None,
    batches: int | None = None,
) -> GradientEstimator:
    """SRBA: ``soba`` with SARAH's recursion of differences.

    ``soba(..., directions=sarah(period, batches))``. Time: 8 gradient-equivalents, and a pass over
    both data sets every ``period`` steps. Memory: twice ``soba``'s variables, and the directions.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        period: Steps between passes; by default half the number of batches in both data sets.
        batches: In place of a pass, the mean over so many fresh draws. Endless data need it.

    Raises:
        TypeError, ValueError: As ``soba`` and ``sarah`` do; ValueError if the data are endless and
            no ``period`` is given.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 1)
        >>> estimator = ug.bilevel.srba(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.1), period=4)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.02), num_steps=500, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Dagréou, Moreau, Vaiter and Ablin, AISTATS 2024, arXiv:2302.08766.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("srba", losses, init_params, inner_optimizer)
    if period is None:
        period = max(_batches(losses, "period") // 2, 1)
    law = laws.sarah(period, batches)
    return single_loop(chosen, _field.single_loop(losses), law, linear_optimizer)


@explained_by(soba)
def spaba(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    probability: float | None = None,
    batches: int | None = None,
) -> GradientEstimator:
    """SPABA: ``soba`` with PAGE's coin: a pass over the data, or differences on one batch.

    ``soba(..., directions=page(probability, batches))``. Time on average: 8 gradient-equivalents
    and ``probability`` times a pass over both data sets. Memory: as ``srba``.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: As in ``soba``.
        linear_optimizer: As in ``soba``.
        probability: The probability that a step makes a pass; by default 1 / (1 + the number of
            batches in both data sets).
        batches: In place of a pass, the mean over so many fresh draws. Endless data need it.

    Raises:
        TypeError, ValueError: As ``soba`` and ``page`` do; ValueError if the data are endless and
            no ``probability`` is given.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 1)
        >>> estimator = ug.bilevel.spaba(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.1), probability=0.25)
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.02), num_steps=500, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Chu, Xu, Yao and Zhang, ICML 2024, arXiv:2405.18777.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("spaba", losses, init_params, inner_optimizer)
    if probability is None:
        probability = 1 / (1 + _batches(losses, "probability"))
    law = laws.page(probability, batches)
    return single_loop(chosen, _field.single_loop(losses), law, linear_optimizer)


def _batches(losses: Losses, setting: str) -> int:
    """The number of batches in both data sets; raises ValueError for endless data."""
    sources = losses.inner_data, losses.outer_data
    if not all(isinstance(source, data.FiniteSum) for source in sources):
        raise ValueError(
            f"`{setting}` has no default for endless data; got samplers as data. Pass `{setting}` "
            "and `batches`, the number of draws that stand for a pass."
        )
    return sum(source.num_batches for source in sources if isinstance(source, data.FiniteSum))
