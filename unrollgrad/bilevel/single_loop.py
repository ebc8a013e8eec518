"""The single-loop skeleton: three variables that move together along estimated directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.bilevel import _estimator, _field, _losses, data
from unrollgrad.bilevel import directions as laws
from unrollgrad.bilevel._estimator import Before
from unrollgrad.bilevel._losses import Losses, Places, Point
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.types import ArrayTree, BilevelInfo, GradientEstimator, Key, MadeBy, Numeric

__all__ = ["SingleLoop", "single_loop", "soba"]


class SingleLoop(NamedTuple):
    """Where a single-loop algorithm stands.

    Attributes:
        params: The inner variable.
        v: The solution of the linear system so far, H v = d outer / d params; in at least float32.
        optimizer: The state of the inner optimizer.
        linear: The state of v's optimizer; None if v is not a variable.
        places: The places in the data.
        memory: The memory of the estimator of directions.
        before: Theta in the call before.
    """

    params: Any
    v: Any
    optimizer: Any
    linear: Any
    places: Places
    memory: Any
    before: Before


def soba(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    directions: laws.Estimator | None = None,
) -> GradientEstimator:
    """SOBA: params, v and theta move at the same time, each along one estimated direction.

    With H = d2 inner / d params^2 and B = d2 inner / d theta d params, one call takes, from the old
    values of all three variables and one batch of each data set,

        params along  d inner / d params,
        v      along  H v - d outer / d params,
        theta  along  d outer / d theta - B^T v   (``estimate.grad``).

    v is the q of ``implicit.hypergradient``, H q = d outer / d params; the paper's v is -q. Where
    all three directions vanish, the last one is the gradient of theta -> outer(params*(theta),
    theta). ``ug.fit(soba, theta, optax.sgd(rate), ...)`` is the algorithm; away from that point
    ``grad`` is biased by the lag of params and v.

    **Rates.** On an inner loss with curvature mu, theta must be slower than params: outer rate <<
    inner rate mu^3, in units where the outer loss has curvature one. ``info`` has what tells:
    ``v_norm``, ``curvature`` and both rates; ``bilevel.advice`` reads them. With constant rates and
    ``sgd`` the error stops at a floor proportional to the rates; ``saga``, ``sarah`` and ``page``
    have none on a finite sum.

    Time: a gradient of inner, its products with H and B from one ``vjp``, and a gradient of outer:
    4 gradient-equivalents (``directions`` may multiply it). Memory: 2 params, 2 theta, the
    optimizers and the memory of ``directions``.

    Args:
        outer: ``outer(params, theta, batch) -> scalar``, the mean over the batch.
        inner: ``inner(params, theta, batch) -> scalar``, the mean over the batch; params minimise
            it.
        init_params: ``init_params(key) -> params``, any pytree of floating arrays.
        outer_data: The batches of outer: ``bilevel.finite_sum(arrays, batch_size)``, or a function
            ``sample_batch(key)``.
        inner_data: The batches of inner.
        inner_optimizer: The optax optimizer of params, or a function of theta that returns one.
        linear_optimizer: v's optimizer; by default the same.
        directions: ``bilevel.sgd()`` (the default), ``moving_average``, ``saga``, ``sarah``,
            ``page`` or ``storm``.

    Returns:
        An estimator without episodes: it begins in ``init``, and ``state.carried.params`` and
        ``state.carried.v`` are where the variables stand. ``estimate.loss`` is outer on the batch.
        ``average`` of it is the mean over independent replicas.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``directions`` does not fit the data, or in ``init``, if a loss is not a
            scalar, or is a sum over the rows: it is tried on the first batch of a finite sum,
            repeated. ``fit`` and ``average`` run this check, ``jax.jit`` over ``init`` hides theta
            and thereby the sum.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 1)
        >>> estimator = ug.bilevel.soba(
        ...     lambda w, theta, x: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x: (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), outer_data=data, inner_data=data,
        ...     inner_optimizer=optax.sgd(0.1), directions=ug.bilevel.saga())
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.02), num_steps=500, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f} {run.worker_state.carried.params:.3f}")
        2.000 2.000

    References:
        Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms, NeurIPS 2022, arXiv:2201.13409.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("soba", losses, init_params, inner_optimizer)
    directions = laws.sgd() if directions is None else directions
    return single_loop(chosen, _field.single_loop(losses), directions, linear_optimizer)


def single_loop(
    chosen: _estimator.Settings,
    field: _field.Field,
    law: laws.Estimator,
    linear_optimizer: InnerOptimizer | None = None,
) -> GradientEstimator:
    """The skeleton: the variables that have a direction in the field move along its estimate."""
    if not isinstance(law, laws.Estimator):
        raise TypeError(
            "`directions` must be bilevel.sgd(), moving_average, saga, sarah, page or storm; got "
            f"{law!r}."
        )
    solves = "v" not in field.moves  # the field solves for v itself
    linear = chosen.inner_optimizer
    if linear_optimizer is not None:
        linear = _estimator.optimizer("linear_optimizer", linear_optimizer)

    def at(carried, theta):
        return Point(carried.params, None if solves else carried.v, theta)

    def begin(episode, theta):
        params = _estimator.first_params(chosen, episode, theta)
        v = _losses.widened(jax.tree.map(jnp.zeros_like, params))
        carried = SingleLoop(
            params,
            v,
            _estimator.opened(chosen.inner_optimizer, theta, params),
            None if solves else _estimator.opened(linear, theta, v),
            _losses.start(chosen.losses),
            None,
            _estimator.before(theta),
        )
        return carried._replace(memory=law.init(field, at(carried, theta)))

    def step(episode, theta, carried):
        point = at(carried, theta)
        found, places, memory = law.update(
            field, episode.key, point, carried.places, carried.memory
        )
        moves = found.directions
        params, state, updates = _estimator.moved(
            chosen.inner_optimizer, theta, moves.params, carried.optimizer, carried.params
        )
        v, linear_state, linear_rate = found.v, carried.linear, jnp.float32(found.rate)
        if not solves:
            v, linear_state, along = _estimator.moved(
                linear, theta, moves.v, linear_state, carried.v
            )
            linear_rate = _estimator.rate(along, _estimator.length(moves.v))
        info = BilevelInfo(
            inner_steps=jnp.int32(1),
            gradients=jnp.int32(found.gradients),
            v_norm=_estimator.length(v),
            curvature=found.curvature,
            inner_rate=_estimator.rate(updates, _estimator.length(moves.params)),
            linear_rate=linear_rate,
            outer_rate=_estimator.outer_rate(theta, carried.before),
        )
        last = Before(theta, _estimator.length(moves.theta))
        after = SingleLoop(params, v, state, linear_state, places, memory, last)
        return _estimator.estimate_of(moves.theta, theta, found.loss, info), after

    fingerprint = MadeBy(chosen.name, (("directions", law.label),))
    return _estimator.forever(fingerprint, chosen.losses, begin, step)
