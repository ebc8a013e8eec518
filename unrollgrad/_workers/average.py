"""Many workers as one estimator: the mean over them, on one device or many."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.descriptions import described
from unrollgrad._workers import mean_and_variance, staggering
from unrollgrad._workers.curriculum import CurriculumState
from unrollgrad._workers.mesh import axis_size, over_axis
from unrollgrad.types import ArrayTree, Estimate, GradientEstimator, Key, Theta, WorkerState

_Data = ArrayTree | None

_Layout = Any
"""The layout of a tree on the devices: a tree of shardings."""

_BURN_IN, _SIGNS = 0x6275726E, 0x7369676E  # folded into keys; larger than any worker's index


@described
def average(
    estimator: GradientEstimator,
    num_workers: int,
    *,
    mesh: Mesh | None = None,
    axis: str = "workers",
    stagger: str = "lockstep",
    batch_size: int | None = None,
    nonfinite: str = "drop",
) -> GradientEstimator:
    """The mean of ``num_workers`` independent workers, each with its own episode.

    ``grad`` is the mean over i of ``estimator.estimate(fold_in(key, i), theta, state_i)``. It has
    the expectation of a single worker's gradient, and 1/num_workers of its variance.

    **Devices.** ``mesh`` spreads the workers over the devices of its axis ``axis``: one
    ``jax.shard_map`` (what ``jax.pmap`` compiles to) with one ``psum`` per call. The state is
    sharded from ``init`` on, and ``grad`` is on all devices. The random bits (of JAX's default,
    threefry) depend neither on the number of devices nor on ``batch_size``; losses and gradients
    then agree up to rounding. For several processes see docs/devices.md. The same numbers come
    from one worker per device, with ``estimator`` itself in ``jax.pmap(..., axis_name="workers")``
    or in your own ``jax.shard_map``::

        def update(key, theta, state):
            key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
            estimate, state = estimator.estimate(key, theta, state)
            return jax.lax.pmean((estimate.grad, estimate.loss), "workers"), state

    On a mesh with further axes, such as ("workers", "model"), the workers share the devices of a
    place on ``axis``: theta and the states may be spread over the other axes, XLA divides the work,
    and ``grad`` lies as theta does; see docs/scale.md.

    **Stagger.** With "lockstep" all workers stand at the same window, so one call estimates the
    gradient of that window alone; only the mean over an episode's T/K calls estimates the gradient
    of J. With "breakstep" worker i's *first* episode ends after ceil((i+1)/num_workers * T/K)
    windows, so that later each call has workers at all windows; the first T/K calls see early
    windows too often. With "burn_in" ``init`` runs worker i for floor(i/num_workers * T/K) windows
    at its theta, up to T/K - 1 calls of work that ``info`` does not count. With a static horizon
    every call then estimates the gradient of J, without bias where T/K divides num_workers; with a
    sampled horizon longer episodes are rarer at first than later on. Either one turns ``es_single``
    into NRES. Staggering does not change the long-run variance, only single updates: with N workers
    their squared error is B + V/N in lockstep and V/N after burn_in, B being how far the windows'
    gradients are from that of J, and V a window's noise. "lockstep" is the default since the mean
    over an episode is as good, nothing is spent before the first update, and it fits every
    estimator, ``data`` and curricula; take "burn_in" where B is larger than V/N and the outer
    optimizer's memory is shorter than an episode.

    **Bad workers.** With ``nonfinite="drop"`` a worker whose loss or gradient is not finite is left
    out of the mean, begins a new episode in the next call, and is counted in
    ``info.num_nonfinite``. This biases the estimate towards the region where nothing blows up;
    watch the count. With ``"propagate"`` nothing is left out: one bad worker makes the mean NaN or
    inf, visibly.

    ``info.grad_variance`` estimates the trace of the covariance of ``grad`` from the spread over
    workers. In lockstep it is unbiased. Staggered it is an upper bound, because the gradients of
    the windows differ, too, which is not noise of the mean. With several devices and more than 128
    numbers in theta, the differences between the devices' means enter through random sketches:
    unbiased, with a relative error of that part of about sqrt(2/128 / (devices - 1)).

    Time and memory are ``num_workers`` times the estimator's, in one ``vmap``; each of d devices
    has 1/d of it. With ``batch_size`` the estimator's memory is needed only ``batch_size`` times;
    the worker states and one sum remain.

    Args:
        estimator: What each worker runs.
        num_workers: The number of workers, a multiple of the number of devices.
        mesh: A mesh of devices with Auto axes: ``make_worker_mesh()``. None: the default device.
        axis: The mesh axis over which the workers are spread; further axes are for theta.
        stagger: "lockstep", "breakstep" or "burn_in".
        batch_size: The number of workers that a device runs at a time while the others wait; it
            divides the number of workers per device. None: all.
        nonfinite: "drop" or "propagate".

    Returns:
        An estimator whose state has a leading axis ``num_workers`` on every leaf, whose ``data``
        has leaves ``(num_workers, truncation, ...)``, and whose ``info`` is an ``AverageInfo``.

    Raises:
        TypeError: If ``estimator`` is not a GradientEstimator, or ``mesh`` is not a
            ``jax.sharding.Mesh``.
        ValueError: If num_workers is not positive or not a multiple of the devices, batch_size
            does not divide, an option is not recognised, the mesh lacks the axis or has one that is
            not Auto, the estimator is itself an average, ``stagger`` meets an estimator without
            ``truncation`` or a curriculum, burn_in meets ``data``, a leaf of ``data`` does not have
            the leading axis ``num_workers``, or another mesh is in force.
        FloatingPointError: Outside ``jit``, if no worker is left; inside, grad and loss are NaN.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> nres = ug.es_single(problem, truncation=10, sigma=0.1)
        >>> workers = ug.average(nres, 64, mesh=ug.make_worker_mesh(1), stagger="burn_in")
        >>> state = workers.init(jax.random.key(0), theta)
        >>> estimate, state = workers.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(estimate.info.num_nonfinite)
        (1280, 0)

    References:
        Li, Harrison, Sohl-Dickstein, Smith and Metz, Noise-reuse in online evolution strategies,
        NeurIPS 2023, arXiv:2304.12180 (staggered workers).
    """
    if not isinstance(estimator, GradientEstimator):
        raise TypeError(
            f"`estimator` must be a GradientEstimator such as ug.pes(problem, ...); got a "
            f"{type(estimator).__name__}."
        )
    num_workers = arguments.positive_int("num_workers", num_workers)
    _check_one_of("nonfinite", nonfinite, ("drop", "propagate"))
    _check_one_of("stagger", stagger, ("lockstep", "breakstep", "burn_in"))
    if stagger != "lockstep" and estimator.truncation is None:
        raise ValueError(
            f'stagger="{stagger}" needs an estimator with a `truncation`; this one has None: every '
            'call is a whole episode, and there is nothing to stagger. Use stagger="lockstep".'
        )
    own = num_workers if mesh is None else _workers_per_device(num_workers, mesh, axis)
    chunk = own if batch_size is None else _check_batch_size(batch_size, own, num_workers)
    chunks, over = (own // chunk, chunk), None if mesh is None else axis
    workers = _Workers(estimator, num_workers, chunks, over, stagger, nonfinite)
    whole, split = PartitionSpec(), PartitionSpec(axis)
    begin, step = functools.partial(_begin_all, workers), functools.partial(_step_all, workers)
    if mesh is None:
        begin, step = jax.jit(begin), jax.jit(step)
    else:
        begin = over_axis(begin, mesh, axis, ((whole, whole), split), _state_as_it_comes)
        specs = (whole, whole, split, split), (whole, whole, split)
        step = over_axis(step, mesh, axis, specs, _like_theta_and_state)

    @own_transfers()
    def init(key: Key, theta: Theta) -> WorkerState:
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        # Outside `jit` first: a trace hides theta's values, which the estimator may refuse.
        one = jax.eval_shape(lambda key: estimator.init(key, theta), key)
        _check_one_worker(one, stagger)
        return begin(key, theta)

    def estimate(
        key: Key, theta: Theta, state: WorkerState, *, data: _Data = None
    ) -> tuple[Estimate, WorkerState]:
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        arguments.check_data(data, num_workers, "num_workers", what="worker")
        _check_state(state, num_workers)
        if data is not None and stagger == "burn_in":
            raise ValueError(
                'stagger="burn_in" runs the workers in `init`, where there is no `data`. Use '
                '"breakstep", or sample batches in `step` (`sample_batch` of training_problem).'
            )
        out, (count, num_nonfinite_losses), state = step(key, theta, state, data)
        if not isinstance(count, jax.core.Tracer) and int(jax.device_get(count)) == 0:
            bad = int(jax.device_get(num_nonfinite_losses))
            raise FloatingPointError(_all_bad(num_workers, bad, theta))
        return out, state

    return GradientEstimator(init, estimate, estimator.truncation)


class _Workers(NamedTuple):
    """The workers of one ``average``.

    Attributes:
        estimator: What each worker runs.
        num_workers: The number of workers on all devices.
        chunks: (number of chunks, workers in a chunk) of one device; a chunk runs at a time.
        axis: The mesh axis over which the workers are spread; None on a single device.
        stagger, nonfinite: As in ``average``.
    """

    estimator: GradientEstimator
    num_workers: int
    chunks: tuple[int, int]
    axis: str | None
    stagger: str
    nonfinite: str


def _begin_all(workers: _Workers, key: Key, theta: Theta) -> WorkerState:
    """Makes the first states of this device's workers, chunk by chunk."""
    return _join(jax.lax.map(lambda index: _begin(workers, key, theta, index), _indices(workers)))


