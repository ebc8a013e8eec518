"""Learning rates and other hyperparameters of an optax optimizer, adapted during training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad import constraints as kinds
from unrollgrad.apo.proximal import KL, Default, Proximal, adapted, relative_steps
from unrollgrad.types import Numeric

__all__ = ["learning_rate"]


def learning_rate(
    base: Callable[..., optax.GradientTransformation],
    initial: Any,
    *,
    lambda_fsd: Numeric = 3.0,
    lambda_wsd: Numeric = 1.0,
    discrepancy: Callable[..., Numeric] | Default | None = KL,
    linearised: bool = False,
    constraints: Any = kinds.positive,
    meta_optimizer: optax.GradientTransformation | None = None,
    meta_interval: int = 10,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer whose learning rate descends a proximal objective during training (APO).

    Every ``meta_interval`` steps the hyperparameters h take a step down the meta-objective Q. With
    w the weights, w'(h) the weights after one look-ahead step of ``base(h)``, B the batch of this
    step's gradient and B' another batch, the meta-objective is

        Q(h) = loss(w'(h), B) + lambda_fsd mean discrepancy(predict(w'(h), B'), predict(w, B'))
               + lambda_wsd / 2 |w'(h) - w|²

    It is descended in unconstrained units: the logarithm of a positive number. The look-ahead step
    and the real step use the given gradient as a constant, so no second derivative is taken. Q
    looks one step ahead; the two proximal terms keep it from being greedy, and without them the
    final loss is worse.

    For gradients g from a fixed distribution, a quadratic loss of Hessian H, base optax.sgd and G
    the Hessian of the mean discrepancy, the rate converges to
    E[gᵀg] / E[gᵀ (H + lambda_fsd G + lambda_wsd I) g]; with ``linearised``, H is left out.

    ``optax.tree.get(state, "learning_rate")`` is the current rate. If the state of ``base`` has the
    same names (groups of ``optax.partition``, injected hyperparameters), use
    ``optax.tree.get(state, "ApoState").hyperparams``. "total_notfinite" counts the meta-gradients
    that were not finite; they are skipped and leave h unchanged.

    If the look-ahead step raises Q by over three times what recent ones lowered it by, the step is
    halved until Q does not rise, and the next step has a meta-step too, whatever the interval.
    Ordinary mini-batches hardly ever cause it, with momentum too; a rate that begins too high does,
    and noiseless gradients, from which steep directions vanish until the rate is too high for them.
    "total_shortened" counts these steps. It is checked at meta-steps: for noiseless gradients set
    ``meta_interval=1``.

    Time: a meta-step adds a gradient of the loss on B, a gradient of the discrepancy on B', the
    loss on B and a prediction on B', about 2 2/3 training steps: 27 % at the default interval by
    count. Under ``vmap`` over step counts it is computed in every step. Memory: w' and the
    gradient; XLA's plans take more (``python -m experiments apo_cost``).

    Args:
        base: ``base(h)``, an optax transform with these hyperparameters: ``optax.adam``, or
            ``lambda h: optax.sgd(h["learning_rate"], h["momentum"])``, or rates of groups in
            ``optax.partition``. Include everything that changes the step (clipping, weight decay,
            masks, ``optax.MultiSteps``), so that the look-ahead includes it too: with
            ``optax.clip`` after it in a chain, a rate would rise freely. Its state keeps its
            structure.
        initial: Initial values: a number, the learning rate, or a pytree with names.
        lambda_fsd: Weight of the discrepancy in function space (in units of the loss), at least 0.
            Larger values make steps smaller; 0 makes ``predict`` and ``other_batch`` unnecessary.
        lambda_wsd: Weight of the squared distance in weight space, at least 0. The default weights
            are good for SGD, momentum, RMSprop and Adam with an MLP on digits, too cautious for a
            small conv net (``python -m experiments apo_learning_rate``): try a small grid.
        discrepancy: ``discrepancy(outputs, reference)``, an array such as one number per example;
            Q uses its mean. ``apo.kl_divergence`` of logits, ``apo.squared_error``, or your own.
        linearised: Replaces the loss by loss(w, B) + gᵀ (w' - w), where g is the given gradient.
        constraints: Domains of the hyperparameters, a pytree prefix of them:
            ``ug.constraints.positive`` (by default), ``unit_interval`` (momentum), ``box``.
        meta_optimizer: Optimizer for the unconstrained hyperparameters (a list). By default
            ``optax.rmsprop(0.1, eps=1e-30, bias_correction=True)``, steps of about 10 % of a rate.
            With optax's own ``eps`` a small rate hardly moves: its meta-gradient is as small.
        meta_interval: Steps between meta-steps; the first step includes a meta-step.
        axis_name: In ``shard_map`` or ``pmap`` with a batch for each device: the axis over which
            meta-gradients are averaged. ``loss`` and ``predict`` then see the device's own batch
            only, without collectives. Not needed for sharded arrays under ``jit``. In ``pmap``
            (and without ``check_vma``) devices would diverge without it.

    Returns:
        A transform whose ``update(gradient, state, params, *, loss, predict, batch, other_batch)``
        needs ``loss(params, batch) -> scalar``, the function that ``gradient`` differentiates, and
        ``predict(params, other_batch)``, the outputs. Other extra arguments go to ``base``.

    Raises:
        TypeError: If an argument has the wrong type; in ``init``, if a leaf of params is not
            floating, or ``base`` does not return an optax transform.
        ValueError: If a lambda is negative, or an initial value outside its domain; in ``update``,
            if an argument is missing or the loss is not a scalar.

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

    def optimizer(hyperparams, t):
        found = base(hyperparams["learning_rate"] if single else hyperparams)
        if not isinstance(found, optax.GradientTransformation):
            raise TypeError(f"`base` must return an optax transform; got a {type(found).__name__}.")
        return found

    def start(params):
        return jax.tree.map(jnp.copy, first)  # so that the state may be donated

    meta = relative_steps(0.1) if meta_optimizer is None else meta_optimizer
    proximal = Proximal(
        lambda_fsd, lambda_wsd, discrepancy, linearised, meta, meta_interval, axis_name
    )
    return adapted("learning_rate", start, constraints, optimizer, proximal)
