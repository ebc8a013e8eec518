"""Gradient estimators side by side on one problem at one theta."""

import functools
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes
from unrollgrad._core.dtypes import wide
from unrollgrad._workers.curriculum import CurriculumState
from unrollgrad._workers.mesh import make_worker_mesh
from unrollgrad.diagnostics import statistics
from unrollgrad.diagnostics.report import Comparison
from unrollgrad.types import GradientEstimator, Key, Theta, UnrolledProblem, WorkerState

CHAIN = 20
"""Episodes in a chain: the long run is 20 n updates, n per episode."""


def compare(
    problem: UnrolledProblem,
    theta: Theta,
    estimators: Mapping[str, GradientEstimator],
    *,
    reference: GradientEstimator | Theta,
    num_samples: int,
    key: Key,
    num_chains: int | None = None,
    batch_size: int = 16,
    devices: int = 1,
    matmul_precision: str | None = "highest",
    progress: Callable[[str, int, int], None] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Comparison:
    """Measures bias, variance and cost of estimators at a frozen theta.

    A sample is one episode of a fresh estimator: the mean of its ``grad`` over the n = T/K windows,
    so that all estimators aim at the gradient of J. Samples are independent.

    The variance of a sample is not all: an outer optimizer averages over many updates, and the
    errors of consecutive updates may add up (a worker that keeps its noise) or cancel.
    ``variance_of_mean[U]`` is the trace of the variance of the mean of U consecutive updates, times
    U/n, that is per episode spent. U = 1 is an update at a random place of an episode, the cycle of
    the windows' own means included; U = n a whole episode, ``variance``; U = 20 n the long run,
    from chains of 20 episodes. An estimator whose update is a whole episode has n = 1.

    Args:
        problem: The inner loop, with a static horizon.
        theta: Where to measure; it stays as it is.
        estimators: By name.
        reference: The gradient of J: a tree like theta, taken as exact; or an unbiased estimator,
            of which ``num_samples`` are drawn and whose noise is accounted for. Evolution
            strategies estimate the gradient of the smoothed J, so that against J's own they show
            the smoothing, O(sigma^2), as bias.
        num_samples: Samples per estimator, at least 3.
        key: Of all samples.
        num_chains: Samples that run on for 19 more episodes, at least 3, or 0 to leave U = 20 n
            out; below ten its standard error is rough. By default num_samples / 20 and at least 3;
            with many samples this doubles the time. It is spent by full dispatches.
        batch_size: Samples per dispatch, in parallel: more is faster and takes more memory.
        devices: Over how many the samples of a dispatch are spread; they stay the same numbers.
            With several processes it has to be all of them, and every process gets the result.
            With an estimator that is spread over a mesh itself, ``average(mesh=)``: 1.
        matmul_precision: Of all matrix products, as in ``jax.default_matmul_precision``; None is
            JAX's own choice for the device. Less than "highest" (TF32 on GPUs, bfloat16 on TPUs)
            swallows the differences L(theta + eps) - L(theta - eps) at small sigma.
        progress: Called as ``progress(name, done, total)`` after each dispatch.
        on_row: Called with each row as soon as it is measured.

    Returns:
        A ``Comparison``; its ``rows`` are dicts with ``name, norm, bias, bias_se, variance,
        norm_ratio, cosine, snr, nmse, reference_norm, variance_of_mean, variance_of_mean_se,
        num_windows, inner_steps, seconds, compile_seconds, num_nonfinite``. ``inner_steps`` and
        ``seconds`` are per sample, compilation not counted; ``squared_bias`` and
        ``squared_bias_se`` are what to average over repetitions; ``num_nonfinite`` is that of all
        samples, and where it is not 0 ``average`` has left workers out, which biases.

    Raises:
        ValueError: For a sampled horizon, fewer than 3 samples, no estimators, one of another
            problem's truncation, more devices than there are, or a reference of another structure
            than theta.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=50)
        >>> comparison = ug.diagnostics.compare(
        ...     problem, theta, {"tbptt": ug.tbptt(problem, truncation=10)},
        ...     reference=ug.bptt(problem), num_samples=4, key=jax.random.key(0))
        >>> round(comparison.rows[0]["cosine"]), list(comparison.rows[0]["variance_of_mean"])
        (1, [1, 5, 100])

    References:
        The protocol of Vicol et al., ICML 2021, arXiv:2112.13835 (theta frozen, whole episodes),
        extended to U updates.
    """
    horizon = inner_loop.static_horizon(problem, "compare")
    theta, key = arguments.floating_theta(theta), arguments.typed_key(key)
    num_samples = arguments.positive_int("num_samples", num_samples)
    if num_samples < 3:
        raise ValueError(
            f"`num_samples` must be at least 3 for a variance and its error; got {num_samples}."
        )
    if num_chains is None:
        num_chains = max(3, num_samples // CHAIN)
    if num_chains not in (0, *range(3, num_samples + 1)):
        raise ValueError(
            "`num_chains` must be 0, or at least 3 and at most `num_samples`; got "
            f"num_chains={num_chains} and num_samples={num_samples}."
        )
    devices = arguments.num_devices(devices)
    if jax.process_count() > 1 and devices < jax.device_count():
        raise ValueError(
            f"`devices` must be all {jax.device_count()} where there are several processes; got "
            f"devices={devices}: a process without a device in it could not take part."
        )
    if not estimators:
        raise ValueError('`estimators` is empty; pass a dict such as {"pes": ug.pes(...)}.')
    for name, estimator in estimators.items():
        _check_estimator(name, estimator, horizon)
    size = -(-num_samples // -(-num_samples // arguments.positive_int("batch_size", batch_size)))
    plan = _Plan(horizon, num_samples, -(-size // devices) * devices, devices)

    with jax.default_matmul_precision(matmul_precision):
        if isinstance(reference, GradientEstimator):
            _check_estimator("reference", reference, horizon)
            truth = _draw(plan, " reference", reference, key, theta, 0, progress).samples
        else:
            truth = _flat_reference(reference, theta)
        rows, samples = [], {}
        for name, estimator in estimators.items():
            drawn = _draw(plan, name, estimator, key, theta, num_chains, progress)
            samples[name] = drawn.samples
            rows.append({"name": name, **statistics.describe(drawn.samples, truth)})
            rows[-1] |= _of_means(drawn, horizon // (estimator.truncation or horizon)) | drawn.cost
            if on_row is not None:
                on_row(rows[-1])
    settings = {
        "num_samples": num_samples,
        "num_chains": num_chains,
        "matmul_precision": matmul_precision,
        "devices": devices,
    }
    return Comparison(rows, samples, truth, settings)


class _Plan(NamedTuple):
    horizon: int
    num_samples: int
    size: int  # samples in one dispatch, a multiple of the devices
    devices: int


class _Drawn(NamedTuple):
    samples: np.ndarray  # (num_samples, P)
    scatter: np.ndarray  # (num_samples,): mean over the windows of |grad - the sample|^2
    chains: np.ndarray  # (num_chains, P)
    cost: dict[str, Any]


def _draw(
    plan: _Plan,
    name: str,
    estimator: GradientEstimator,
    key: Key,
    theta: Theta,
    num_chains: int,
    progress: Callable[[str, int, int], None] | None,
) -> _Drawn:
    """Draws the samples of one estimator, of which the first ``num_chains`` run on."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))  # whatever the other names are
    fixed = (estimator, plan.devices)
    begun = time.perf_counter()
    index = jnp.arange(plan.size)
    # With theta itself: what its values say against it cannot be seen in a trace over theta.
    state = jax.eval_shape(lambda key: estimator.init(key, theta), key)
    if isinstance(state, CurriculumState):
        raise ValueError(
            f"estimator {name!r} is a curriculum, which has no bias and variance of its own. "
            "Compare its stages, each as an estimator."
        )
    # It runs once per sample and does little: XLA's optimisation would take longer than that saves.
    on_cpu = jax.default_backend() == "cpu"
    quickly: Any = {"xla_backend_optimization_level": 0} if on_cpu else {}
    start = _begin.lower(*fixed, key, index, theta).compile(quickly)
    states = jax.eval_shape(_begin, *fixed, key, index, theta)
    program = _episode.lower(
        *fixed, plan.horizon, key, index, jnp.int32(0), theta, states
    ).compile()
    compile_seconds = time.perf_counter() - begun

    calls = -(-plan.num_samples // plan.size)
    calls_with_chains = -(-num_chains // plan.size)
    total = plan.size * (calls + (CHAIN - 1) * calls_with_chains)
    samples, scatter, chains, nonfinite, seconds, done = [], [], [], 0, 0.0, 0
    steps = np.zeros(1)
    for i in range(calls):  # equal dispatches: a last few samples too many are dropped
        index = i * plan.size + jnp.arange(plan.size)
        state = start(key, index, theta)
        episodes = []
        for e in range(CHAIN if i < calls_with_chains else 1):
            begun = time.perf_counter()
            result, state = program(key, index, jnp.int32(e), theta, state)
            grads, spread, steps, bad = _fetched(jax.block_until_ready(result))
            seconds += time.perf_counter() - begun
            nonfinite += int(np.sum(bad))
            leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
            episodes.append(np.concatenate([g.reshape(plan.size, -1) for g in leaves], axis=1))
            if e == 0:
                scatter.append(np.asarray(spread, np.float64))
            done += plan.size
            if progress is not None:
                progress(name, done, total)
        samples.append(episodes[0])
        if len(episodes) > 1:
            chains.append(np.mean(episodes, axis=0))
    cost = {
        "inner_steps": int(np.ravel(steps)[0]),
        "seconds": seconds / total,
        "compile_seconds": compile_seconds,
        "num_nonfinite": nonfinite,
    }
    drawn = np.concatenate(samples)[: plan.num_samples]
    chained = np.concatenate([np.zeros((0, drawn.shape[1])), *chains])[:num_chains]
    return _Drawn(drawn, np.concatenate(scatter)[: plan.num_samples], chained, cost)


# The estimator is static, so that another theta, seed or call of ``compare`` compiles nothing new.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(estimator, devices, key, index, theta):
    """The state of every sample's fresh worker."""

    def one(key, theta, i):
        return estimator.init(jax.random.fold_in(jax.random.fold_in(key, i), 0), theta)

    each = _over_devices(jax.vmap(one, in_axes=(None, None, 0)), devices, (False, False, True))
    return each(key, theta, index)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _episode(estimator, devices, horizon, key, index, e, theta, states):
    """Every sample's episode number ``e``: what ``episode_mean`` returns, and the states."""

    def one(key, theta, e, i, state):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), 1), e)
        return episode_mean(estimator, key, theta, state, horizon)

    each = jax.vmap(one, in_axes=(None, None, None, 0, 0))
    split = (False, False, False, True, True)
    return _over_devices(each, devices, split)(key, theta, e, index, states)


def episode_mean(
    estimator: GradientEstimator, key: Key, theta: Theta, state: WorkerState, horizon: int
) -> tuple[tuple[Theta, jax.Array, jax.Array, jax.Array], WorkerState]:
    """One episode's worth of calls at frozen theta.

    Returns:
        The mean of ``grad`` over the windows, at least float32; the mean over the windows of their
        |grad - that mean|^2; the inner steps spent; the number of windows with a non-finite loss,
        under ``average`` of workers left out; and the worker's state.
    """
    num_windows = horizon // (estimator.truncation or horizon)

    def call(carry, i):
        state, mean, scatter, steps, nonfinite = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
        # Welford's recursion: no difference of large squares.
        away = jax.tree.map(lambda m, g: g.astype(m.dtype) - m, mean, estimate.grad)
        mean = jax.tree.map(lambda m, a: m + a / (i + 1), mean, away)
        square = sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(away))
        scatter = scatter + (square * (i / (i + 1))).astype(scatter.dtype)
        bad = getattr(estimate.info, "num_nonfinite", ~jnp.isfinite(estimate.loss))
        return (state, mean, scatter, steps + estimate.info.inner_steps, nonfinite + bad), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), theta)
    widest = jnp.result_type(*jax.tree.leaves(zero))
    begin = (state, zero, jnp.zeros((), widest), jnp.int32(0), jnp.int32(0))
    begin = mesh_axes.over(mesh_axes.axes((key, theta, state)), begin)
    out, _ = jax.lax.scan(call, begin, jnp.arange(num_windows))
    state, mean, scatter, steps, nonfinite = out
    return (mean, scatter / num_windows, steps, nonfinite), state