def _begin(workers: _Workers, key: Key, theta: Theta, index: jax.Array) -> WorkerState:
    """Makes the first states of the workers ``index``."""
    estimator, num_workers = workers.estimator, workers.num_workers
    state = jax.vmap(estimator.init, in_axes=(0, None))(_keys(key, index), theta)
    if workers.stagger == "lockstep":
        return state
    assert estimator.truncation is not None
    if workers.stagger == "breakstep":
        first = staggering.shorten_first(state.episode, index, num_workers, estimator.truncation)
        return state._replace(episode=first)

    def run(number, state):
        drawn = jax.random.fold_in(jax.random.fold_in(key, _BURN_IN), number)
        return _call(estimator, _keys(drawn, index), theta, state)[1]

    return staggering.burn_in(run, state, index, num_workers, estimator.truncation)


def _step_all(
    workers: _Workers, key: Key, theta: Theta, state: WorkerState, data: _Data
) -> tuple[Estimate, tuple[jax.Array, jax.Array], WorkerState]:
    """Runs one call of this device's workers, chunk by chunk.

    Returns:
        The estimate, the number of workers in it and with a non-finite loss, and the new states.
    """

    def chunk(total, inputs):
        some, state = _step(workers, key, theta, *inputs)
        return mean_and_variance.merge(total, some), state

    chunks = (_indices(workers), _split(state, workers), _split(data, workers))

    def first(key, theta, chunks):
        return _step(workers, key, theta, *jax.tree.map(lambda x: x[0], chunks))[0]

    shapes = jax.eval_shape(first, key, theta, chunks)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, state = jax.lax.scan(chunk, mesh_axes.like(shapes, nothing), chunks)
    if workers.axis is not None:
        signs = jax.random.fold_in(key, _SIGNS)
        total = mean_and_variance.over_devices(total, workers.axis, signs)
    counts = total.count, total.num_nonfinite_losses
    return mean_and_variance.estimate(total, theta), counts, _join(state)


