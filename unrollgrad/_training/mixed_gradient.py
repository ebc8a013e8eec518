"""Inner gradients whose jvp and vjp are both computed in forward-over-reverse mode.

Backpropagation through training differentiates the inner gradient in reverse mode, and reverse over
reverse stores the activations of every layer twice. But the Jacobian of a gradient is symmetric, so
its product with a vector from the left equals the product from the right, which is the derivative
of the gradient along the vector. This needs only the weights and the batch of the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from unrollgrad._core.float_leaves import unseen
from unrollgrad._core.unroll import INNER_GRADIENT

Value = tuple[jax.Array, list[jax.Array]]
"""The value and the list of gradients."""


def mixed_value_and_grad(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Any]]:
    """``jax.value_and_grad`` whose derivatives store less for the backward pass.

    It is for the ``value_and_grad`` of ``training_problem``. The numbers are the same, also under
    jvp, vjp, vmap and their compositions, but its reverse mode is forward over reverse. Let g(w, c)
    be the value and its gradient in w, where c is everything that ``loss`` closes over, and J the
    Jacobian of g. J times a tangent is ``jax.jvp`` of g. J^T times (a, v) is a times the gradient
    in (w, c) plus the derivative of this gradient along (v, 0), which is (H v, B v) with
    H = d2 loss / dw2 and B = d2 loss / dc dw.

    Memory and time: it pays with ``bptt(remat="step")``, ``remat="log"`` and ``replay`` through
    deep nets whose layers are in a ``scan``: they keep the gradient of every step whose state they
    keep, and do not compute it again. For eight scanned layers of a transformer the temporaries
    are about 0.7 of those of ``jax.value_and_grad``; see ``python -m experiments mixed_mode``. It
    costs memory where layers are not scanned, and in ``dodge``.

    ``jax.value_and_grad`` itself handles losses with effects (``jax.debug.print``) or with a
    ``custom_vjp``, which may not support forward over reverse, and losses inside ``shard_map``
    (unless it has ``check_vma=False``, as in ``average``).

    Args:
        loss: ``loss(params) -> scalar``, with floating params.

    Returns:
        ``f(params) -> (value, gradient)``.

    Raises:
        ValueError: When called, if the loss is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> value, grad = ug.mixed_value_and_grad(lambda w: jnp.sum(w**3))(jnp.array([1.0, 2.0]))
        >>> float(value), grad.tolist()
        (9.0, [3.0, 12.0])

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
        return value, structure.unflatten([checkpoint_name(g, INNER_GRADIENT) for g in grads])

    return run


def has_custom_vjp(program: Any) -> bool:
    """Whether a traced program contains a ``custom_vjp``."""
    program = getattr(program, "jaxpr", program)
    return any(
        eqn.primitive.name.startswith("custom_vjp")
        or any(map(has_custom_vjp, core.jaxprs_in_params(eqn.params)))
        for eqn in program.eqns
    )


def _with_rule(loss: Callable[..., jax.Array], num_params: int) -> Callable[..., Value]:
    """Computes the value and the list of gradients in the first inputs, with our rule."""

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
    gradient: Callable[..., Value],
    num_params: int,
    inputs: Sequence[jax.Array],
    where: list[int],
) -> tuple[Callable[[list[jax.Array]], Value], Callable[[Value], list[jax.Array]]]:
    """The products with J and J^T for the inputs ``where``, both in forward-over-reverse mode."""
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
    push: Callable[[list[jax.Array]], Value],
    pull: Callable[[Value], list[jax.Array]],
    inputs: Sequence[jax.Array],
    tangents: list[jax.Array],
    like: Value,
) -> Value:
    """Returns ``push(tangents)``, a linear map whose transpose is ``pull``.

    In jax, a map with a custom transpose that can be differentiated again is a linear solve; here
    the system is [[1, 0], [-J, 1]] (x, y) = (tangents, 0). jax transposes it only if the whole
    right-hand side is linear in the differentiated inputs: ``unseen`` zeros tie its parts together.
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
