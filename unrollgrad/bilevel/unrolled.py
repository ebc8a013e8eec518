"""The gradient of the outer loss through the last steps of the inner descent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core.unroll import Remat
from unrollgrad._training import inner_optimizers
from unrollgrad.estimators import bptt
from unrollgrad.implicit import HyperGradient, trees
from unrollgrad.types import Theta, UnrolledProblem

InnerOptimizer = optax.GradientTransformation | Callable[[Theta], optax.GradientTransformation]


def unrolled(
    outer: Callable[[Any, Theta], Any],
    inner: Callable[[Any, Theta], Any],
    *,
    optimizer: InnerOptimizer,
    num_steps: int,
    remat: Remat = None,
) -> Callable[..., HyperGradient]:
    """Backpropagation through ``num_steps`` inner steps, where ``hypergradient`` is asked for.

    Estimates d/dtheta of outer(w_K(theta), theta), where w_K is what K = num_steps steps make of
    the params, which count as constant: the whole path if those are where it begins, its last K
    steps if they were trained before. At a minimum of inner, with gradient descent of rate alpha,
    it is ``hypergradient(solver=neumann(K, alpha))``. Unlike that, theta may be in the optimizer,
    such as its learning rate.

    Time: K inner steps forwards and back. Memory: what they compute; less with ``remat``.

    Args:
        outer: ``outer(params, theta) -> scalar``.
        inner: ``inner(params, theta) -> scalar``.
        optimizer: An optax optimizer, or a function of theta that returns one; its state is fresh.
        num_steps: K.
        remat: As in ``bptt``.

    Returns:
        ``f(params, theta, v0=None)`` as ``implicit.hypergradient`` returns it; ``v`` and ``info``
        are None.

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
    num_steps = arguments.positive_int("num_steps", num_steps)

    def f(params: Any, theta: Theta, v0: Any = None) -> HyperGradient:
        params = trees.check_floating("params", params)

        def init(key, theta):
            return params, begun(optimizer, theta).init(params)

        def step(key, theta, state, t):
            return descend(inner, optimizer, theta, *state), jnp.zeros(())

        def evaluate(key, theta, state):
            return outer(state[0], theta)

        problem = UnrolledProblem(init, step, num_steps, evaluate)
        estimator, key = bptt(problem, remat=remat), jax.random.key(0)
        out, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        return HyperGradient(out.grad, out.loss, None, None)

    return f


def descend(
    inner: Callable[[Any, Theta], Any],
    optimizer: InnerOptimizer,
    theta: Theta,
    params: Any,
    opt_state: Any,
) -> tuple[Any, Any]:
    """One inner step: params and the optimizer's state, with this theta's hyperparameters."""
    grad = jax.grad(inner)(params, theta)
    updates, opt_state = inner_optimizers.update(
        lambda theta, t: begun(optimizer, theta), theta, 0, grad, opt_state, params
    )
    return optax.apply_updates(params, updates), opt_state


def begun(optimizer: InnerOptimizer, theta: Theta) -> optax.GradientTransformation:
    """The optimizer for this theta."""
    return optimizer(theta) if callable(optimizer) else optimizer