def _step(
    workers: _Workers, key: Key, theta: Theta, index: jax.Array, state: WorkerState, data: _Data
) -> tuple[mean_and_variance.Moments, WorkerState]:
    """Runs one call of the workers ``index``; returns their moments and their new states."""
    each, after = _call(workers.estimator, _keys(key, index), theta, state, data)
    finite = _finite(each)
    good = finite if workers.nonfinite == "drop" else jnp.ones_like(finite)
    episode = after.episode._replace(t=jnp.where(good, after.episode.t, 0))
    if workers.stagger == "breakstep":
        episode = staggering.end_first(state.episode, episode)
    return mean_and_variance.of(each, finite, good), after._replace(episode=episode)


def _call(
    estimator: GradientEstimator, keys: Key, theta: Theta, state: WorkerState, data: _Data = None
) -> tuple[Estimate, WorkerState]:
    """Runs one call of every worker; all arguments but theta have a leading axis."""

    def one(key, state, data):
        return estimator.estimate(key, theta, state, data=data)

    return jax.vmap(one)(keys, state, data)


def _keys(key: Key, index: jax.Array) -> Key:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _indices(workers: _Workers) -> jax.Array:
    """Returns the indices of this device's workers among all workers, shape ``chunks``."""
    own = math.prod(workers.chunks)
    first = 0 if workers.axis is None else own * jax.lax.axis_index(workers.axis)
    return (first + jnp.arange(own, dtype=jnp.int32)).reshape(workers.chunks)


