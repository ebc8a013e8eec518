"""Learning rates and other hyperparameters of an optax optimizer, adapted while it trains."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad import constraints as kinds
from unrollgrad.apo.proximal import Proximal, adapted, kl_divergence, relative_steps


def learning_rate(
    base: Callable[[Any], optax.GradientTransformation],
    initial: Any,
    *,
    lambda_fsd: float = 3.0,
    lambda_wsd: float = 1.0,
    discrepancy: Callable[[Any, Any], jax.Array] | None = kl_divergence,
    linearised: bool = False,
    constraints: Any = kinds.positive,
    meta_optimizer: optax.GradientTransformation | None = None,
    meta_interval: int = 10,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer whose learning rate descends a proximal objective while it trains (APO).

    Every ``meta_interval`` steps h takes a step down the meta-objective. With w the weights, w'(h)
    the weights after one look-ahead step of ``base(h)``, B the batch of this step's gradient and B'
    another one, it is

        Q(h) = loss(w'(h), B) + lambda_fsd mean discrepancy(predict(w'(h), B'), predict(w, B'))
               + lambda_wsd / 2 |w'(h) - w|²

    in unconstrained units: the logarithm, for what is positive. The gradient that was given serves
    the look-ahead and the real step, and is held fixed: no second derivative is taken. Q looks one
    step ahead; the two proximal terms are what keeps it from being greedy, and with both at 0 the
    loss at the end suffers.

    With gradients g from a fixed distribution, a quadratic loss of Hessian H, base optax.sgd and G
    the Hessian of the mean discrepancy, the rate goes to
    E[gᵀg] / E[gᵀ (H + lambda_fsd G + lambda_wsd I) g]; linearised, H is left out.

    ``optax.tree.get(state, "learning_rate")`` is the current rate;
    ``optax.tree.get(state, "ApoState").hyperparams`` the whole tree, for names that the state of
    ``base`` has too (groups of ``optax.partition``, injected hyperparameters). "total_notfinite"
    counts meta-gradients that were not finite: they are skipped, and h stays.

    Time: a meta-step adds a gradient of the loss on B, one of the discrepancy on B' and a
    prediction on B', about 2 1/3 training steps, 23 % at the default interval by count. Where
    ``vmap`` gives every element a step count of its own it is computed in every step. Memory: w',
    beside the gradient, which has to wait; XLA's plans take more
    (``python -m experiments apo_cost``).

    Args:
        base: ``base(h)``, an optax transform with these hyperparameters: ``optax.adam``, or
            ``lambda h: optax.sgd(h["learning_rate"], h["momentum"])``, or rates of groups in
            ``optax.partition``. What else happens to the step (clipping, weight decay, masks,
            ``optax.MultiSteps``) belongs in it, for the look-ahead to see it too: behind
            ``optax.clip`` in a chain a rate would rise freely. Its state keeps its structure.
        initial: Their first values: a number, the learning rate, or a pytree with names.
        lambda_fsd: Weight of the discrepancy in function space (in units of the loss), at least 0;
            0 leaves it out, and ``predict`` and ``other_batch`` with it. Larger: smaller steps.
        lambda_wsd: Weight of the squared distance in weight space, at least 0. The defaults are
            good for SGD, momentum, RMSprop and Adam with an MLP on digits, too cautious for a small
            conv net (``python -m experiments apo_learning_rate``): worth a small grid.
        discrepancy: ``discrepancy(outputs, reference)``, an array (one number per example): its
            mean counts. ``apo.kl_divergence`` of logits, ``apo.squared_error``, or your own.
        linearised: Take loss(w, B) + gᵀ (w' - w) for the loss, g being what ``update`` is given.
        constraints: Domains of the hyperparameters, a pytree prefix of them:
            ``ug.constraints.positive`` (by default), ``unit_interval`` (momentum), ``box``.
        meta_optimizer: Of a list of the unconstrained numbers. By default
            ``optax.rmsprop(0.1, eps=1e-30, bias_correction=True)``, steps of about 10 % of a rate.
            With optax's own ``eps`` a small rate hardly moves: its meta-gradient is as small.
        meta_interval: Steps from one meta-step to the next; the first step is one.
        axis_name: In ``shard_map`` or ``pmap`` with a batch for each device: the axis over which
            meta-gradients are averaged. ``loss`` and ``predict`` then see the device's own batch
            only, without collectives. Not needed for sharded arrays under ``jit``. In ``pmap``
            (and without ``check_vma``) devices would go apart without it.

    Returns:
        A transform whose ``update(gradient, state, params, *, loss, predict, batch, other_batch)``
        needs ``loss(params, batch) -> scalar``, of which ``gradient`` is the gradient, and
        ``predict(params, other_batch)``, the outputs. Other extra arguments go to ``base``.

    Raises:
        TypeError: If an argument is of the wrong kind; in ``init``, if a leaf of params is not
            floating, or ``base`` returns no optax transform.
        ValueError: If a lambda is negative, or an initial value outside its domain; in ``update``,
            if an argument is missing or the loss is no scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> predict, loss = lambda w, x: x @ w, lambda w, x: jnp.mean((x @ w - 1.0) ** 2) / 2
        >>> optimizer, w = ug.apo.learning_rate(
        ...     optax.sgd, 1e-3, discrepancy=ug.apo.squared_error), jnp.zeros((4, 1))
        >>> state, x = optimizer.init(w), jax.random.normal(jax.random.key(0), (8, 4))
        >>> updates, state = jax.jit(lambda state: optimizer.update(jax.grad(loss)(w, x), state, w,
        ...     loss=loss, predict=predict, batch=x, other_batch=x + 1))(state)
        >>> bool(optax.tree.get(state, "learning_rate") > 1e-3)
        True

    References:
        Bae, Vicol, HaoChen, Grosse, Amortized proximal optimization, NeurIPS 2022,
        arXiv:2203.00089.
    """
    if isinstance(base, optax.GradientTransformation) or not callable(base):
        raise TypeError(
            "`base` must be a function of the hyperparameters that returns an optax transform; got "
            f"a {type(base).__name__}. Pass optax.adam itself, or lambda rate: optax.adam(rate)."
        )
    single = jax.tree_util.treedef_is_leaf(jax.tree.structure(initial))
    named = {"learning_rate": initial} if single else initial
    if not jax.tree.leaves(named):
        raise ValueError(f"`initial` has no numbers; got {initial!r}. Pass a learning rate.")
    first = kinds.constrain(constraints, kinds.unconstrain(constraints, named))

    def optimizer(hyperparams):
        found = base(hyperparams["learning_rate"] if single else hyperparams)
        if not isinstance(found, optax.GradientTransformation):
            raise TypeError(f"`base` must return an optax transform; got a {type(found).__name__}.")
        return found

    return adapted(
        "learning_rate",
        lambda params: jax.tree.map(jnp.copy, first),  # for whoever donates the state
        constraints,
        optimizer,
        Proximal(
            lambda_fsd,
            lambda_wsd,
            discrepancy,
            linearised,
            relative_steps(0.1) if meta_optimizer is None else meta_optimizer,
            meta_interval,
            axis_name,
        ),
    )
