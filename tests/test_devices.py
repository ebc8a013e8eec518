"""``average`` over meshes of 1, 2, 4 and 8 devices, and the two ways to do it by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, quadratic, raises, rows

KEY = jax.random.key(0)
MESHES = [pytest.param(n, marks=[] if n == 8 else pytest.mark.slow) for n in (1, 2, 4, 8)]


@functools.cache
def recorded():
    """The small problem; its state remembers all that was drawn."""
    problem, theta = quadratic()

    def init(key, theta):
        return {"own": problem.init(key, theta), "drawn": jnp.zeros((problem.horizon, 3))}

    def step(key, theta, state, t):
        own, loss = problem.step(key, theta, state["own"], t)
        # Not normal draws: how XLA rounds those may depend on the program around them (jax 0.12).
        drawn = state["drawn"].at[t].set(jax.random.uniform(key, (3,)))
        return {"own": own, "drawn": drawn}, loss

    return ug.UnrolledProblem(init, step, problem.horizon), theta


@functools.cache
def looped():
    """With a ``while_loop`` in the step, whose length depends on theta, from constants."""
    problem, theta = quadratic()

    def step(key, theta, state, t):
        def move(carry):
            n, y = carry
            return n + 1, y + jnp.exp(theta["log_rate"]) * jnp.abs(state["x"])

        _, y = jax.lax.while_loop(lambda c: (c[0] < 5) & (c[1][0] < 2), move, (0, jnp.zeros(3)))
        state, loss = problem.step(key, theta, state, t)
        return state, loss + 0.01 * jnp.sum(y)

    return problem._replace(step=step), theta


def called(estimator, theta, calls=3):
    """The estimates of a few calls at one theta, and the state after them."""
    state, estimates = estimator.init(KEY, theta), []
    for i in range(calls):
        estimate, state = estimator.estimate(jax.random.key(i), theta, state)
        estimates.append(estimate)
    return estimates, state


@functools.cache
def on_one_device(name):
    problem, theta = recorded()
    return called(ug.average(build(name, problem), 8), theta)


def draws(state):
    """Whatever of a worker state was drawn: keys, data, accumulated noise."""
    inner = getattr(state, "states", getattr(state, "state", {"drawn": ()}))
    keys = [jax.random.key_data(state.episode.key), state.episode.t]
    return [*keys, inner["drawn"], *jax.tree.leaves(getattr(state, "accumulated", None))]


@pytest.mark.parametrize("num_devices", MESHES)
@pytest.mark.parametrize("name", rows())
def test_every_mesh_gives_the_same(name, num_devices):
    problem, theta = recorded()
    mesh = ug.make_worker_mesh(num_devices)
    many = ug.average(build(name, problem), 8, mesh=mesh)
    estimates, state = called(many, theta)
    expected, expected_state = on_one_device(name)
    for got, wanted in zip(draws(state), draws(expected_state), strict=True):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(estimates, expected, strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert all(g.is_fully_replicated for g in jax.tree.leaves(got))
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("workers")), leaf.ndim)


def collectives(many, theta):
    state = many.init(KEY, theta)
    text = jax.jit(many.estimate).lower(KEY, theta, state).compile().as_text()
    other = "all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return len(re.findall(r" all-reduce(?:-start)?\(", text)), len(re.findall(other, text))


@pytest.mark.parametrize("name", rows())
def test_one_all_reduce(name):
    mesh = ug.make_worker_mesh(8)
    problem, theta = recorded()
    assert collectives(ug.average(build(name, problem), 8, mesh=mesh), theta) == (1, 0)


def test_one_all_reduce_with_a_while_loop_in_the_step():
    problem, theta = looped()
    mesh = ug.make_worker_mesh(4)
    estimator = build("pes", problem)
    many = ug.average(estimator, 8, mesh=mesh, batch_size=1)
    assert collectives(many, theta) == (1, 0)
    (one, *_), _ = called(ug.average(estimator, 8), theta, calls=1)
    (other, *_), _ = called(many, theta, calls=1)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


class Compilations:
    """Counts what XLA compiles."""

    count = 0

    def __call__(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("stagger", ["lockstep", "breakstep", "burn_in"])
@pytest.mark.parametrize("num_devices", [None, 1, 8])
def test_nothing_recompiles_after_the_first_call(num_devices, stagger):
    problem, theta = recorded()
    mesh = None if num_devices is None else ug.make_worker_mesh(num_devices)
    many = ug.average(build("pes", problem), 8, mesh=mesh, stagger=stagger)
    state, keys = many.init(KEY, theta), jax.random.split(KEY, 6)
    counts, compilations = [], Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations)
    for key in keys:
        before = compilations.count
        estimate, state = many.estimate(key, theta, state)
        counts.append(compilations.count - before)
        theta = jax.tree.map(lambda x, g: x - 0.1 * g, theta, estimate.grad)
    jax.monitoring.unregister_event_duration_listener(compilations)
    assert counts[0] > 0
    assert counts[1:] == [0] * 5


def update_by_hand(estimator):
    """One worker per device, as in the docstring of ``average``."""

    def update(key, theta, state):
        key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
        estimate, state = estimator.estimate(key, theta, state)
        return jax.lax.pmean((estimate.grad, estimate.loss), "workers"), state

    return update


@pytest.mark.parametrize("name", rows())
def test_the_users_own_pmap_and_shard_map(name):
    """Three equal ways; ``test_the_n_fold_trap`` is what would go wrong."""
    problem, theta = recorded()
    estimator = build(name, problem)
    expected, _ = on_one_device(name)
    states = [estimator.init(jax.random.fold_in(KEY, i), theta) for i in range(8)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *states)
    update = update_by_hand(estimator)

    mapped = jax.pmap(update, axis_name="workers", in_axes=(None, None, 0))
    (grad, loss), _ = mapped(jax.random.key(0), theta, states)
    wanted = (expected[0].grad, expected[0].loss)
    for got, x in zip(jax.tree.leaves((grad, loss)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(x, got.shape), rtol=1e-5, atol=1e-7)

    if name not in ("gpes", "tbptt"):  # the others are in test_varying.py, without the mean
        return

    def body(key, theta, states):
        out, state = update(key, theta, jax.tree.map(lambda x: x[0], states))
        return out, jax.tree.map(lambda x: x[None], state)

    each, mesh = P("workers"), ug.make_worker_mesh(8)
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(P(), P(), each), out_specs=(P(), each))
    out, _ = jax.jit(sharded)(jax.random.key(0), theta, states)
    for got, x in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-7)


def test_the_n_fold_trap():
    """In shard_map ``jax.grad`` of a replicated theta is the sum over devices; ours is not."""
    problem = ug.UnrolledProblem(lambda key, theta: theta, lambda key, theta, s, t: (s, s * s), 4)
    theta = jnp.float32(3.0)
    for estimator in [ug.bptt(problem), ug.tbptt(problem, truncation=2)]:

        def naive(key, theta, estimator=estimator):
            key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
            return jax.lax.pmean(
                jax.grad(lambda x: ug.episode_loss(problem, key, x))(theta), "workers"
            )

        def ours(key, theta, estimator=estimator):
            key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
            state = estimator.init(key, theta)
            return jax.lax.pmean(estimator.estimate(key, theta, state)[0].grad, "workers")

        def run(function):
            sharded = jax.shard_map(
                function, mesh=ug.make_worker_mesh(8), in_specs=(P(), P()), out_specs=P()
            )
            return float(jax.jit(sharded)(KEY, theta))

        assert run(ours) == pytest.approx(6.0)
        assert run(naive) == pytest.approx(8 * 6.0)


def test_streamed_data_and_a_mesh_of_two_axes():
    base, theta = quadratic()

    def step(key, theta, state, t, batch):
        state, loss = base.step(key, theta, state, t)
        return state, loss + jnp.mean(batch * state["x"])

    problem = base._replace(step=step)
    data = jax.random.normal(KEY, (4, 5, 3))
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    out = []
    for given in [{}, {"mesh": mesh, "axis": "data"}]:
        many = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 4, **given)
        out.append(many.estimate(KEY, theta, many.init(KEY, theta), data=data)[0])
    for a, b in zip(*map(jax.tree.leaves, out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_problem_made_inside_jit():
    """The step may close over what is traced, as a growing horizon does."""

    @jax.jit
    def grad(target, theta):
        problem = ug.UnrolledProblem(
            lambda key, theta: theta, lambda key, theta, s, t: (s, (s - target) ** 2), 4
        )
        many = ug.average(ug.bptt(problem), 4, mesh=ug.make_worker_mesh(4))
        return many.estimate(KEY, theta, many.init(KEY, theta))[0].grad

    assert float(grad(jnp.float32(1.0), jnp.float32(3.0))) == pytest.approx(4.0)


def test_theta_and_state_from_elsewhere_are_placed():
    """A restored state lies on one device, theta is numpy or lies on another device."""
    problem, theta = recorded()
    pes, mesh = build("pes", problem), ug.make_worker_mesh(4)
    plain, many = ug.average(pes, 8), ug.average(pes, 8, mesh=mesh)
    state = plain.init(KEY, theta)
    elsewhere = jax.device_put(theta, jax.devices()[5])
    expected, _ = plain.estimate(KEY, theta, state)
    for given in [jax.tree.map(np.asarray, theta), elsewhere]:
        got, _ = many.estimate(KEY, given, jax.device_put(state, jax.devices()[0]))
        np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5)


@pytest.mark.parametrize("stagger", ["lockstep", "burn_in"])
def test_a_plain_average_over_a_problem_that_differs_between_devices(stagger):
    """In a user's own shard_map, where the step closes over the device's own data."""

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
    losses = jax.jit(sharded)(jnp.arange(4.0), jnp.float32(0.0))
    np.testing.assert_allclose(losses, jnp.arange(4.0) ** 2)


def test_an_update_under_jit_compiles_once():
    problem, theta = recorded()
    mesh = ug.make_worker_mesh(4)
    many, outer = ug.average(build("pes", problem), 8, mesh=mesh), optax.adam(0.1)
    theta, opt_state = jax.device_put((theta, outer.init(theta)), NamedSharding(mesh, P()))
    state = many.init(KEY, theta)

    @jax.jit
    def update(key, theta, opt_state, state):
        estimate, state = many.estimate(key, theta, state)
        updates, opt_state = outer.update(estimate.grad, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state, state

    keys, counts, compilations = jax.random.split(KEY, 3), [], Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations)
    for key in keys:
        before = compilations.count
        theta, opt_state, state = update(key, theta, opt_state, state)
        counts.append(compilations.count - before)
    jax.monitoring.unregister_event_duration_listener(compilations)
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
        ug.average(pes, 8, mesh=8)
    with raises(ValueError, "`devices` is 9, but jax sees 8"):
        ug.make_worker_mesh(9)
    with raises(TypeError, "`devices` must be a whole number; got 2.5"):
        ug.make_worker_mesh(2.5)
    with raises(
        ValueError, "of one device (num_workers=16 over 8 devices); got batch_size=3", "1, 2"
    ):
        ug.average(pes, 16, mesh=mesh, batch_size=3)
    with raises(TypeError, "`devices` must be a number or devices", "[]"):
        ug.make_worker_mesh([])
    with raises(ValueError, "`devices` names one twice"):
        ug.make_worker_mesh(jax.devices()[:1] * 2)
    assert ug.make_worker_mesh(np.array(jax.devices()[2:4])).size == 2
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
