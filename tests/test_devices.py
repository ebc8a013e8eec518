"""``average`` over meshes of 1, 2, 4 and 8 devices, and a user's own pmap and shard_map.

``estimators/test_contract.py`` runs every estimator on a mesh of 8 and counts collectives.
"""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, counted, mistyped, numbers, present, quadratic, raises

KEY = jax.random.key(0)
KEYS = [jax.random.fold_in(KEY, i) for i in range(4)]
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@functools.cache
def recorded():
    """The small problem with a state that records all draws."""
    problem, theta = quadratic()

    def init(key, theta):
        return {"own": problem.init(key, theta), "drawn": jnp.zeros((problem.horizon, 3))}

    def step(key, theta, state, t):
        own, loss = problem.step(key, theta, state["own"], t)
        # The draws are not normal: XLA's rounding of those depends on the program (jax 0.12).
        drawn = state["drawn"].at[t].set(jax.random.uniform(key, (3,)))
        return {"own": own, "drawn": drawn}, loss

    return ug.UnrolledProblem(init, step, problem.horizon), theta


@functools.cache
def looped():
    """A step with a ``while_loop`` that begins from constants; its length depends on theta."""
    problem, theta = quadratic()

    def step(key, theta, state, t):
        def move(carry):
            n, y = carry
            return n + 1, y + jnp.exp(theta["log_rate"]) * jnp.abs(state["x"])

        _, y = jax.lax.while_loop(lambda c: (c[0] < 5) & (c[1][0] < 2), move, (0, jnp.zeros(3)))
        state, loss = problem.step(key, theta, state, t)
        return state, loss + 0.01 * jnp.sum(y)

    return problem._replace(step=step), theta


@functools.cache
def alone(name):
    """Noise of random signs: their sums are exact, and so are equal in every program."""
    problem, _ = recorded()
    if name == "pes":
        noise = ug.noise.rademacher()
        return ug.pes(problem, truncation=5, sigma=0.1, num_pairs=2, noise=noise)
    return ug.tbptt(problem, truncation=5)


@functools.cache
def averaged(name, num_devices=None, stagger="lockstep"):
    """Eight workers; equal arguments give the same object, so that it compiles once."""
    mesh = num_devices and ug.make_worker_mesh(num_devices)
    return ug.average(alone(name), 8, mesh=mesh, stagger=stagger)


@jax.jit
def descend(theta, grad):
    return jax.tree.map(lambda x, g: x - 0.01 * g, theta, grad)


@functools.cache
def trained(*which):
    """Estimates and state of a few updates, and the number of programs that each call compiled."""
    many, theta = averaged(*which), recorded()[1]
    state, estimates, compiled = many.init(KEY, theta), [], []
    for key in KEYS:
        with counted() as count:
            estimate, state = many.estimate(key, theta, state)
        estimates.append(estimate)
        compiled.append(count[0])
        theta = descend(theta, estimate.grad)
    return estimates, state, compiled


def draws(state):
    """The random parts of a worker state: keys, data, accumulated noise."""
    carried = state.carried  # tbptt carries one inner state, pes its pairs' states
    inner = getattr(carried, "states", carried)
    return numbers([state.episode, inner["drawn"], getattr(carried, "accumulated", None)])


@pytest.mark.parametrize(
    ("name", "num_devices", "stagger"),
    [
        ("pes", 1, "lockstep"),
        ("pes", 2, "lockstep"),
        ("pes", 4, "burn_in"),
        ("pes", 8, "lockstep"),
        ("pes", 8, "burn_in"),
        ("tbptt", 2, "breakstep"),
        ("tbptt", 8, "breakstep"),
    ],
)
def test_every_mesh_gives_the_same_and_compiles_once(name, num_devices, stagger):
    """A few updates equal the updates without a mesh; all draws are bit-equal."""
    estimates, state, compiled = trained(name, num_devices, stagger)
    expected, expected_state, _ = trained(name, None, stagger)
    chex.assert_trees_all_equal(draws(state), draws(expected_state))
    chex.assert_trees_all_close(numbers(estimates), numbers(expected), **CLOSE)
    sharding = NamedSharding(ug.make_worker_mesh(num_devices), P("workers"))
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in jax.tree.leaves(state))
    assert all(g.is_fully_replicated for g in jax.tree.leaves(estimates))
    assert compiled[0] > 0
    assert compiled[1:] == [0] * (len(KEYS) - 1)


@pytest.mark.parametrize(
    "which", [("pes",), ("pes", None, "burn_in"), ("tbptt", None, "breakstep")]
)
def test_nothing_recompiles_on_one_device(which):
    *_, compiled = trained(*which)
    assert compiled[0] > 0
    assert compiled[1:] == [0] * (len(KEYS) - 1)


