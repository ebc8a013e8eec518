"""A preconditioner that is learned during training, without an inverse."""

from collections.abc import Callable

import jax
import optax

from unrollgrad import constraints as kinds
from unrollgrad._checks import arguments
from unrollgrad.apo import structures
from unrollgrad.apo.proximal import KL, Default, Proximal, adapted, known_zero, relative_steps
from unrollgrad.apo.structures import Structure
from unrollgrad.types import Numeric

__all__ = ["preconditioner"]


def preconditioner(
    initial_rate: float,
    *,
    lambda_fsd: Numeric = 1.0,
    lambda_wsd: Numeric = 0.0,
    discrepancy: Callable[..., Numeric] | Default | None = KL,
    linearised: bool = False,
    structure: Structure | Callable[..., Structure | None] | None = None,
    meta_optimizer: optax.GradientTransformation | None = None,
    meta_interval: int = 10,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps -P g whose preconditioner P descends a proximal objective during training (APO-P).

    ``apo.learning_rate`` documents the objective, its batches, ``update`` and the reference; here
    w'(P) = w - P g. P has a block for each leaf of the weights: initial_rate times a positive
    semidefinite matrix of the leaf's ``Structure``, initially I. For a weight matrix the block is
    (A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, KFAC's form with a free basis. No matrix is inverted or
    decomposed, so it works in bfloat16 too: factors are kept in float32 and multiplied in the dtype
    of the gradient.

    For a quadratic loss of Hessian H and G the Hessian of the mean discrepancy, a ``dense`` P
    converges to (H + lambda_fsd G + lambda_wsd I)⁻¹ for any distribution of gradients whose second
    moment is not singular; with ``linearised`` to (lambda_fsd G + lambda_wsd I)⁻¹, which is natural
    gradient descent for lambda_wsd = 0 and a KL divergence.

    ``optax.tree.get(state, "preconditioner")`` is the tree of factors. "total_notfinite" counts
    skipped meta-gradients and "total_shortened" shortened steps, as in ``apo.learning_rate``.

    Time: P g in every step, four matrix products per weight matrix for any batch size; a meta-step
    costs as in ``apo.learning_rate``. Memory: as there, plus the factors, their gradient and the
    meta-optimizer's state.

    Args:
        initial_rate: P begins as this positive number times the identity: a learning rate for SGD.
        lambda_fsd: Weight of the discrepancy in function space, at least 0.
        lambda_wsd: Weight of the squared distance in weight space, at least 0: damping.
        discrepancy: As in ``apo.learning_rate``.
        linearised: As in ``apo.learning_rate``.
        structure: ``structure(path, leaf)``, the ``Structure`` of a leaf of the weights, or one for
            all leaves: ``apo.kronecker()``, ``dense()``, ``diagonal()``, ``identity()``,
            ``frozen()``. By default ``apo.by_shape()``: matrices and kernels are kronecker unless
            too large, others diagonal. ``path`` is formatted by ``jax.tree_util.keystr``, as in
            ``"['hidden']['kernel']"``.
        meta_optimizer: Optimizer for the factors (a list). By default
            ``optax.rmsprop(0.01, eps=1e-30, bias_correction=True)``: factors begin at 0 and 1, and
            meta-gradients fall by orders of magnitude.
        meta_interval: As in ``apo.learning_rate``.
        axis_name: As in ``apo.learning_rate``.

    Returns:
        A transform with the same ``update`` as ``apo.learning_rate``'s.

    Raises:
        TypeError: If an argument has the wrong type; in ``init``, if a leaf is not floating.
        ValueError: If a lambda is negative or ``initial_rate`` not positive; in ``init``, if
            ``structure`` does not cover a leaf; in ``update``, as for ``apo.learning_rate``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> predict, loss = lambda w, x: x @ w, lambda w, x: jnp.mean((x @ w - 1.0) ** 2) / 2
        >>> optimizer, w = ug.apo.preconditioner(
        ...     0.1, discrepancy=ug.apo.squared_error), jnp.zeros((4, 1))
        >>> state, x = optimizer.init(w), jax.random.normal(jax.random.key(0), (8, 4))
        >>> updates, state = jax.jit(lambda state: optimizer.update(jax.grad(loss)(w, x), state, w,
        ...     loss=loss, predict=predict, batch=x, other_batch=x + 1))(state)
        >>> jax.tree.map(jnp.shape, optax.tree.get(state, "preconditioner"))
        {'a': (4, 4), 'b': (1, 1), 's': (4, 1)}
    """
    if known_zero(arguments.number("initial_rate", initial_rate)):
        raise ValueError("`initial_rate` must be positive; got 0. P begins as this rate times I.")
    rule = structures.by_shape() if structure is None else structure
    if rule in structures.FACTORIES or not (isinstance(rule, Structure) or callable(rule)):
        raise TypeError(
            "`structure` must be a Structure such as apo.kronecker() (called), or a function of "
            f"(path, leaf) that returns one; got {rule!r}."
        )

    def blocks(params):
        return jax.tree_util.tree_map_with_path(lambda path, x: _structure(rule, path, x), params)

    def start(params):
        factors = jax.tree.map(lambda x, block: block.init(x), params, blocks(params))
        return {"preconditioner": factors}

    def optimizer(hyperparams, t):
        def step(updates, params):
            factors = hyperparams["preconditioner"]
            return jax.tree_util.tree_map_with_path(leaf, params, updates, blocks(params), factors)

        def leaf(path, x, g, block, factors):
            if arguments.shape_difference(jax.eval_shape(block.init, x), factors):
                raise ValueError(
                    f"the structure of params{_name(path)} is not the one of `init`: `structure` "
                    "must return the same for a leaf in every call."
                )
            return -initial_rate * block.multiply(factors, g)

        return optax.stateless(step)

    meta = relative_steps(0.01) if meta_optimizer is None else meta_optimizer
    proximal = Proximal(
        lambda_fsd, lambda_wsd, discrepancy, linearised, meta, meta_interval, axis_name
    )
    return adapted("preconditioner", start, kinds.free, optimizer, proximal)


def _name(path: jax.tree_util.KeyPath) -> str:
    """Name of a leaf, without the suffix ``.value`` of flax's variables."""
    return jax.tree_util.keystr(path).removesuffix(".value")


def _structure(
    rule: Structure | Callable[..., Structure | None],
    path: jax.tree_util.KeyPath,
    leaf: jax.Array,
) -> Structure:
    if not leaf.size:
        return structures.frozen()
    found = rule if isinstance(rule, Structure) else rule(_name(path), leaf)
    if not isinstance(found, Structure):
        raise ValueError(
            f"no structure for params{_name(path)}: `structure` returned {found!r} for it. Return "
            "apo.kronecker(), apo.dense(), apo.diagonal(), apo.identity() or apo.frozen(), or "
            "another Structure."
        )
    return found