def _over_devices(function: Callable, devices: int, split: tuple[bool, ...]) -> Callable:
    """``function`` with the marked arguments and all results split over the devices."""
    if devices == 1:
        return function
    mesh = make_worker_mesh(devices, axis="samples")
    each, whole = PartitionSpec("samples"), PartitionSpec()
    in_specs = tuple(each if s else whole for s in split)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=each)


def _fetched(tree: Any) -> Any:
    """As numpy arrays, also what other processes hold."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _of_means(drawn: _Drawn, num_windows: int) -> dict[str, Any]:
    """``variance_of_mean`` and its standard errors, by U."""
    squares = statistics.squares(drawn.samples)
    terms = {1: (drawn.scatter + squares) / num_windows, num_windows: squares}
    if len(drawn.chains):
        terms[CHAIN * num_windows] = CHAIN * statistics.squares(drawn.chains)
    return {
        "variance_of_mean": {u: float(np.mean(x)) for u, x in terms.items()},
        "variance_of_mean_se": {u: statistics.standard_error(x) for u, x in terms.items()},
        "num_windows": num_windows,
    }


def _check_estimator(name: str, estimator: GradientEstimator, horizon: int) -> None:
    if not isinstance(estimator, GradientEstimator):
        raise TypeError(
            f"estimator {name!r} must be a GradientEstimator such as ug.pes(problem, ...); got a "
            f"{type(estimator).__name__}."
        )
    if horizon % (estimator.truncation or horizon):
        raise ValueError(
            f"estimator {name!r}: its truncation={estimator.truncation} does not divide "
            f"problem.horizon={horizon}: it was made for another problem. Make it with this one."
        )


def _flat_reference(reference: Theta, theta: Theta) -> np.ndarray:
    same = jax.tree.structure(reference) == jax.tree.structure(theta)
    leaves, like = jax.tree.leaves(reference), jax.tree.leaves(theta)
    if not same or [np.shape(r) for r in leaves] != [np.shape(x) for x in like]:
        raise ValueError(
            "`reference` must be a gradient with theta's structure and shapes, or an estimator; "
            f"got {jax.tree.map(np.shape, reference)} for theta {jax.tree.map(np.shape, theta)}."
        )
    return np.concatenate([np.asarray(r, np.float64).ravel() for r in leaves])[None]
