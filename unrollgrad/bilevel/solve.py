"""The outer loop over theta, with a cold or a warm start of the inner loop."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad._core.dtypes import standard_promotion
from unrollgrad._core.unroll import repeat
from unrollgrad._training import inner_optimizers
from unrollgrad.bilevel.unrolled import InnerOptimizer, by_theta, descend
from unrollgrad.implicit import HyperGradient, trees
from unrollgrad.implicit.hypergradient import start_of
from unrollgrad.implicit.linear import Start
from unrollgrad.types import ArrayTree, Numeric, Theta

__all__ = ["BilevelResult", "solve"]


class BilevelResult(NamedTuple):
    """The result of ``solve``, and its path.

    Attributes:
        theta: Outer parameters after the last outer step.
        params: Inner parameters at which the last hypergradient was taken.
        thetas: Theta at every ``every``-th outer step, before its update; leading axis
            ``num_steps / every``. The j-th belongs to ``outer_losses[(j + 1) * every - 1]``.
        paths: The params at these steps, after the inner steps with that theta.
        outer_losses: ``outer(params, theta)`` at all outer steps, ``(num_steps,)``.
    """

    theta: Any
    params: Any
    thetas: Any
    paths: Any
    outer_losses: jax.Array


class _Progress(NamedTuple):
    """What one outer step hands to the next."""

    theta: optax.Params
    inner: tuple[ArrayTree, optax.OptState]  # params, and the state of their optimizer
    outer_state: optax.OptState
    solve_from: Start
    before: optax.Params  # theta before its last update


def solve(
    inner: Callable[..., Numeric],
    hypergradient: Callable[..., HyperGradient],
    params: ArrayTree,
    theta: Theta,
    *,
    inner_optimizer: InnerOptimizer,
    inner_steps: int,
    outer_optimizer: optax.GradientTransformation,
    num_steps: int,
    start: Literal["cold", "warm"] = "warm",
    keep_v: bool = False,
    every: int = 1,
) -> BilevelResult:
    """Minimises outer(params*(theta), theta) over theta: inner descent, hypergradient, outer step.

    The start matters if the inner minimum is not unique (more weights than data):

    - "cold": every outer step trains from the given ``params``. The result depends on the last
      theta alone, so that training again with it reproduces the result.
    - "warm": every outer step continues from the last one, with the inner optimizer's state. This
      is cheaper, but the params remember earlier thetas: the outer loss can fall below the value
      that training afresh with the last theta reaches.

    If the minimum is unique and the inner steps suffice, both give the same result.

    Time: ``inner_steps`` gradients of inner and one hypergradient per outer step. Memory: one theta
    and params per ``every`` steps. The loop is one program, which every call compiles.

    Args:
        inner: ``inner(params, theta) -> scalar``.
        hypergradient: ``implicit.hypergradient(...)`` or ``bilevel.unrolled(...)``, made with
            the outer loss.
        params: Initial inner parameters.
        theta: Initial outer parameters.
        inner_optimizer: An optax optimizer, or a function of theta that returns one.
        inner_steps: Inner steps per outer step; 0 with ``unrolled`` and a cold start.
        outer_optimizer: An optax optimizer.
        num_steps: Number of outer steps.
        start: "cold" or "warm", see above.
        keep_v: Whether each linear solve begins at the last solution. The direction from which
            ``neumann(step_size="auto")`` finds its step size is kept in any case.
        every: Interval, in outer steps, at which theta and params are kept.

    Raises:
        ValueError: If ``start`` is unknown, a number of steps is not valid, ``every`` does not
            divide ``num_steps``, or ``keep_v`` is set for a hypergradient without a linear solve.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, optax, unrollgrad as ug
        >>> inner = lambda w, theta: (w - theta) ** 2
        >>> outer = lambda w, theta: (w - 3.0) ** 2
        >>> result = ug.bilevel.solve(
        ...     inner, ug.implicit.hypergradient(outer, inner, solver=lx.CG(1e-6, 1e-6)), 0.0, 0.0,
        ...     inner_optimizer=optax.sgd(0.3), inner_steps=10,
        ...     outer_optimizer=optax.sgd(0.3), num_steps=20)
        >>> print(f"{result.theta:.3f} {result.params:.3f}")
        3.000 3.000

    References:
        Vicol, Lorraine, Pedregosa, Duvenaud and Grosse, On implicit bias in overparameterized
        bilevel optimization, ICML 2022.
    """
    if start not in ("cold", "warm"):
        raise ValueError(f'`start` must be "cold" or "warm"; got {start!r}.')
    optimizer, num_steps = by_theta(inner_optimizer), arguments.positive_int("num_steps", num_steps)
    every = arguments.positive_int("every", every)
    if not isinstance(inner_steps, int) or inner_steps < 0:
        raise ValueError(f"`inner_steps` must be a whole number, 0 or more; got {inner_steps!r}.")
    if num_steps % every:
        raise ValueError(f"`every`={every} must divide num_steps={num_steps}.")
    params, theta = trees.check_floating("params", params), arguments.floating_theta(theta)
    shapes = jax.eval_shape(lambda *at: start_of(hypergradient(*at, None)), params, theta)
    if keep_v and shapes.value is None:
        raise ValueError("`keep_v=True` needs a hypergradient that solves; this one has v = None.")

    def kept(solve_from):
        return solve_from if keep_v else solve_from._replace(value=None)

    @eager.compiled
    def run(params, theta):
        begin = params, inner_optimizers.init(optimizer, theta, params)

        def outer_step(at, _):
            def inner_step(state):
                return descend(inner, optimizer, at.theta, *state)

            state = begin if start == "cold" else at.inner
            trained = repeat(inner_step, state, inner_steps)
            v0 = at.solve_from.value if at.solve_from.direction is None else at.solve_from
            out = hypergradient(trained[0], at.theta, v0)
            with standard_promotion():
                updates, outer_state = outer_optimizer.update(out.grad, at.outer_state, at.theta)
                outer_state = inner_optimizers.keep_dtypes(at.outer_state, outer_state)
                theta = optax.apply_updates(at.theta, updates)
            solve_from = kept(start_of(out))
            return _Progress(theta, trained, outer_state, solve_from, at.theta), out.outer_loss

        def stretch(at, _):
            at, losses = jax.lax.scan(outer_step, at, length=every)
            return at, (at.before, at.inner[0], losses)

        solve_from = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept(shapes))
        outer_state = outer_optimizer.init(theta)
        inner_optimizers.check_injected(
            "`outer_optimizer`", outer_optimizer.init, theta, outer_state
        )
        at = _Progress(theta, begin, outer_state, solve_from, theta)
        return jax.lax.scan(stretch, at, length=num_steps // every)

    at, (thetas, paths, losses) = run(params, theta)
    return BilevelResult(at.theta, at.inner[0], thetas, paths, losses.ravel())
