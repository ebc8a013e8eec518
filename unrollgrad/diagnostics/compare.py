"""Gradient estimators side by side on one problem at one theta."""

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes
from unrollgrad._core.descriptions import about
from unrollgrad._core.dtypes import wide
from unrollgrad._core.progress import progress_bar
from unrollgrad._core.progress import shown as bar_is_shown
from unrollgrad._workers.curriculum import CurriculumState
from unrollgrad._workers.mesh import make_worker_mesh
from unrollgrad.diagnostics import report, statistics
from unrollgrad.diagnostics.report import Comparison
from unrollgrad.diagnostics.statistics import Row
from unrollgrad.types import (
    GradientEstimator,
    Key,
    MadeBy,
    Theta,
    UnrolledProblem,
    WorkerState,
)

__all__ = ["CHAIN", "EpisodeMean", "compare", "episode_mean"]

_UNKNOWN = MadeBy("", ())
CHAIN = 20
"""The number of episodes in a chain: the long run is 20 n updates, n per episode."""


def compare(
    problem: UnrolledProblem,
    theta: Theta,
    estimators: Mapping[str, GradientEstimator] | Sequence[GradientEstimator],
    *,
    reference: GradientEstimator | Theta,
    num_samples: int,
    key: Key,
    num_chains: int | None = None,
    batch_size: int = 16,
    devices: int = 1,
    matmul_precision: str | None = "highest",
    progress: Callable[[str, int, int], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Measures bias, variance and cost of estimators at a frozen theta.

    A sample is the mean of ``grad`` over the n = T/K windows of one episode of a fresh worker, so
    that all estimators aim at the gradient of J. Samples are independent.

    An outer optimizer averages over many updates, and the errors of consecutive updates may add up
    (a worker that keeps its noise) or cancel. Therefore ``variance_of_mean[U]`` is the trace of the
    covariance of the mean of U consecutive updates, times U/n, that is per episode spent. U = 1 is
    one update at a random place of an episode and includes how the windows' means differ; U = n is
    a whole episode, ``variance``; U = 20 n is the long run, measured on chains of 20 episodes. An
    estimator whose update is a whole episode has n = 1.

    Args:
        problem: The inner loop, with a static horizon.
        theta: The outer parameters at which everything is measured.
        estimators: The estimators by name; those of a list are named by the call that made them.
        reference: The gradient of J: a tree like theta, taken as exact, or an unbiased estimator;
            the noise of its ``num_samples`` samples is accounted for. Evolution strategies estimate
            the gradient of the episode-smoothed or of the period-smoothed J (see ``Estimate``):
            against the gradient of J itself, or of the other, their bias contains the effect of
            smoothing, O(sigma^2).
        num_samples: Samples per estimator, at least 3.
        key: The PRNG key of all samples.
        num_chains: Samples that continue for 19 more episodes: at least 3 (below ten the standard
            error is rough), or 0 to leave U = 20 n out. The default is num_samples / 20, but at
            least 3; with 60 samples or more this doubles the number of episodes.
        batch_size: Samples computed in parallel: more is faster and takes more memory.
        devices: The number of devices that share a batch; it does not change the samples. Several
            processes have to share all devices, and each gets the result. If an estimator uses a
            mesh itself, ``average(mesh=)``, pass 1.
        matmul_precision: As in ``jax.default_matmul_precision``; None leaves the choice to JAX.
            Less than "highest" (TF32 on GPUs, bfloat16 on TPUs) swallows the differences
            L(theta + eps) - L(theta - eps) at small sigma.
        progress: A function called as ``progress(name, done, total)`` after each batch, and
            before an estimator is compiled (first with done = 0). By default a bar is shown on a
            terminal or in a notebook.
        on_row: A function called with each row as soon as it is measured. By default a line is
            printed where a bar is shown.

    Returns:
        A ``Comparison``; its ``rows`` are dicts with ``name, norm, bias, bias_se, variance,
        norm_ratio, cosine, snr, nmse, reference_norm, variance_of_mean, variance_of_mean_se,
        num_windows, inner_steps, seconds, compile_seconds, num_nonfinite``. ``inner_steps`` and
        ``seconds`` are per sample, without compilation; average ``squared_bias`` and
        ``squared_bias_se`` over repetitions; ``num_nonfinite`` counts over all samples, and if it
        is not 0, ``average`` has left workers out, which biases.

    Raises:
        ValueError: If the horizon is sampled, there are fewer than 3 samples, ``estimators`` is
            empty, an estimator's truncation does not divide the horizon, ``devices`` exceeds the
            devices that exist, or ``reference`` differs from theta in structure.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=50)
        >>> comparison = ug.diagnostics.compare(
        ...     problem, theta, {"tbptt": ug.tbptt(problem, truncation=10)},
        ...     reference=ug.bptt(problem), num_samples=4, key=jax.random.key(0))
        >>> round(comparison.rows[0]["cosine"]), list(comparison.rows[0]["variance_of_mean"])
        (1, [1, 5, 100])

    References:
        Vicol et al., ICML 2021, arXiv:2112.13835 (theta frozen, whole episodes); U updates are new.
    """
    horizon = inner_loop.static_horizon(problem, "compare")
    theta, key = arguments.floating_theta(theta), arguments.typed_key(key)
    num_samples, num_chains = _check_counts(num_samples, num_chains)
    devices = arguments.num_devices(devices)
    if jax.process_count() > 1 and devices < jax.device_count():
        raise ValueError(
            f"`devices` must be all {jax.device_count()} where there are several processes; got "
            f"devices={devices}: a process without a device in it could not take part."
        )
    if not isinstance(estimators, Mapping):
        estimators = {repr(estimator): estimator for estimator in estimators}
    if not estimators:
        raise ValueError('`estimators` is empty; pass a dict such as {"pes": ug.pes(...)}.')
    size = arguments.positive_int("batch_size", batch_size)
    with _watched(len(estimators) + 1, progress, on_row) as (progress, on_row):
        setup = _Setup(theta, key, horizon, num_samples, size, devices, progress)
        for name, estimator in estimators.items():
            _check_estimator(name, estimator, problem, setup)
        with jax.default_matmul_precision(matmul_precision):
            if isinstance(reference, GradientEstimator):
                _check_estimator("reference", reference, problem, setup)
                truth = _draw(setup, " reference", reference).samples
            else:
                truth = _flat_reference(reference, theta)
            rows, samples = [], {}
            for name, estimator in estimators.items():
                drawn = _draw(setup, name, estimator, num_chains)
                samples[name] = drawn.samples
                rows.append({"name": name, **statistics.describe(drawn.samples, truth)})
                rows[-1] |= _of_means(drawn, horizon // (estimator.truncation or horizon))
                rows[-1] |= drawn.cost
                on_row(rows[-1])
    settings = {"num_samples": num_samples, "num_chains": num_chains, "devices": devices}
    return Comparison(rows, samples, truth, settings | {"matmul_precision": matmul_precision})


@contextlib.contextmanager
def _watched(
    number: int,
    progress: Callable[[str, int, int], None] | None,
    on_row: Callable[[Row], None] | None,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Row], None]]]:
    """The functions, or in their place a bar for ``number`` estimators, and a line for each row."""
    with contextlib.ExitStack() as stack:
        if progress is None:
            bar = stack.enter_context(progress_bar(number))
            names: dict[str, int] = {}

            def progress(name: str, done: int, total: int) -> None:
                compiling = names.get(name, 0) == done  # nothing was computed since the last call
                names[name] = done
                text = f"compiling {name.strip()}" if compiling else name.strip()
                bar(text, len(names) - 1 + done / total)

        def print_row(row: Row) -> None:
            if bar_is_shown():
                print(report.line(row))

        yield progress, print_row if on_row is None else on_row


class _Setup(NamedTuple):
    """What all estimators of one comparison share."""

    theta: Theta
    key: Key
    horizon: int
    num_samples: int
    size: int  # most samples in one batch, a multiple of ``devices``
    devices: int
    progress: Callable[[str, int, int], None]


class _Batch(NamedTuple):
    """The samples that are computed together."""

    key: Key
    index: jax.Array  # the numbers of the samples
    theta: Theta


class _Drawn(NamedTuple):
    samples: np.ndarray  # (num_samples, P)
    scatter: np.ndarray  # (num_samples,): mean over the windows of |grad - the sample|^2
    chains: np.ndarray  # (num_chains, P)
    cost: Row


def _draw(setup: _Setup, name: str, estimator: GradientEstimator, num_chains: int = 0) -> _Drawn:
    """Draws the samples of one estimator; the first ``num_chains`` are drawn again as chains."""
    key = jax.random.fold_in(setup.key, zlib.crc32(name.encode()))  # whatever the other names are
    lengths = [(setup.num_samples, 1), (num_chains, CHAIN)]
    runs = [(batches, length) for n, length in lengths if (batches := _batches(setup, key, n))]
    total = sum(len(batch.index) * length for batches, length in runs for batch in batches)
    done = 0

    def tick(number):
        nonlocal done
        done += number
        setup.progress(name, done, total)

    programs, found = {}, []
    for batches, length in runs:
        size = len(batches[0].index)
        if size not in programs:
            setup.progress(name, done, total)
            programs[size] = _compile(setup, name, estimator, batches[0])
        found.append(_run(programs[size], batches, length, tick))
    samples = found[0]
    cost = {
        "inner_steps": samples.inner_steps,
        "seconds": samples.seconds / len(samples.mean),
        "compile_seconds": sum(program.seconds for program in programs.values()),
        "num_nonfinite": sum(run.num_nonfinite for run in found),
    }
    chains = found[1].mean[:num_chains] if num_chains else samples.mean[:0]
    drawn = slice(setup.num_samples)
    return _Drawn(samples.mean[drawn], samples.scatter[drawn], chains, cost)


def _batches(setup: _Setup, key: Key, number: int) -> list[_Batch]:
    """Batches of equal size for the first ``number`` samples; the last may hold surplus ones."""
    if number == 0:
        return []
    size = -(-number // -(-number // setup.size))
    size = -(-size // setup.devices) * setup.devices
    return [_Batch(key, first + jnp.arange(size), setup.theta) for first in range(0, number, size)]


class _Programs(NamedTuple):
    """An estimator's two programs for batches of one size, and how long they took to compile."""

    begin: jax.stages.Compiled
    run_episode: jax.stages.Compiled
    seconds: float


class _Run(NamedTuple):
    """What a run of several episodes from every sample's fresh worker gave."""

    mean: np.ndarray  # (samples, P): over the episodes
    scatter: np.ndarray  # (samples,): of the first episode
    num_nonfinite: int
    inner_steps: int  # of one sample's episode
    seconds: float


def _run(
    programs: _Programs, batches: list[_Batch], length: int, tick: Callable[[int], None]
) -> _Run:
    """Runs ``length`` episodes from fresh workers for each batch of samples."""
    means, scatter, nonfinite, steps, seconds = [], [], 0, 0, 0.0
    for batch in batches:
        state = programs.begin(batch)
        episodes = []
        for e in range(length):
            begun = time.perf_counter()
            result, state = programs.run_episode(batch, jnp.int32(e), state)
            result = _fetched(jax.block_until_ready(result))
            seconds += time.perf_counter() - begun
            nonfinite += int(np.sum(result.num_nonfinite))
            steps = int(np.ravel(result.inner_steps)[0])
            leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(result.grad)]
            size = len(batch.index)
            episodes.append(np.concatenate([g.reshape(size, -1) for g in leaves], axis=1))
            if e == 0:
                scatter.append(np.asarray(result.scatter, np.float64))
            tick(size)
        means.append(np.mean(episodes, axis=0))
    return _Run(np.concatenate(means), np.concatenate(scatter), nonfinite, steps, seconds)


