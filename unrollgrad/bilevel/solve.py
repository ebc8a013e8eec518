"""The outer loop over theta, with a cold or a warm start of the inner one."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad.bilevel.unrolled import InnerOptimizer, begun, descend
from unrollgrad.implicit import HyperGradient, trees
from unrollgrad.types import Theta


class BilevelResult(NamedTuple):
    """What ``solve`` found, and how it got there.

    Attributes:
        theta: Outer parameters after the last outer step.
        params: Inner parameters that the last hypergradient was taken at.
        thetas: Theta at every ``every``-th outer step, before its update; leading axis
            ``num_steps / every``. The j-th belongs to ``outer_losses[(j + 1) * every - 1]``.
        paths: Params likewise, after the inner steps with that theta.
        outer_losses: ``outer(params, theta)`` at all outer steps, ``(num_steps,)``.
    """

    theta: Theta
    params: Any
    thetas: Theta
    paths: Any
    outer_losses: jax.Array


def solve(
    inner: Callable[[Any, Theta], Any],
    hypergradient: Callable[..., HyperGradient],
    params: Any,
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

    The start decides what is found where the inner minimum is not unique (more weights than data):

    - "cold": every outer step trains from the given ``params``, so that the result depends on the
      last theta alone, and training again with it gives the same.
    - "warm": it goes on from where the last outer step ended, with the inner optimizer's state.
      Cheaper; and the params remember the thetas on the way: the outer loss can fall below what
      training afresh with the last theta reaches.

    With a unique minimum and enough inner steps both are the same.

    Time: per outer step ``inner_steps`` gradients of inner and a hypergradient. Memory: what is
    kept, one theta and params per ``every`` steps. All in one program, compiled in every
    call.

    Args:
        inner: ``inner(params, theta) -> scalar``.
        hypergradient: Of ``implicit.hypergradient(...)`` or ``bilevel.unrolled(...)``; knows outer.
        params: Where the inner descent begins.
        theta: Where the outer one does.
        inner_optimizer: An optax optimizer, or a function of theta that returns one.
        inner_steps: Per outer step; 0 with ``unrolled`` and a cold start.
        outer_optimizer: An optax optimizer.
        num_steps: Outer steps.
        start: See above.
        keep_v: Begin each linear solve where the last one ended.
        every: Outer steps between those whose theta and params are kept.

    Returns:
        The end, and both trajectories.

    Raises:
        ValueError: For another start, a negative number of steps, an ``every`` that does not divide
            ``num_steps``, or ``keep_v`` where nothing is solved.

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
    num_steps = arguments.positive_int("num_steps", num_steps)
    every = arguments.positive_int("every", every)
    if not isinstance(inner_steps, int) or inner_steps < 0:
        raise ValueError(f"`inner_steps` must be a whole number, 0 or more; got {inner_steps!r}.")
    if num_steps % every:
        raise ValueError(f"`every`={every} must divide num_steps={num_steps}.")
    params, theta = trees.check_floating("params", params), arguments.floating_theta(theta)
    if keep_v and jax.eval_shape(hypergradient, params, theta).v is None:
        raise ValueError("`keep_v=True` needs a hypergradient that solves; this one has v = None.")

    def train(theta, params, opt_state):
        def turn(carry, _):
            return descend(inner, inner_optimizer, theta, *carry), None

        carry, _ = jax.lax.scan(turn, (params, opt_state), length=inner_steps)
        return carry

    def outer_step(begin, carry, _):
        theta, inner_state, outer_state, v, _ = carry
        trained = train(theta, *(begin if start == "cold" else inner_state))
        out = hypergradient(trained[0], theta, v)
        updates, outer_state = outer_optimizer.update(out.grad, outer_state, theta)
        after = optax.apply_updates(theta, updates)
        carry = after, trained, outer_state, out.v if keep_v else None, theta
        return carry, out.outer_loss

    def stretch(begin, carry, _):
        carry, losses = jax.lax.scan(functools.partial(outer_step, begin), carry, length=every)
        return carry, (carry[4], carry[1][0], losses)

    @jax.jit
    def run(params, theta):
        begin = params, begun(inner_optimizer, theta).init(params)
        v = jax.tree.map(jnp.zeros_like, trees.widen(params)) if keep_v else None
        carry = theta, begin, outer_optimizer.init(theta), v, theta
        carry, kept = jax.lax.scan(
            functools.partial(stretch, begin), carry, length=num_steps // every
        )
        return carry, kept

    (theta, (params, _), *_), (thetas, paths, losses) = run(params, theta)
    return BilevelResult(theta, params, thetas, paths, losses.ravel())
