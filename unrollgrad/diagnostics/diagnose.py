"""What is wrong with an unroll, and which estimator to use: everything measured in one call."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop, rounding
from unrollgrad._core.dtypes import wide
from unrollgrad.diagnostics import _probes
from unrollgrad.diagnostics._plan import AT_ONCE, SIGMAS, Plan, plan_of
from unrollgrad.diagnostics.diagnosis import Details, Diagnosis, Sweep
from unrollgrad.diagnostics.lyapunov import lyapunov
from unrollgrad.diagnostics.measurements import Derivatives, Measurements, StepCost, derivatives_of
from unrollgrad.diagnostics.recommend import recommend
from unrollgrad.diagnostics.windows import (
    EPISODES,
    Windows,
    probe_keys,
    window_lanes,
    windows_from,
)
from unrollgrad.types import Key, Theta, UnrolledProblem

__all__ = ["diagnose"]


def diagnose(
    problem: UnrolledProblem,
    theta: Theta,
    *,
    key: Key,
    truncation: int | None = None,
    num_workers: int,
    memory_limit: int | None = None,
    sigma: float | None = None,
) -> Diagnosis:
    """Measures a problem at one theta, and ranks the estimators by their error at equal cost.

    Along random directions, antithetic pairs measure how strongly the windows' gradients agree,
    which fixes the variance of the whole ``gpes`` family; backpropagation measures the noise and
    the tails of exact gradients and the bias of truncated ones; the first Lyapunov exponent says
    how fast small changes grow; seconds and bytes are measured beside. ``recommend`` makes a
    ranking of these numbers alone. What derivatives give is compared with the gradient of the
    smoothed J: a derivative that does not see jumps, or that is lost in chaos, counts as biased.

    Three programs are compiled. Running them costs about a tenth of 100 updates by whole episodes
    with ``num_workers`` antithetic pairs: the budget decides into how many stretches the episode is
    cut, how many directions are probed and how many more episodes are differentiated. The least is
    four directions with two episodes each, at the cost of up to 416 unrolls, a tenth for 21
    workers. Where a step has few operations, more episodes are differentiated, up to twenty for
    each direction: their copies cost little, milliseconds that may exceed the tenth. Few episodes
    do not show rare large gradients, and the standard errors do not know what was not seen:
    ``compare`` with many samples does.

    Args:
        problem: The inner loop. If its horizon is sampled, a middle one is measured.
        theta: The outer parameters at which everything is measured; diagnose again later in
            training, the best estimator changes.
        key: The PRNG key.
        truncation: Inner steps per call (K); by default the divisor of the horizon with a number of
            windows near ten.
        num_workers: The workers that you can pay for: they set the budget of the comparison.
        memory_limit: Bytes that all workers together may hold; None: no limit.
        sigma: Half the distance of a pair, in theta's units; by default the largest of several
            whose smoothing changes the gradient by less than can be seen, or less than 5 %.

    Returns:
        A ``Diagnosis`` with ``measurements``, ``ranking``, ``recommendation``, ``table()``,
        ``plot()`` and ``save(folder)``.

    Raises:
        ValueError: If a setting is out of range, the truncation does not divide the horizon, sigma
            is under theta's resolution, or losses are not finite whatever sigma.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> found = ug.diagnostics.diagnose(
        ...     problem, theta, key=jax.random.key(0), truncation=10, num_workers=16)
        >>> {row.name: round(row.nmse, 1) for row in found.ranking if row.name == "tbptt"}
        {'tbptt': 1.1}
    """
    begun = time.perf_counter()
    inner_loop.check_problem(problem)
    num_workers = arguments.positive_int("num_workers", num_workers)
    if memory_limit is not None:
        memory_limit = arguments.positive_int("memory_limit", memory_limit)
    theta, key = arguments.floating_theta(theta), arguments.typed_key(key)
    problem, truncation, static = _with_windows(problem, truncation, key)
    inner_loop.check_step(problem, key, theta)
    if sigma is not None:
        arguments.check_sigma(sigma)
        rounding.check(sigma, theta)
    horizon = inner_loop.static_horizon(problem, "diagnose")
    plan = plan_of(horizon // truncation, num_workers, _flops(problem, key, theta))
    setup = _Setup(problem, theta, key, horizon, truncation, plan)
    probes = _probe(setup, sigma)
    found = _by_backprop(setup, probes)
    exponent = _exponent(setup, probes)
    cost = StepCost(
        probes.seconds,
        found.seconds,
        max(exponent.seconds - probes.seconds, 0.1 * probes.seconds),
        _bytes(jax.eval_shape(problem.init, key, theta)),
        _bytes(theta),
        found.bytes,
    )
    spent = probes.spent + found.spent + exponent.spent
    update = 2 * num_workers * horizon * probes.mean_seconds
    details = Details(
        sigma=probes.sigma,
        sweep=probes.sweep,
        exponents=exponent.values,
        nonfinite_pairs=probes.nonfinite,
        loss=probes.loss,
        share=spent / (100 * update),
        seconds=time.perf_counter() - begun,
    )
    measurements = Measurements(
        horizon,
        truncation,
        num_workers,
        probes.windows,
        found.derivatives,
        cost,
        found.obstacle,
        static,
        memory_limit,
        details,
    )
    return Diagnosis(measurements, recommend(measurements))


class _Setup(NamedTuple):
    problem: UnrolledProblem
    theta: Theta
    key: Key
    horizon: int
    truncation: int
    plan: Plan

    @property
    def num_windows(self) -> int:
        return self.horizon // self.truncation


def _with_windows(
    problem: UnrolledProblem, truncation: int | None, key: Key
) -> tuple[UnrolledProblem, int, bool]:
    """The problem with a static horizon, the truncation, and whether the horizon was static."""
    sampler = problem.horizon
    static = not callable(sampler)
    if callable(sampler):
        if truncation is None:
            raise ValueError(
                "`truncation` is needed: problem.horizon is sampled, so that it has no divisors. "
                "Pass the number of inner steps in a window."
            )
        drawn = [int(sampler(jax.random.fold_in(key, i))) for i in range(31)]
        windows = max(1, round(float(np.median(drawn)) / truncation))
        problem = problem._replace(horizon=windows * truncation)
    horizon = inner_loop.static_horizon(problem, "diagnose")
    if truncation is None:
        divisors = [d for d in range(1, horizon + 1) if horizon % d == 0]
        truncation = min(divisors, key=lambda d: abs(np.log(horizon / d / 10)))
    return problem, inner_loop.check_truncation(problem, truncation), static


class _Probes(NamedTuple):
    sigma: float
    sweep: Sweep
    windows: Windows
    kept: np.ndarray  # the directions whose slopes are finite
    nonfinite: float
    loss: float
    seconds: float  # per inner step of a trajectory
    mean_seconds: float
    spent: float
    keys: tuple[Key, Key]


def _probe(setup: _Setup, sigma: float | None) -> _Probes:
    """Compiles the pairs' program, sweeps sigma, and measures the windows at the chosen one."""
    problem, theta, plan = setup.problem, setup.theta, setup.plan
    number, num_lanes = plan.directions, plan.lanes
    dtype = wide(*jax.tree.leaves(theta))
    keys = probe_keys(setup.key, number)
    slopes = _probes.window_slopes(problem, setup.truncation)
    lanes = window_lanes(setup.num_windows, plan.stretches).padded(num_lanes)
    some = tuple(k[:AT_ONCE] for k in keys)
    program = slopes.lower(lanes, jnp.ones((), dtype), theta, some).compile()
    times = []

    def run(lanes, sigma, keys, first):
        here = tuple(k[first : first + AT_ONCE] for k in keys)
        return _timed(times, program, lanes, jnp.asarray(sigma, dtype), theta, here)

    sigmas = np.array([sigma]) if sigma is not None else _sigmas(theta, min(num_lanes, SIGMAS[1]))
    sweep_lanes = _probes.schedule(
        np.broadcast_to((sigmas / sigmas[-1])[:, None], (len(sigmas), setup.num_windows))
    ).padded(num_lanes)
    swept = [run(sweep_lanes, sigmas[-1], keys, i * AT_ONCE) for i in (0, 1)]
    sweep = _sweep(sigmas, swept)
    chosen = sweep.suggestion()
    found = [run(lanes, chosen, keys, i) for i in range(0, EPISODES * number, AT_ONCE)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
    good = np.isfinite(joined.losses + joined.ends + joined.starts).all(axis=(1, 2))
    kept = np.asarray(good.reshape(number, EPISODES).all(axis=1))
    if kept.sum() < 3:
        raise ValueError(
            f"losses are not finite along {np.mean(~kept):.0%} of the directions at sigma="
            f"{chosen:.3g}. Lower `sigma`, or find the step: "
            "ug.diagnostics.lyapunov(problem, theta, ...)."
        )
    joined = jax.tree.map(lambda x: x[np.repeat(kept, EPISODES)], joined)
    dim = sum(x.size for x in jax.tree.leaves(theta))
    windows = windows_from(joined, int(kept.sum()), dim, plan.stretches)
    steps = AT_ONCE * (2 * num_lanes + 1) * setup.horizon
    least, mean = min(times) / steps, float(np.mean(times)) / steps
    loss = float(np.mean(joined.loss))
    nonfinite = float(1 - good.mean())
    return _Probes(chosen, sweep, windows, kept, nonfinite, loss, least, mean, sum(times), keys)


def _sigmas(theta: Theta, number: int) -> np.ndarray:
    """Values over two decades around 1 % of theta's size, above theta's resolution."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.device_get(theta))]
    size = np.sqrt(np.mean(np.concatenate([x.ravel() for x in leaves]) ** 2)) or 1.0
    sigmas = 0.01 * size * np.logspace(-1, 1, number)
    visible = [
        s
        for s in sigmas
        if all(rounding.fraction_lost(float(s), x) < 0.05 for x in jax.tree.leaves(theta))
    ]
    return np.array(visible or [0.1 * size])


def _sweep(sigmas: np.ndarray, swept: list[_probes.Slopes]) -> Sweep:
    """The derivative of J along the directions, for every sigma."""
    lanes = len(sigmas)
    slopes = np.concatenate([s.persistent().mean(axis=2)[:, :lanes] for s in swept])
    return Sweep(sigmas, slopes.reshape(-1, EPISODES, lanes) * (sigmas[-1] / sigmas))


class _Backprop(NamedTuple):
    derivatives: Derivatives | None
    obstacle: str
    seconds: float
    bytes: int | None
    spent: float


def _by_backprop(setup: _Setup, probes: _Probes) -> _Backprop:
    """Gradients by backpropagation, or why there are none.

    A round is an episode for each direction; the first two are the episodes of the pairs.
    """
    gradients = _probes.backprop_gradients(setup.problem, setup.truncation)
    number, rounds = setup.plan.directions, setup.plan.rounds
    episodes, _ = probe_keys(setup.key, number * rounds // 2)
    each, at_once = np.arange(number), setup.plan.rounds_at_once
    at = [EPISODES * each + r if r < EPISODES else number * r + each for r in range(rounds)]
    at = np.reshape(at, (-1, at_once * number))
    along = probes.keys[1][np.tile(EPISODES * each, at_once)]
    try:
        program = gradients.lower(setup.theta, episodes[at[0]], along).compile()
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error)
        loop = "Reverse-mode differentiation does not work" in text
        reason = "a `while_loop` in the step" if loop else text.splitlines()[0][:100]
        return _Backprop(None, f"no derivatives: {reason}", float("nan"), None, 0.0)
    times: list[float] = []
    found = [_timed(times, program, setup.theta, episodes[i], along) for i in at]
    lanes = 2 * len(along)
    seconds = min(times) / (lanes * setup.horizon)
    held = _temporary(program)
    held = None if held is None else held // lanes
    flat = [
        np.concatenate([_flat(getattr(out, name), len(along)) for out in found])
        for name in ("whole", "truncated", "along")
    ]
    flat = [np.swapaxes(x.reshape(rounds, number, -1), 0, 1)[probes.kept] for x in flat]
    derivatives = derivatives_of(flat[0], flat[1], np.moveaxis(flat[2], -1, 0), probes.windows)
    return _Backprop(derivatives, "", seconds, held, sum(times))


class _Exponent(NamedTuple):
    values: np.ndarray
    seconds: float
    spent: float


def _exponent(setup: _Setup, probes: _Probes) -> _Exponent:
    """The first Lyapunov exponent in some episodes, and the time of a tangent."""
    nothing = _Exponent(np.array([]), float("nan"), 0.0)

    def one(key, theta):
        return lyapunov(setup.problem, theta, key=key).exponents[0]

    keys = probes.keys[0][: 2 * AT_ONCE].reshape(2, AT_ONCE)
    try:
        program = jax.jit(jax.vmap(one, (0, None))).lower(keys[0], setup.theta).compile()
    except (TypeError, ValueError, NotImplementedError):
        return nothing
    times: list[float] = []
    values = [_timed(times, program, some, setup.theta) for some in keys]
    seconds = min(times) / (AT_ONCE * setup.horizon)
    return _Exponent(np.concatenate(values).astype(np.float64), seconds, sum(times))


def _timed(times: list[float], program: Callable[..., Any], *args: Any) -> Any:
    """Calls the program, adds the seconds to ``times``, and returns the result in numpy.

    At first a short program is called up to five times within 20 ms: the least time of few calls is
    that of whatever else the device does.
    """
    out, calls, enough = None, 1 if times else 5, time.perf_counter() + 0.02
    for _ in range(calls):
        begun = time.perf_counter()
        out = jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - begun)
        if begun + times[-1] > enough:
            break
    return jax.device_get(out)


def _flat(tree: Any, number: int) -> np.ndarray:
    leaves = [np.asarray(x, np.float64).reshape(number, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


def _flops(problem: UnrolledProblem, key: Key, theta: Theta) -> float:
    """Floating-point operations of a step, as the backend counts them; inf if it does not."""
    state = jax.eval_shape(problem.init, key, theta)
    lowered = jax.jit(problem.step).lower(key, theta, state, jnp.int32(0))
    found: Any = lowered.cost_analysis() or {}
    loops = "while" in lowered.as_text()  # a loop's body is counted once
    return float("inf") if loops else float(found.get("flops", "inf"))


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * _itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _temporary(program: Any) -> int | None:
    """The bytes that a compiled program holds while it runs; None if the backend does not say."""
    analysis: Callable[[], Any] = getattr(program, "memory_analysis", lambda: None)
    found = analysis()
    size = getattr(found, "temp_size_in_bytes", 0) or 0
    return int(size) or None