def _compile(setup: _Setup, name: str, estimator: GradientEstimator, batch: _Batch) -> _Programs:
    """The two programs of an estimator, for batches like this one: ``_begin`` and ``_episode``."""
    begun = time.perf_counter()
    # ``init`` sees theta's values here; under the jits below it could not check them.
    state = jax.eval_shape(lambda key: estimator.init(key, setup.theta), batch.key)
    if isinstance(state, CurriculumState):
        raise ValueError(
            f"estimator {name!r} is a curriculum, which has no bias and variance of its own. "
            "Compare its stages, each as an estimator."
        )
    # _begin runs once per batch and does little: XLA's optimisation takes longer than it saves.
    on_cpu = jax.default_backend() == "cpu"
    options: dict[str, Any] = {"xla_backend_optimization_level": 0} if on_cpu else {}
    begin = _begin.lower(estimator, setup.devices, batch).compile(options)
    states = jax.eval_shape(_begin, estimator, setup.devices, batch)
    static = (estimator, setup.devices, setup.horizon)
    run_episode = _episode.lower(*static, batch, jnp.int32(0), states).compile()
    return _Programs(begin, run_episode, time.perf_counter() - begun)


# The estimator is static, so that another theta, seed or call of ``compare`` compiles nothing new.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(estimator, devices, batch):
    """The states of fresh workers, one for each sample."""

    def one(key, i, theta):
        return estimator.init(jax.random.fold_in(jax.random.fold_in(key, i), 0), theta)

    return _for_each_sample(one, devices, (None, 0, None))(*batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _episode(estimator, devices, horizon, batch, e, states):
    """Runs every sample's episode number ``e``: its ``EpisodeMean``, and the workers' states."""

    def one(key, i, theta, e, state):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), 1), e)
        return episode_mean(estimator, key, theta, state, horizon)

    return _for_each_sample(one, devices, (None, 0, None, None, 0))(*batch, e, states)