def test_one_all_reduce_with_a_while_loop_in_the_step():
    """Batches put another loop around the workers; the numbers are the same."""
    problem, theta = looped()
    estimator, out, text = build("pes", problem), [], ""
    mesh = ug.make_worker_mesh(4)
    settings: list[dict[str, Any]] = [{}, {"mesh": mesh, "batch_size": 1}]
    for given in settings:
        many = ug.average(estimator, 8, **given)
        state = many.init(KEY, theta)
        program = jax.jit(many.estimate).lower(KEY, theta, state).compile()
        text = present(program.as_text())
        out.append(program(KEY, theta, state)[0])
    other = "all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    assert not re.findall(other, text)
    chex.assert_trees_all_close(numbers(out[1]), numbers(out[0]), **CLOSE)


@pytest.mark.parametrize("name", ["pes", "tbptt"])
def test_the_users_own_pmap_and_shard_map(name):
    """As in the docstring of ``average``; ``test_the_n_fold_trap`` shows the danger."""
    theta, estimator = recorded()[1], alone(name)
    (expected, *_), *_ = trained(name, None, "lockstep" if name == "pes" else "breakstep")
    wanted = numbers((expected.grad, expected.loss))
    indices = np.arange(8)
    states = jax.jit(
        jax.vmap(lambda i: estimator.init(jax.random.fold_in(KEY, i), theta)),
    )(indices)

    def update(key, theta, state):
        key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
        estimate, state = estimator.estimate(key, theta, state)
        return jax.lax.pmean((estimate.grad, estimate.loss), "workers"), state

    def body(key, theta, states):
        out, state = update(key, theta, jax.tree.map(lambda x: x[0], states))
        return out, jax.tree.map(lambda x: x[None], state)

    mapped = jax.pmap(update, axis_name="workers", in_axes=(None, None, 0))
    each, mesh = P("workers"), ug.make_worker_mesh(8)
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(P(), P(), each), out_specs=(P(), each))
    for function, copies in [(mapped, 8), (jax.jit(sharded), None)]:
        out, _ = function(KEYS[0], theta, states)
        same = wanted if copies is None else jax.tree.map(lambda x: np.stack([x] * 8), wanted)
        chex.assert_trees_all_close(numbers(out), same, **CLOSE)


def test_the_n_fold_trap():
    """In shard_map ``jax.grad`` for a replicated theta sums over devices; estimators do not."""
    problem = ug.UnrolledProblem(lambda key, theta: theta, lambda key, theta, s, t: (s, s * s), 4)

    def grads(key, theta):
        key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
        naive = jax.grad(lambda x: ug.episode_loss(problem, key, x))(theta)
        ours = [
            estimator.estimate(key, theta, estimator.init(key, theta))[0].grad
            for estimator in [ug.bptt(problem), ug.tbptt(problem, truncation=2)]
        ]
        return jax.lax.pmean((naive, ours), "workers")

    mesh = ug.make_worker_mesh(8)
    sharded = jax.shard_map(grads, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    naive, ours = numbers(jax.jit(sharded)(KEY, jnp.float32(3.0)))
    np.testing.assert_allclose(ours, 6.0, rtol=1e-6)
    np.testing.assert_allclose(naive, 8 * 6.0, rtol=1e-6)


def scalar(streaming=False):
    """A small problem with one number as state; with ``streaming`` the data change it."""

    def step(key, theta, x, t, *batch):
        x = 0.9 * x + theta * jax.random.uniform(key) + sum(batch)
        return x, x**2

    def plain(key, theta, x, t):
        return step(key, theta, x, t)

    def streamed(key, theta, x, t, batch):
        return step(key, theta, x, t, batch)

    start = lambda key, theta: jax.random.uniform(key)  # noqa: E731
    return ug.UnrolledProblem(start, streamed if streaming else plain, 20)


def test_streamed_data_and_a_mesh_of_two_axes():
    pes, theta = ug.pes(scalar(streaming=True), truncation=5, sigma=0.1), jnp.float32(0.3)
    data = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    out = []
    plain, spread = ug.average(pes, 4), ug.average(pes, 4, mesh=mesh, axis="data")
    for many, batches in [(plain, data), (spread, data), (plain, data[::-1])]:
        out.append(numbers(many.estimate(KEY, theta, many.init(KEY, theta), data=batches)[0]))
    chex.assert_trees_all_close(out[1], out[0], rtol=1e-5)
    assert abs(out[2].loss / out[0].loss - 1) > 1e-3  # the assignment of data to workers matters


def test_a_problem_made_inside_jit():
    """The step may close over traced values, as with a growing horizon."""

    @jax.jit
    def grad(target, theta):
        problem = ug.UnrolledProblem(
            lambda key, theta: theta, lambda key, theta, s, t: (s, (s - target) ** 2), 4
        )
        many = ug.average(ug.bptt(problem), 4, mesh=ug.make_worker_mesh(4))
        return many.estimate(KEY, theta, many.init(KEY, theta))[0].grad

    assert float(grad(jnp.float32(1.0), jnp.float32(3.0))) == pytest.approx(4.0)


def test_theta_and_state_from_elsewhere_are_placed():
    """A restored state is on one device; theta is a NumPy array or is on another device."""
    theta, plain, many = recorded()[1], averaged("pes"), averaged("pes", 8)
    state = plain.init(KEY, theta)
    (expected, *_), *_ = trained("pes", None, "lockstep")
    elsewhere = jax.device_put(theta, jax.devices()[5])
    for given in [jax.tree.map(np.asarray, theta), elsewhere]:
        with counted() as count:
            got, _ = many.estimate(KEYS[0], given, jax.device_put(state, jax.devices()[0]))
        np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5)
    assert count[0] == 0  # the first call's program serves all later calls