def _state_as_it_comes(key: _Layout, theta: _Layout) -> None:
    """The layout of first states over further axes of the mesh: what XLA makes of theta's."""


def _like_theta_and_state(
    key: _Layout, theta: _Layout, state: _Layout, data: _Layout
) -> tuple[_Layout, _Layout, _Layout]:
    """The gradient lies as theta does, and the new states as the old ones."""
    return Estimate(theta, key, key), key, state


def _split(tree: _Data, workers: _Workers) -> _Data:
    return jax.tree.map(lambda x: x.reshape(*workers.chunks, *x.shape[1:]), tree)


def _join(tree: ArrayTree) -> ArrayTree:
    # The size is named: -1 would not be known for a leaf without numbers.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def _finite(each: Estimate) -> jax.Array:
    """Returns which workers' loss and gradient are finite, shape ``(num_workers,)``."""
    finite = jnp.isfinite(each.loss)
    for g in jax.tree.leaves(each.grad):
        finite &= jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim)))
    return finite


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}; got {value!r}.")


def _workers_per_device(num_workers: int, mesh: Mesh, axis: str) -> int:
    size = axis_size(mesh, axis)
    if num_workers % size:
        below = num_workers // size * size
        nearest = " or ".join(str(n) for n in (below, below + size) if n)
        raise ValueError(
            f"`num_workers`={num_workers} must be divisible by mesh axis {axis!r} of size {size}; "
            f"use {nearest}."
        )
    return num_workers // size


def _check_batch_size(batch_size: int, own: int, num_workers: int) -> int:
    batch_size = arguments.positive_int("batch_size", batch_size)
    if own % batch_size:
        which = f"the {own} workers"
        if own != num_workers:
            which += f" of one device (num_workers={num_workers} over {num_workers // own} devices)"
        raise ValueError(
            f"`batch_size` must divide {which}; got batch_size={batch_size}. Use one of "
            f"{inner_loop.divisors(own)}."
        )
    return batch_size


def _check_one_worker(state: WorkerState, stagger: str) -> None:
    if state.episode.t.ndim != 0:
        raise ValueError(
            "`average` takes one worker, not an average: nested averages would hide which "
            "worker is which. Use one `average` with the product of the numbers of workers."
        )
    if stagger != "lockstep" and isinstance(state, CurriculumState):
        raise ValueError(
            f'stagger="{stagger}" does not outlast the stages of a curriculum. Average inside it '
            f"instead: ug.curriculum([ug.average(..., stagger='{stagger}'), ...], boundaries)."
        )


def _check_state(state: WorkerState, num_workers: int) -> None:
    if not hasattr(state, "episode"):
        raise TypeError(
            f"`state` must be what this estimator's `init(key, theta)` returns; got a "
            f"{type(state).__name__}."
        )
    shape = jnp.shape(state.episode.t)
    if shape != (num_workers,):
        raise ValueError(
            f"`state` is that of {shape[0] if shape else 'one'} worker(s), but num_workers="
            f"{num_workers}. Make it with this estimator's own `init`."
        )


def _all_bad(num_workers: int, num_nonfinite_losses: int, theta: Theta) -> str:
    cause = "Lower sigma or the inner step size"
    if num_nonfinite_losses == 0:
        cause = (
            "All losses are finite, so it is the derivatives: a square root or norm at zero, as in "
            "optax.adam without eps_root, or steps that amplify"
        )
    narrow = [
        f"theta{jax.tree_util.keystr(path)} is {x.dtype}"
        for path, x in jax.tree_util.tree_leaves_with_path(theta)
        if x.dtype.itemsize < 4
    ]
    if narrow:
        cause += (
            f", or hold theta in float32 ({narrow[0]}; a decay rate of 0.999 is 1 in bfloat16, and "
            "Adam's bias correction then divides by zero)"
        )
    return (
        f"all {num_workers} workers returned a non-finite loss or gradient "
        f"({num_nonfinite_losses} a non-finite loss). {cause}. To look at them: "
        '`average(..., nonfinite="propagate")`.'
    )