class EpisodeMean(NamedTuple):
    """An estimator's calls over one episode."""

    grad: Theta  # the mean over the windows, at least float32
    scatter: jax.Array  # the mean over the windows of |their grad - that mean|^2
    inner_steps: jax.Array
    num_nonfinite: jax.Array  # windows with a non-finite loss; under ``average`` workers left out


def episode_mean(
    estimator: GradientEstimator, key: Key, theta: Theta, state: WorkerState, horizon: int
) -> tuple[EpisodeMean, WorkerState]:
    """Calls the estimator over one episode at frozen theta; returns also the worker's state."""
    num_windows = horizon // (estimator.truncation or horizon)

    def call(carry, i):
        state, (mean, scatter, steps, nonfinite) = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
        # Welford's recursion: it subtracts no large squares.
        away = jax.tree.map(lambda m, g: g.astype(m.dtype) - m, mean, estimate.grad)
        share = 1 / (i.astype(scatter.dtype) + 1)
        mean = jax.tree.map(lambda m, a: m + a * share.astype(m.dtype), mean, away)
        square = sum(jnp.sum(jnp.square(a)).astype(scatter.dtype) for a in jax.tree.leaves(away))
        scatter = scatter + square * (1 - share)
        bad = getattr(estimate.info, "num_nonfinite", ~jnp.isfinite(estimate.loss))
        nonfinite = nonfinite + bad.astype(nonfinite.dtype)
        steps = steps + estimate.info.inner_steps
        return (state, EpisodeMean(mean, scatter, steps, nonfinite)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), theta)
    widest = wide(*jax.tree.leaves(zero))
    begin = EpisodeMean(zero, jnp.zeros((), widest), jnp.int32(0), jnp.int32(0))
    carry = mesh_axes.over(mesh_axes.axes((key, theta, state)), (state, begin))
    (state, mean), _ = jax.lax.scan(call, carry, jnp.arange(num_windows))
    return mean._replace(scatter=mean.scatter / num_windows), state


