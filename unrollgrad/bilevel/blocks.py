"""Many inner problems under one theta: BSVRB, which visits some blocks per step."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from unrollgrad._checks import arguments
from unrollgrad._core.descriptions import explained_by
from unrollgrad._training import inner_optimizers
from unrollgrad.bilevel import _block_parts, _estimator, _losses, data
from unrollgrad.bilevel._block_parts import Last, Rows, Tracking
from unrollgrad.bilevel._estimator import Before
from unrollgrad.bilevel._losses import Losses, Places
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.implicit import trees
from unrollgrad.types import (
    ArrayTree,
    BilevelInfo,
    Episode,
    GradientEstimator,
    Key,
    MadeBy,
    Numeric,
    Theta,
)

__all__ = ["Blocks", "bsvrb"]


class Blocks(NamedTuple):
    """Where BSVRB stands; M blocks.

    Attributes:
        params: The inner variables, leading axis M.
        v: The solutions of the blocks' linear systems, leading axis M; in at least float32.
        rows: What else is kept per block, leading axis M.
        stamp: int32, leading axis M, the last step but one that sampled a block; -1 if none did.
        last: The blocks that the last step sampled, and where they stood before.
        places: The places in the data.
        count: int32, the steps done.
        direction: theta's direction of the step before, in at least float32.
        before: Theta in the call before, and the norm of its gradient.
    """

    params: Any
    v: Any
    rows: Rows
    stamp: jax.Array
    last: Last
    places: Places
    count: jax.Array
    direction: Any
    before: Before


@explained_by(soba)
def bsvrb(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    init_params: Callable[[Key], ArrayTree],
    num_blocks: int,
    blocks_per_step: int,
    outer_data: data.Source,
    inner_data: data.Source,
    inner_optimizer: InnerOptimizer,
    linear_optimizer: InnerOptimizer | None = None,
    tracks: Literal["products", "hessians"] = "products",
    alpha: float = 0.9,
    gamma: float = 1.0,
    beta: float = 0.9,
    radius: float | None = None,
    least_curvature: float = 1e-3,
    catch_up: bool = True,
) -> GradientEstimator:
    """BSVRB: the mean over M bilevel problems that share theta, some blocks per step.

    Minimises over theta the mean over blocks i of outer(params_i*(theta), theta, ., i), where
    params_i* minimises inner(., theta, ., i). A step samples ``blocks_per_step`` blocks without
    replacement. For each, on the same fresh batches at this step's point and at the last one's
    (new and old),

        s_i <- (1 - alpha) s_i + alpha new + gamma (new - old)

    for the direction s_i of params_i, and likewise for u_i, the direction H v - d outer / d params
    of v_i ("products"), or for the block's Hessian matrix H_i ("hessians", then v_i = H_i^-1 d
    outer / d params). theta's direction, the mean over the sampled blocks of d outer / d theta -
    B^T v_i, follows STORM: d <- new + (1 - beta) (d - old). Each begins with its first sample. A
    sampled block's step is multiplied by the number of steps since it was last sampled
    (``catch_up``), so that its mean speed does not depend on ``blocks_per_step``. With one block,
    "products" and gamma = 1 - alpha, alpha = beta it is ``soba`` with ``storm(alpha)``.

    Time: 8 gradient-equivalents per sampled block with "products", 2 (4 + 2 d) with "hessians" (d
    numbers in params_i), whatever M. Memory: M (4 params_i) and 3 theta; with "hessians" M d^2
    more. The arrays may be sharded over a mesh along the axis of the blocks.

    Args:
        outer: ``outer(params_i, theta, batch, i) -> scalar``, the mean over the batch.
        inner: ``inner(params_i, theta, batch, i) -> scalar``, the mean over the batch.
        init_params: ``init_params(key) -> params_i`` of one block; every block has its own key.
        num_blocks: M.
        blocks_per_step: The blocks that a step samples.
        outer_data: As in ``soba``; a sampler may also be ``sample_batch(key, i)``. Each sampled
            block gets its own batch.
        inner_data: As outer_data.
        inner_optimizer: As in ``soba``; every block has its own state.
        linear_optimizer: v's optimizer; by default the same.
        tracks: "products" or "hessians".
        alpha: The weight of the new sample, in (0, 1].
        gamma: The weight of the difference of new and old, at least 0.
        beta: How much of theta's direction is forgotten, in (0, 1].
        radius: The largest norm of a v_i ("products" alone); None: no limit.
        least_curvature: Eigenvalues of H_i below it are raised to it ("hessians" alone).
        catch_up: Whether a block's steps are multiplied by the steps since its last one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is outside its range, there are fewer blocks than a step samples, or
            a loss is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> data, pull = ug.bilevel.finite_sum(jnp.array([1.0, 3.0]), 2), jnp.array([0.5, 1.0, 2.0])
        >>> estimator = ug.bilevel.bsvrb(
        ...     lambda w, theta, x, i: jnp.mean((w - x) ** 2) / 2,
        ...     lambda w, theta, x, i: pull[i] * (w - theta) ** 2 / 2,
        ...     init_params=lambda key: jnp.zeros(()), num_blocks=3, blocks_per_step=1,
        ...     outer_data=data, inner_data=data, inner_optimizer=optax.sgd(0.1))
        >>> run = ug.fit(estimator, 0.0, optax.sgd(0.01), num_steps=2000, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        2.00

    References:
        Hu, Qiu, Guo, Zhang and Yang, Blockwise stochastic variance-reduced methods with parallel
        speedup for multi-block bilevel optimization, ICML 2023, arXiv:2305.18730.
    """
    losses = Losses(outer, inner, outer_data, inner_data)
    chosen = _estimator.settings("bsvrb", losses, init_params, inner_optimizer)
    blocks = arguments.positive_int("num_blocks", num_blocks)
    sampled = arguments.positive_int("blocks_per_step", blocks_per_step)
    if sampled > blocks:
        raise ValueError(
            f"`blocks_per_step`={sampled} is more than num_blocks={blocks}; use at most {blocks}."
        )
    if tracks not in ("products", "hessians"):
        raise ValueError(f'`tracks` must be "products" or "hessians"; got {tracks!r}.')
    for name, value in {"alpha": alpha, "beta": beta}.items():
        if not 0 < arguments.number(name, value) <= 1:
            raise ValueError(f"`{name}` must be in (0, 1]; got {value}.")
    linear = chosen.inner_optimizer
    if linear_optimizer is not None:
        linear = _estimator.optimizer("linear_optimizer", linear_optimizer)
    tracking = Tracking(
        tracks,
        alpha,
        arguments.number("gamma", gamma),
        None if radius is None else arguments.number("radius", radius),
        arguments.number("least_curvature", least_curvature),
        catch_up,
    )
    skeleton = _Skeleton(chosen, linear, tracking, blocks, sampled, beta)
    settings = (("num_blocks", blocks), ("blocks_per_step", sampled), ("tracks", tracks))
    return _estimator.forever(MadeBy("bsvrb", settings), losses, skeleton.begin, skeleton.step)


def _square(v: ArrayTree) -> jax.Array:
    """A Hessian matrix of zeros."""
    flat = ravel_pytree(v)[0]
    return jnp.zeros((flat.size, flat.size), flat.dtype)


class _Skeleton(NamedTuple):
    """The settings, and the two functions of the estimator."""

    chosen: _estimator.Settings
    linear: inner_optimizers.Optimizer
    tracking: Tracking
    blocks: int
    sampled: int
    beta: float

    def begin(self, episode: Episode, theta: Theta) -> Blocks:
        """The first state."""
        keys = jax.vmap(lambda i: jax.random.fold_in(episode.key, i))(jnp.arange(self.blocks))
        of_block = _block_parts.losses_of(self.chosen.losses, jnp.int32(0))
        one = self.chosen._replace(losses=of_block)
        _estimator.first_params(one, episode, theta)

        def row(key):
            own = episode._replace(key=key)
            params = _estimator.first_params(one, own, theta)
            v = _losses.widened(jax.tree.map(jnp.zeros_like, params))
            return (params, v), Rows(
                direction=_losses.widened(jax.tree.map(jnp.zeros_like, params)),
                linear=v if self.tracking.tracks == "products" else _square(v),
                optimizer=_estimator.opened(self.chosen.inner_optimizer, theta, params),
                linear_optimizer=_estimator.opened(self.linear, theta, v),
            )

        (params, v), rows = jax.vmap(row)(keys)
        head = jax.tree.map(lambda x: x[: self.sampled], (params, v))
        return Blocks(
            params,
            v,
            rows,
            jnp.full(self.blocks, -1, jnp.int32),
            Last(jnp.arange(self.sampled, dtype=jnp.int32), *head),
            _losses.start(self.chosen.losses),
            jnp.zeros((), jnp.int32),
            _losses.widened(jax.tree.map(jnp.zeros_like, theta)),
            _estimator.before(theta),
        )

    def step(self, episode: Episode, theta: Theta, carried: Blocks):
        """One step of the sampled blocks and of theta."""
        key, losses, count = episode.key, self.chosen.losses, carried.count
        index = _block_parts.subset(key, count, self.blocks, self.sampled)
        tokens, places = _block_parts.draws(losses, key, carried.places, self.sampled)

        def taken(tree):
            return jax.tree.map(lambda x: x[index], tree)

        now, rows = taken(((carried.params, carried.v), carried.rows))
        # The last step's stamps are written before others are read, in place.
        stamp = carried.stamp.at[carried.last.index].set(count - 1, unique_indices=True)
        late, first_visit = count - stamp[index], stamp[index] < 0
        before = carried.last.rows(index, count, now)
        thetas = theta, carried.before.theta
        found = jax.vmap(
            lambda i, token, row: _block_parts.visit(
                _block_parts.losses_of(losses, i), self.tracking, thetas, token, row
            )
        )(index, tokens, (now, before, rows, first_visit))
        first = count == 0
        new, old = (jax.tree.map(lambda x: jnp.mean(x, 0), x) for x in (found.new, found.old))
        moved = trees.add(new, trees.add(carried.direction, old, -1), 1 - self.beta)
        direction = jax.tree.map(lambda a, b: jnp.where(first, a, b), new, moved)
        optimizers = self.chosen.inner_optimizer, self.linear
        (params, v, rows), rate = jax.vmap(
            lambda row, found: _block_parts.move(optimizers, self.tracking, theta, row, found)
        )((now, rows, late), found)

        def put(tree, values):
            return jax.tree.map(lambda x, y: x.at[index].set(y, unique_indices=True), tree, values)

        info = BilevelInfo(
            inner_steps=jnp.int32(self.sampled),
            gradients=jnp.sum(found.gradients, dtype=jnp.int32),
            v_norm=_estimator.length(v),  # that of the sampled blocks: a sum over all costs M
            curvature=jnp.mean(found.curvature),
            inner_rate=jnp.mean(rate[0]),
            linear_rate=jnp.mean(rate[1]),
            outer_rate=_estimator.outer_rate(theta, carried.before),
        )
        after = Blocks(
            put(carried.params, params),
            put(carried.v, v),
            put(carried.rows, rows),
            stamp,
            Last(index, *now),
            places,
            count + 1,
            direction,
            Before(theta, _estimator.length(direction)),
        )
        loss = jnp.mean(found.loss)
        return _estimator.estimate_of(direction, theta, loss, info), after
