"""The gradient of the outer loss through the last steps of the inner descent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad._core.unroll import Remat
from unrollgrad._training import inner_optimizers
from unrollgrad.estimators import bptt
from unrollgrad.implicit import HyperGradient, trees
from unrollgrad.types import ArrayTree, Numeric, Theta, UnrolledProblem

__all__ = ["InnerOptimizer", "by_theta", "descend", "unrolled"]

InnerOptimizer = optax.GradientTransformation | Callable[..., optax.GradientTransformation]
"""An optax optimizer, or a function of theta that returns one."""


def unrolled(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    optimizer: InnerOptimizer,
    num_steps: int,
    start: Callable[..., ArrayTree] | None = None,
    remat: Remat = None,
) -> Callable[..., HyperGradient]:
    """Backpropagation through ``num_steps`` inner steps, in place of ``implicit.hypergradient``.

    Estimates d/dtheta of outer(w_K(theta), theta), where w_K is the result of K = num_steps inner
    steps from the given params, which count as constant unless ``start`` computes the first ones.
    That is the whole path if they are its initial params, and its last K steps if they were trained
    before. At a minimum of inner, with
    gradient descent of rate alpha, it equals ``hypergradient(solver=neumann(K, alpha))``; but here
    theta may also be in the optimizer, such as its learning rate.

    Time: K inner steps forwards and back. Memory: what they compute; less with ``remat``.

    Args:
        outer: ``outer(params, theta) -> scalar``.
        inner: ``inner(params, theta) -> scalar``.
        optimizer: An optax optimizer, or a function of theta that returns one; its state is fresh.
        num_steps: K.
        start: ``start(params, theta) -> params``, where the inner steps begin; the gradient goes
            through it. For MAML, whose weights begin at theta: ``lambda params, theta: theta``.
        remat: As in ``bptt``.

    Returns:
        ``f(params, theta, v0=None) -> HyperGradient``, with None for ``v`` and ``info``.

    Raises:
        ValueError: If ``num_steps`` is not positive.

    Example:
        >>> import jax.numpy as jnp, optax, unrollgrad as ug
        >>> f = ug.bilevel.unrolled(
        ...     lambda w, rate: w**2 / 2, lambda w, rate: w**2 / 2,
        ...     optimizer=lambda rate: optax.sgd(rate), num_steps=2)
        >>> print(f"{f(1.0, 0.5).grad:.4f}")  # d/drate (1 - rate)^4 / 2
        -0.2500
    """
    chosen, num_steps = by_theta(optimizer), arguments.positive_int("num_steps", num_steps)

    @eager.compiled
    def run(params, theta):
        def init(key, theta):
            begin = params if start is None else start(params, theta)
            begin = trees.check_floating("start", begin)
            return begin, inner_optimizers.init(chosen, theta, begin)

        def step(key, theta, state, t):
            return descend(inner, chosen, theta, *state), jnp.zeros(())

        def evaluate(key, theta, state):
            return outer(state[0], theta)

        problem = UnrolledProblem(init, step, num_steps, evaluate)
        estimator, key = bptt(problem, remat=remat), jax.random.key(0)
        out, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        return HyperGradient(out.grad, out.loss, None, None)

    def f(params: ArrayTree, theta: Theta, v0: None = None) -> HyperGradient:
        return run(trees.check_floating("params", params), arguments.floating_theta(theta))

    return f


def descend(
    inner: Callable[..., Numeric],
    optimizer: inner_optimizers.Optimizer,
    theta: Theta,
    params: optax.Params,
    opt_state: optax.OptState,
) -> tuple[optax.Params, optax.OptState]:
    """One inner step, with this theta's hyperparameters: the next params and optimizer state."""
    value, grad = jax.value_and_grad(inner)(params, theta)
    updates, opt_state = inner_optimizers.update(
        optimizer, theta, 0, grad, opt_state, params, value=value
    )
    return optax.apply_updates(params, updates), opt_state


def by_theta(optimizer: InnerOptimizer) -> inner_optimizers.Optimizer:
    """The optimizer as a function of theta and of the step, which it ignores."""
    return lambda theta, t: optimizer(theta) if callable(optimizer) else optimizer