@pytest.mark.parametrize("stagger", ["lockstep", "burn_in"])
def test_a_plain_average_over_a_problem_that_differs_between_devices(stagger):
    """In a user's own shard_map the step closes over the device's own data."""

    def body(target, theta):
        problem = ug.UnrolledProblem(
            lambda key, theta: jnp.zeros(()),
            lambda key, theta, s, t: (s + theta, (s + theta - target[0]) ** 2),
            4,
        )
        many = ug.average(ug.tbptt(problem, truncation=2), 3, stagger=stagger)
        estimate, _ = many.estimate(KEY, theta, many.init(KEY, theta))
        return estimate.loss[None]

    sharded = jax.shard_map(
        body, mesh=ug.make_worker_mesh(4), in_specs=(P("workers"), P()), out_specs=P("workers")
    )
    losses = jax.jit(sharded)(np.arange(4, dtype=np.float32), jnp.float32(0.0))
    np.testing.assert_allclose(losses, np.arange(4.0) ** 2)


def test_an_update_under_jit_compiles_once():
    many, outer = averaged("pes", 4, "burn_in"), optax.adam(0.1)
    whole = NamedSharding(ug.make_worker_mesh(4), P())
    theta = recorded()[1]
    theta, opt_state = jax.device_put((theta, outer.init(theta)), whole)
    state = many.init(KEY, theta)

    @jax.jit
    def update(key, theta, opt_state, state):
        estimate, state = many.estimate(key, theta, state)
        updates, opt_state = outer.update(estimate.grad, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state, state

    counts = []
    for key in KEYS[:3]:
        with counted() as count:
            theta, opt_state, state = update(key, theta, opt_state, state)
        counts.append(count[0])
    assert counts == [1, 0, 0]


def test_errors():
    problem, _ = quadratic()
    pes = ug.pes(problem, truncation=5, sigma=0.1)
    mesh = ug.make_worker_mesh(8)
    with raises(ValueError, "`num_workers`=30 must be divisible", "size 8; use 24 or 32"):
        ug.average(pes, 30, mesh=mesh)
    with raises(ValueError, "`num_workers`=3 must be divisible", "use 8"):
        ug.average(pes, 3, mesh=mesh)
    with raises(ValueError, "no axis 'workers'; its axes are 'data'", "axis="):
        ug.average(pes, 8, mesh=ug.make_worker_mesh(8, axis="data"))
    explicit = jax.make_mesh((8,), ("workers",), axis_types=(AxisType.Explicit,))
    with raises(ValueError, "Auto; axis 'workers' is Explicit", "make_worker_mesh"):
        ug.average(pes, 8, mesh=explicit)
    with raises(TypeError, "`mesh` must be a jax.sharding.Mesh; got int"):
        ug.average(pes, 8, mesh=mistyped(8))
    with raises(ValueError, "`devices` is 9, but jax sees 8"):
        ug.make_worker_mesh(9)
    with raises(TypeError, "`devices` must be a whole number; got 2.5"):
        ug.make_worker_mesh(mistyped(2.5))
    with raises(
        ValueError, "of one device (num_workers=16 over 8 devices); got batch_size=3", "1, 2"
    ):
        ug.average(pes, 16, mesh=mesh, batch_size=3)
    with raises(TypeError, "`devices` must be a number or devices", "[]"):
        ug.make_worker_mesh([])
    with raises(ValueError, "`devices` names one twice"):
        ug.make_worker_mesh(jax.devices()[:1] * 2)
    assert ug.make_worker_mesh(mistyped(np.array(jax.devices()[2:4]))).size == 2
    with raises(TypeError, "`state` must be what this estimator's `init", "NoneType"):
        ug.average(pes, 8, mesh=mesh).estimate(KEY, quadratic()[1], None)
    with raises(ValueError, "another mesh is in force", "compare(devices=)", "leave `mesh` out"):
        ug.diagnostics.compare(
            quadratic()[0],
            quadratic()[1],
            {"pes": ug.average(pes, 8, mesh=mesh)},
            reference=quadratic()[1],
            num_samples=4,
            num_chains=0,
            key=KEY,
            devices=2,
        )
    with raises(ValueError, "nested averages"):
        ug.average(ug.average(pes, 8, mesh=mesh), 8, mesh=mesh).init(KEY, quadratic()[1])
