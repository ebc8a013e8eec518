"""Inner gradients whose own derivatives go forwards over backwards, in both directions.

Backpropagation through training differentiates the inner gradient in reverse, and reverse over
reverse keeps what every layer computed twice over. But the Jacobian of a gradient is symmetric: its
product with a vector from the left is one from the right as well, the gradient's derivative along
the vector. That needs the weights and the batch, and nothing else of the step is kept.

``training_problem`` does without: see ``python -m experiments mixed_mode`` for what it would cost.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from unrollgrad.implicit.linear import unseen


def value_and_grad(loss: Callable[[Any], jax.Array]) -> Callable[[Any], tuple[jax.Array, Any]]:
    """``jax.value_and_grad`` whose derivatives keep less for the way back.

    The same numbers, under jvp, vjp, vmap and twice. Let g(w, c) be the value and its gradient in
    w, c what ``loss`` closes over, and J the Jacobian of g. J times a tangent is ``jax.jvp`` of g.
    J^T times (a, v) is a times the gradient in (w, c), plus that gradient's derivative along
    (v, 0), which is (H v, B v) with B = d2 loss / dc dw.

    Left to jax are losses with effects (``jax.debug.print``) or a ``custom_vjp`` in their program,
    which may not go forwards over backwards, and those inside ``shard_map`` (unless it has
    ``check_vma=False``, as ``average``'s).

    Args:
        loss: ``loss(params) -> scalar``, with floating params.

    References:
        Kemaev, Calian, Zintgraf, Farquhar and van Hasselt, Scalable meta-learning via mixed-mode
        differentiation, ICML 2025.
    """

    def run(params):
        params = jax.tree.map(jnp.asarray, params)
        if (shape := jax.eval_shape(loss, params).shape) != ():
            raise ValueError(f"the loss of `loss` must be a scalar; got shape {shape}.")
        leaves, structure = jax.tree.flatten(params)
        program: Any = jax.make_jaxpr(lambda leaves: loss(structure.unflatten(leaves)))(leaves)
        inputs = jax.tree.leaves((leaves, program.consts))
        spread = any(jax.typeof(x).manual_axis_type.varying for x in inputs)
        if not leaves or spread or program.effects or has_custom_vjp(program):
            return jax.value_and_grad(loss)(params)

        def flat(*inputs):
            params, consts = inputs[: len(leaves)], inputs[len(leaves) :]
            return jax.core.eval_jaxpr(getattr(program, "jaxpr", program), consts, *params)[0]

        consts = [jnp.asarray(c) for c in program.consts]
        value, grads = _with_rule(flat, len(leaves))(*leaves, *consts)
        return value, structure.unflatten(grads)

    return run


def has_custom_vjp(program: Any) -> bool:
    """Whether a traced program has a reverse-mode rule in it."""
    program = getattr(program, "jaxpr", program)
    return any(
        eqn.primitive.name.startswith("custom_vjp")
        or any(map(has_custom_vjp, core.jaxprs_in_params(eqn.params)))
        for eqn in program.eqns
    )


def _with_rule(loss: Callable[..., jax.Array], num_params: int) -> Callable[..., Any]:
    """The value and the gradient in the first inputs, as a list, with their rule."""

    def gradient(*inputs):
        value, grads = jax.value_and_grad(loss, argnums=tuple(range(num_params)))(*inputs)
        return value, list(grads)

    def rule(inputs, tangents):
        where = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        out = gradient(*inputs)
        if not where:
            return out, jax.tree.map(jnp.zeros_like, out)
        push, pull = _products(loss, gradient, num_params, inputs, where)
        return out, _linear(push, pull, inputs, [tangents[i] for i in where], out)

    with_rule = jax.custom_jvp(gradient)
    with_rule.defjvp(rule, symbolic_zeros=True)
    return with_rule


def _products(
    loss: Callable[..., jax.Array],
    gradient: Callable[..., Any],
    num_params: int,
    inputs: Sequence[jax.Array],
    where: list[int],
) -> tuple[Callable[[list[jax.Array]], Any], Callable[[Any], list[jax.Array]]]:
    """The products with J and J^T, for the inputs ``where``; both forwards over backwards."""
    params, consts = inputs[:num_params], inputs[num_params:]

    def push(tangents):
        def at(*some):
            whole = dict(enumerate(inputs)) | dict(zip(where, some, strict=True))
            return gradient(*whole.values())

        return jax.jvp(at, [inputs[i] for i in where], tangents)[1]

    def pull(cotangents):
        scale, direction = cotangents
        slopes = jax.grad(loss, argnums=tuple(where))
        here, along = jax.jvp(lambda *params: slopes(*params, *consts), [*params], direction)
        return [(scale * a).astype(a.dtype) + b for a, b in zip(here, along, strict=True)]

    return push, pull


def _linear(
    push: Callable, pull: Callable, inputs: Sequence[jax.Array], tangents: list, like: Any
) -> Any:
    """``push(tangents)``, a linear map that is transposed to ``pull``.

    jax's map with a transpose of its own that can be differentiated again is a linear solve. Here
    it is that of [[1, 0], [-J, 1]] (x, y) = (tangents, 0). jax transposes it only where all of the
    right-hand side is linear in what is differentiated: ``unseen`` zeros bind its parts together.
    """
    nothing = unseen(tangents)
    one = 1 + unseen([x for x in inputs if jnp.issubdtype(x.dtype, jnp.inexact)])

    def add(a, b):
        return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), a, b)

    def matvec(xy):
        bound = jax.tree.map(lambda z: (one * z).astype(z.dtype), xy)
        return bound[0], jax.tree.map(jnp.subtract, bound[1], push(xy[0]))

    def solve(_, xy):
        x, y = xy
        return x, add(y, push(x))

    def transpose_solve(_, xy):
        x, y = xy
        return add(x, pull(y)), y

    system = (
        [t + nothing.astype(t.dtype) for t in tangents],
        jax.tree.map(lambda x: jnp.full_like(x, nothing), like),
    )
    return jax.lax.custom_linear_solve(matvec, system, solve, transpose_solve)[1]