def _for_each_sample(function: Callable[..., Any], devices: int, axes: tuple) -> Callable[..., Any]:
    """``jax.vmap(function, axes)``, with the mapped arguments and the results over the devices."""
    each = jax.vmap(function, axes)
    if devices == 1:
        return each
    mesh = make_worker_mesh(devices, axis="samples")
    split, whole = PartitionSpec("samples"), PartitionSpec()
    in_specs = tuple(whole if axis is None else split for axis in axes)
    return jax.shard_map(each, mesh=mesh, in_specs=in_specs, out_specs=split)


def _fetched(result: EpisodeMean) -> EpisodeMean:
    """``result`` as numpy arrays, with the parts that other processes hold."""
    if jax.process_count() == 1:
        return jax.device_get(result)
    from jax.experimental import multihost_utils  # takes long to import

    return multihost_utils.process_allgather(result, tiled=True)


def _of_means(drawn: _Drawn, num_windows: int) -> Row:
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


def _check_counts(num_samples: int, num_chains: int | None) -> tuple[int, int]:
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
    return num_samples, num_chains


def _check_estimator(
    name: str, estimator: GradientEstimator, problem: UnrolledProblem, setup: _Setup
) -> None:
    if not isinstance(estimator, GradientEstimator):
        raise TypeError(
            f"estimator {name!r} must be a GradientEstimator such as ug.pes(problem, ...); got a "
            f"{type(estimator).__name__}."
        )
    if setup.horizon % (estimator.truncation or setup.horizon):
        raise ValueError(
            f"estimator {name!r}: its truncation={estimator.truncation} does not divide "
            f"problem.horizon={setup.horizon}: it was made for another problem. Make it with this "
            "one."
        )
    state = jax.eval_shape(estimator.init, setup.key, setup.theta)
    own = dict(getattr(state, "made_by", _UNKNOWN).settings).get("horizon", setup.horizon)
    if own != setup.horizon:
        raise ValueError(
            f"estimator {name!r} was made for another problem: its horizon is {own}, and "
            f"problem.horizon={setup.horizon}. Make it with this problem."
        )
    made_for = about(estimator).problem
    if made_for not in (None, problem):
        raise ValueError(
            f"estimator {name!r}, {estimator}, was made for another problem than the one given: "
            "they differ in "
            + ", ".join(f for f in problem._fields if getattr(made_for, f) != getattr(problem, f))
            + ". Make it with this problem."
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
