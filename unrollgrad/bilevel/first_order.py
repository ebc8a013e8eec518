"""Algorithms that use gradients alone: F2SA, BOME and the penalty method.

Each follows the minimum of inner with a second copy of params, ``follower``, and moves params and
theta along outer + lambda (inner - inner at the follower), whose minimum nears the bilevel one as
lambda grows.
"""

from collections.abc import Callable
from typing import Literal

from unrollgrad._checks import arguments
from unrollgrad._core.descriptions import explained_by
from unrollgrad.bilevel import _estimator, data
from unrollgrad.bilevel import directions as laws
from unrollgrad.bilevel._first_order import (
    Method,
    Penalty,
    bome_call,
    f2sa_call,
    first_order,
    gradient_call,
    positive,
    value_call,
)
from unrollgrad.bilevel._losses import Losses
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric

__all__ = ["bome", "f2sa", "penalty"]


@explained_by(soba)
def f2sa(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    params_optimizer: InnerOptimizer | None = None,
    inner_steps: int = 10,
    penalty: float = 1.0,
    growth: float = 0.1,
) -> GradientEstimator:
    """F2SA: theta's gradient as a difference of inner's gradients at two copies of params.

    One call takes ``inner_steps`` steps of both copies, the follower along d inner / d params and
    params along d inner / d params + (d outer / d params) / lambda, on batches of their own; then

        grad = d outer / d theta + lambda (d inner / d theta at params - at the follower).

    lambda grows by growth / (k + 1)^(1/7) in call k. (The paper's step of params is along lambda
    times our direction, with a rate divided by lambda.) With a fixed lambda and both copies at
    their minima, on quadratics with outer curvature 1 and inner curvature mu, the implicit term has
    the relative error -1 / (1 + lambda mu).

    Time: 3 inner_steps + 3 gradient-equivalents. Memory: 3 params, 2 theta, and the optimizers.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: The follower's optax optimizer, or a function of theta that returns one.
        params_optimizer: params' optimizer; by default the same.
        inner_steps: Steps of both copies per call.
        penalty: The first lambda.
        growth: How fast lambda grows; 0 keeps it fixed.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if a number is negative or lambda is 0.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.f2sa(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.2), num_steps=100, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Kwon, Kwon, Wright and Nowak, A fully first-order method for stochastic bilevel
        optimization, ICML 2023, arXiv:2301.10945.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("f2sa", losses, init_params, inner_optimizer)
    arguments.number("growth", growth)
    first = positive("penalty", penalty)

    def grown(count, penalty):
        return penalty + growth / (count + 1.0) ** (1 / 7)

    method = Method(inner_steps, params_optimizer, Penalty(first, grown))
    return first_order(chosen, method, f2sa_call)


@explained_by(soba)
def penalty(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    params_optimizer: InnerOptimizer | None = None,
    inner_steps: int = 1,
    penalty: laws.Rate = 10.0,
    kind: Literal["value", "gradient"] = "value",
) -> GradientEstimator:
    """Penalised descent: params and theta descend outer + lambda times a measure of suboptimality.

    - "value": lambda (inner - inner at the follower). params move along d outer + lambda d inner,
      divided by lambda + 1; ``grad`` = d outer / d theta + lambda (d inner / d theta at params - at
      the follower), which takes ``inner_steps`` steps of its own first. It needs no strong
      convexity (V-PBGD).
    - "gradient": lambda |d inner / d params|^2, whose derivatives are 2 lambda (H g, B^T g) with
      the gradient g from another batch, so that they are unbiased. There is no follower
      (G-PBGD).

    Time: "value": inner_steps + 3 gradient-equivalents; "gradient": 5. Memory: 3 params, 2 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: The follower's optax optimizer.
        params_optimizer: params' optimizer; by default the same.
        inner_steps: Steps of the follower per call ("value" alone).
        penalty: lambda, a number or a function of the number of calls done.
        kind: "value" or "gradient".

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if ``kind`` is unknown, or lambda is not
            positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.penalty(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.05), num_steps=400, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f}")
        2.000

    References:
        Shen and Chen, On penalty-based bilevel gradient descent method, ICML 2023,
        arXiv:2302.05185.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("penalty", losses, init_params, inner_optimizer)
    if kind not in ("value", "gradient"):
        raise ValueError(f'`kind` must be "value" or "gradient"; got {kind!r}.')
    if callable(penalty):
        rule = Penalty(0.0, lambda count, before: before, penalty)
    else:
        rule = Penalty(positive("penalty", penalty), lambda count, before: before)
    method = Method(inner_steps, params_optimizer, rule, kind)
    return first_order(chosen, method, value_call if kind == "value" else gradient_call)


@explained_by(soba)
def bome(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    params_optimizer: InnerOptimizer | None = None,
    inner_steps: int = 10,
    eta: float = 0.5,
    control: Literal["norm", "value"] = "norm",
) -> GradientEstimator:
    """BOME: descent of outer that is never allowed to increase inner's suboptimality.

    The follower takes ``inner_steps`` steps of inner from params, in every call afresh. With
    q = inner(params, theta) - inner(follower, theta) and its gradient dq with respect to params and
    theta (the follower held fixed), both variables move along d outer + lambda dq with

        lambda = max(phi - <d outer, dq>, 0) / |dq|^2,

    phi = eta |dq|^2 ("norm") or eta q ("value"); lambda = 0 where dq = 0. The paper's batches are
    full ones; smaller ones make lambda biased.

    Time: inner_steps + 3 gradient-equivalents. Memory: 3 params, 2 theta.

    Args:
        outer: As in ``soba``.
        inner: As in ``soba``.
        init_params: As in ``soba``.
        outer_data: As in ``soba``.
        inner_data: As in ``soba``.
        inner_optimizer: The follower's optax optimizer; its state is fresh in every call.
        params_optimizer: params' optimizer; by default the same.
        inner_steps: Steps of the follower per call.
        eta: How fast the suboptimality must fall.
        control: "norm" or "value", the form of phi.

    Raises:
        TypeError, ValueError: As ``soba`` does; ValueError if ``control`` is unknown, or eta is not
            positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2)
        >>> estimator = ug.bilevel.bome(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.5), params_optimizer=optax.sgd(0.1))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.1), num_steps=400, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        2.00

    References:
        Liu, Ye, Wright, Stone and Liu, BOME! Bilevel optimization made easy: a simple first-order
        approach, NeurIPS 2022, arXiv:2209.08709.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("bome", losses, init_params, inner_optimizer)
    if control not in ("norm", "value"):
        raise ValueError(f'`control` must be "norm" or "value"; got {control!r}.')
    rule = Penalty(positive("eta", eta), lambda count, before: before)
    method = Method(inner_steps, params_optimizer, rule, control)
    return first_order(chosen, method, bome_call)
