"""What every estimator of the registry must do; a new one is covered by its row alone."""

import functools
import inspect
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import unrollgrad as ug
from tests.helpers import build, call_steps, quadratic, rows
from unrollgrad.estimators import REGISTRY

NAMES = list(REGISTRY)
KEY, OTHER = jax.random.key(0), jax.random.key(1)


@functools.cache
def three_of(estimator):
    return ug.average(estimator, 3)


def averaged(name, problem, **changes):
    return three_of(build(name, problem, **changes))


WAYS = {"alone": build, "averaged": averaged}
every = pytest.mark.parametrize("name", rows())
alone_and_averaged = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)


def types(tree):
    return [(jax.typeof(x), getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]


def assert_same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


@every
@alone_and_averaged
def test_jit_equals_eager(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    state = estimator.init(KEY, theta)
    with jax.disable_jit():
        eager = estimator.estimate(OTHER, theta, state)
    jitted = jax.jit(estimator.estimate)(OTHER, theta, state)
    assert_same(eager, jitted, rtol=1e-4, atol=1e-5)


@every
def test_vmap_over_keys(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    keys = jax.random.split(KEY, 3)

    def run(key):
        return estimator.estimate(key, theta, estimator.init(key, theta))

    mapped = jax.vmap(run)(keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x: x[i], mapped), run(keys[i]), rtol=1e-4, atol=1e-5)  # noqa: B023


@every
@alone_and_averaged
def test_state_keeps_its_types(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    state = estimator.init(KEY, theta)
    estimate, after = estimator.estimate(OTHER, theta, state)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert types(state) == types(after)
    assert types(theta) == types(estimate.grad)
    assert estimate.loss.shape == ()
    assert estimate.info.inner_steps.dtype == jnp.int32

    def body(state, key):
        return estimator.estimate(key, theta, state)[::-1]

    final, _ = jax.lax.scan(body, state, jax.random.split(KEY, 5))
    assert types(state) == types(final)


@every
@alone_and_averaged
def test_eval_shape_of_init(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    abstract = jax.eval_shape(estimator.init, KEY, theta)
    state = estimator.init(KEY, theta)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]


@every
@alone_and_averaged
def test_one_compile_per_shape(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    estimate = jax.jit(estimator.estimate)
    state = estimator.init(KEY, theta)
    for i in range(6):
        out, state = estimate(jax.random.fold_in(KEY, i), theta, state)
        theta = jax.tree.map(lambda x, g: x - 0.01 * g, theta, out.grad)
    assert estimate._cache_size() == 1


@every
@alone_and_averaged
def test_argument_names(make, name):
    problem, _ = quadratic()
    estimator = make(name, problem)
    assert list(inspect.signature(estimator.init).parameters) == ["key", "theta"]
    parameters = inspect.signature(estimator.estimate).parameters
    assert list(parameters) == ["key", "theta", "state", "data"]
    assert parameters["data"].default is None
    assert parameters["data"].kind is inspect.Parameter.KEYWORD_ONLY
    factory = inspect.signature(REGISTRY[name].factory).parameters
    assert next(iter(factory)) == "problem"
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(factory.values())[1:])
    assert estimator.truncation in (None, 5)


@every
def test_same_key_replays_and_another_does_not(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    state = estimator.init(KEY, theta)
    first = estimator.estimate(OTHER, theta, state)
    assert_same(first, estimator.estimate(OTHER, theta, state))
    # The state before an episode is only a placeholder: another one changes nothing.
    assert_same(first, estimator.estimate(OTHER, theta, estimator.init(OTHER, theta)))
    other, _ = estimator.estimate(KEY, theta, state)
    assert float(other.loss) != float(first[0].loss)


@every
def test_episodes_begin_at_the_start_of_a_call(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    state = estimator.init(KEY, theta)
    windows = 20 // call_steps(estimator, problem)
    for i in range(2 * windows):
        place = i % windows
        assert int(state.episode.t) == place * call_steps(estimator, problem)
        _, state = estimator.estimate(jax.random.fold_in(KEY, i), theta, state)
        began = jax.random.fold_in(KEY, i - place)
        assert_same(state.episode.key, began)
    assert int(state.episode.t) == 0


@every
def test_later_keys_of_an_episode_change_nothing(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    _, state = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    if estimator.truncation is None:
        assert int(state.episode.t) == 0
        return
    assert_same(estimator.estimate(KEY, theta, state), estimator.estimate(OTHER, theta, state))


@every
@alone_and_averaged
def test_saved_mid_episode_continues_bit_for_bit(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    estimate = estimator.estimate
    keys = jax.random.split(KEY, 7)
    state = estimator.init(KEY, theta)
    for key in keys[:3]:
        _, state = estimate(key, theta, state)

    def to_host(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    def from_host(saved, like):
        is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(saved) if is_key else jnp.asarray(saved)

    saved = jax.tree.map(to_host, state)
    outs = []
    for key in keys[3:]:
        out, state = estimate(key, theta, state)
        outs.append(out)
    abstract = jax.eval_shape(estimator.init, KEY, theta)
    restored = jax.tree.map(from_host, saved, abstract)
    fresh = make(name, problem).estimate
    for key, out in zip(keys[3:], outs, strict=True):
        again, restored = fresh(key, theta, restored)
        assert_same(out, again)
    assert_same(state, restored)


def as_data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@every
@alone_and_averaged
def test_states_survive_flattening_and_pickle(make, name):
    problem, theta = quadratic()
    estimator = make(name, problem)
    state = estimator.init(KEY, theta)
    expected, _ = estimator.estimate(OTHER, theta, state)
    leaves, structure = jax.tree.flatten(state)
    for again in [structure.unflatten(leaves), pickle.loads(pickle.dumps(state))]:
        assert jax.tree.structure(again) == structure
        assert again.episode.t.dtype == jnp.int32
        assert_same(expected, estimator.estimate(OTHER, theta, again)[0])


def test_states_survive_orbax(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    problem, theta = quadratic()
    estimator = averaged("pes", problem)
    _, state = estimator.estimate(OTHER, theta, estimator.init(KEY, theta))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jax.tree.map(as_data, state))
        checkpointer.wait_until_finished()
        fresh = jax.tree.map(as_data, estimator.init(OTHER, theta))
        saved = checkpointer.restore(tmp_path / "state", fresh)
    episode = saved.episode._replace(key=jax.vmap(jax.random.wrap_key_data)(saved.episode.key))
    restored = saved._replace(episode=episode)
    assert_same(state, restored)
    assert_same(estimator.estimate(KEY, theta, state), estimator.estimate(KEY, theta, restored))


THETAS = {
    "tuple": (jnp.float32(0.1), jnp.array([0.2, 0.3])),
    "nested": {"a": [jnp.float32(0.1), {"b": jnp.ones((2, 3))}], "none": None},
    "mixed": {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)},
}


@every
@pytest.mark.parametrize("theta", THETAS.values(), ids=THETAS)
def test_any_theta(name, theta):
    def total(theta):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(theta))

    problem = ug.UnrolledProblem(
        init=lambda key, theta: jnp.float32(1.0),
        step=lambda key, theta, s, t: (0.5 * s + total(theta), 0.5 * s + total(theta)),
        horizon=10,
    )
    directions = {"truncation": 10, "sigma": 0.05, "num_pairs": 50}
    workers = 3 if REGISTRY[name].takes("num_pairs") else 150
    estimator = ug.average(build(name, problem, **directions), workers)
    estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    assert types(estimate.grad) == types(theta)
    exact, _ = ug.bptt(problem).estimate(KEY, theta, ug.bptt(problem).init(KEY, theta))
    norm = np.sqrt(float(total(exact.grad)))
    gap = float(total(jax.tree.map(jnp.subtract, estimate.grad, exact.grad)))
    assert np.sqrt(gap) < 0.6 * norm


def test_python_numbers_are_theta():
    problem, _ = ug.problems.influence_balancing(horizon=20)
    estimator = ug.pes(problem, truncation=5, sigma=0.1)
    state = estimator.init(KEY, 0.5)
    estimate, _ = estimator.estimate(KEY, 0.5, state)
    assert types(estimate.grad) == types(jnp.float32(0.5))


@every
def test_raw_keys_are_typed_at_the_door(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    raw = jax.random.PRNGKey(4)
    typed = jax.random.wrap_key_data(raw)
    state = estimator.init(raw, theta)
    assert_same(state, estimator.init(typed, theta))
    assert_same(estimator.estimate(raw, theta, state), estimator.estimate(typed, theta, state))
    many = averaged(name, problem)
    assert_same(
        many.estimate(raw, theta, many.init(raw, theta)),
        many.estimate(typed, theta, many.init(typed, theta)),
    )


@every
@alone_and_averaged
def test_inner_state_of_ints_bools_and_keys(make, name):
    def init(key, theta):
        return {"x": theta, "count": 0, "seen": False, "key": key, "pair": (np.int8(1), 2.0)}

    def step(key, theta, state, t):
        own, draw = jax.random.split(state["key"])
        x = 0.9 * state["x"] + theta * jax.random.uniform(draw)
        new = {"x": x, "count": state["count"] + 1, "seen": ~state["seen"], "key": own}
        return {**new, "pair": (state["pair"][0], state["pair"][1] * 1)}, x**2

    problem = ug.UnrolledProblem(init, step, 20)
    estimator = make(name, problem)
    theta = jnp.float32(0.5)
    state = estimator.init(KEY, theta)
    estimate, after = estimator.estimate(OTHER, theta, state)
    assert types(state) == types(after)
    assert np.isfinite(float(estimate.grad))


def equinox_mlp():
    arrays, static = eqx.partition(eqx.nn.MLP(2, 1, 4, 1, key=KEY), eqx.is_array)
    return arrays, lambda params, x: eqx.combine(params, static)(x)


def flax_mlp():
    graph, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


@every
@pytest.mark.parametrize("model", [equinox_mlp, flax_mlp])
def test_params_of_equinox_and_flax(model, name):
    params, predict = model()
    problem = ug.training_problem(
        loss=lambda theta, params, batch, key: jnp.mean(
            (jax.vmap(partial(predict, params))(batch) - 1.0) ** 2
        ),
        init_params=lambda key: params,
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta), momentum=0.9),
        sample_batch=lambda key: jax.random.uniform(key, (8, 2)),
        horizon=10,
    )
    theta = jnp.log(jnp.float32(0.05))
    estimator = build(name, problem)
    state = estimator.init(KEY, theta)
    estimate, after = estimator.estimate(OTHER, theta, state)
    assert types(state) == types(after)
    assert np.isfinite(float(estimate.grad))
    assert float(estimate.grad) != 0


@every
@alone_and_averaged
def test_streaming_data(make, name):
    """The same numbers as data that the step makes itself, slice by slice in order."""
    batches = jax.random.normal(KEY, (20, 3))

    def init(key, theta):
        return jnp.zeros(3)

    def step(key, theta, state, t, batch=None):
        batch = batches[t] if batch is None else batch
        state = state - theta * (state - batch)
        return state, jnp.sum(state**2)

    problem, theta = ug.UnrolledProblem(init, step, 20), jnp.float32(0.3)
    estimator = make(name, problem)
    k = call_steps(estimator, problem)
    inside = streamed = estimator.init(KEY, theta)
    for i in range(2):
        data = {"x": batches[i * k : (i + 1) * k]} if k == 5 else {"x": batches}
        data = data["x"]
        if make is averaged:
            data = jnp.broadcast_to(data, (3, *data.shape))
        a, inside = estimator.estimate(KEY, theta, inside)
        b, streamed = estimator.estimate(KEY, theta, streamed, data=data)
        assert_same((a, inside), (b, streamed), rtol=1e-5, atol=1e-6)


@every
def test_inner_steps_are_those_that_run(name):
    """Counted by a callback in the step: both signs and the mean pass, backward not."""
    problem, theta = quadratic()
    count = 0

    def bump(_):
        nonlocal count
        count += 1

    def step(key, theta, state, t):
        jax.debug.callback(bump, state["x"])
        return problem.step(key, theta, state, t)

    estimator = build(name, problem._replace(step=step))
    estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    jax.effects_barrier()
    assert int(estimate.info.inner_steps) == count
    assert count == REGISTRY[name].passes(2) * call_steps(estimator, problem)


@every
def test_steps_are_the_untruncated_ones(name):
    """A truncated run sees the steps, keys and data that the untruncated one sees."""
    if REGISTRY[name].factory is ug.truncated_es:
        changes = {"sigma": 1e-6}
    else:
        changes = {"sigma": 1e-6, "num_pairs": REGISTRY[name].least_pairs}
    problem, theta = quadratic()
    estimator = build(name, problem, **changes)
    state = estimator.init(KEY, theta)
    losses = []
    for _ in range(20 // call_steps(estimator, problem)):
        estimate, state = estimator.estimate(OTHER, theta, state)
        losses.append(float(estimate.loss))
    whole = float(ug.episode_loss(problem, OTHER, theta))
    np.testing.assert_allclose(np.mean(losses), whole, rtol=1e-4)


@pytest.mark.parametrize("name", rows(n for n in NAMES if REGISTRY[n].takes("sigma")))
def test_sigma_may_be_traced_and_a_prefix(name):
    problem, theta = quadratic()

    def run(sigma):
        estimator = build(name, problem, sigma=sigma)
        state = estimator.init(KEY, theta)
        _, state = estimator.estimate(OTHER, theta, state)
        return estimator.estimate(OTHER, theta, state)[0].grad

    plain = run(0.1)
    assert_same(plain, jax.jit(run)(0.1), rtol=1e-3, atol=1e-5)
    assert_same(plain, run({"log_rate": 0.1, "start": 0.1}))
    assert_same(plain, run({"log_rate": 0.1, "start": jnp.full(3, 0.1)}), rtol=1e-5)
    other = run({"log_rate": 0.1, "start": 0.3})
    assert not np.allclose(other["start"], plain["start"])


def test_sigma_may_change_inside_an_episode():
    """The accumulator is in units of sigma: another one does not change what is in it."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=4, memory=1.0)
    state = ug.pes(problem, truncation=2, sigma=0.1).init(KEY, theta)
    for sigma in [0.1, 0.4]:
        estimator = ug.pes(problem, truncation=2, sigma=sigma)
        _, state = estimator.estimate(OTHER, theta, state)
    law, noise = ug.noise.gaussian(), jax.random.fold_in(OTHER, 2)
    unit = sum(law.sample(jax.random.fold_in(noise, j), (), theta, 1) for j in range(2))
    np.testing.assert_allclose(state.accumulated, unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", rows(n for n in NAMES if REGISTRY[n].takes("noise")))
def test_bf16_uses_the_realised_difference(name, optimized):
    """On a linear loss the estimate is exact given the perturbation that bf16 really made.

    Where XLA optimizes: it would drop a cast there and back.
    """
    theta = jnp.ones(64, jnp.bfloat16)
    slope = jax.random.normal(KEY, (64,))

    def step(key, theta, state, t):
        return state, slope @ (theta.astype(jnp.float32) - 1)

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 1)
    sigma = 0.02  # bf16 near 1 resolves 1/128 above and 1/256 below: most of eps is rounded
    estimator = build(name, problem, truncation=1, noise_period=1, sigma=sigma, num_pairs=1)
    estimate, _ = estimator.estimate(OTHER, theta, estimator.init(KEY, theta))
    unit = ug.noise.gaussian().sample(
        jax.random.fold_in(jax.random.fold_in(OTHER, 2), 0), (), theta, 1
    )[0]
    up = np.asarray((1 + sigma * unit).astype(jnp.bfloat16), np.float32)
    down = np.asarray((1 - sigma * unit).astype(jnp.bfloat16), np.float32)
    realised = (up - down) / (2 * sigma)
    expected = realised * (slope @ realised)
    np.testing.assert_allclose(np.float32(estimate.grad), expected, rtol=1e-2, atol=1e-2)
    intended = unit * (slope @ realised)
    assert np.abs(realised - unit).max() > 0.05
    assert not np.allclose(np.float32(estimate.grad), intended, rtol=1e-2, atol=1e-2)


def test_while_loop_under_evolution_strategies():
    def step(key, theta, state, t):
        state = jax.lax.while_loop(lambda s: s > 1.0, lambda s: 0.5 * s, state + theta)
        return state, state

    problem = ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 20)
    for name in [n for n in NAMES if not REGISTRY[n].reverse_mode]:
        estimator = build(name, problem)
        theta = jnp.float32(0.3)
        estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
        assert np.isfinite(float(estimate.grad))


@every
def test_empty_leaves_in_the_state(name):
    """Such as those of an optimizer that has nothing to remember."""
    problem, theta = quadratic()

    def init(key, theta):
        return problem.init(key, theta), jnp.zeros((0, 3)), jax.random.split(key, 0)

    def step(key, theta, state, t, *data):
        new, loss = problem.step(key, theta, state[0], t, *data)
        return (new, *state[1:]), loss

    estimator = build(name, problem._replace(init=init, step=step))
    out, state = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out.grad))
    estimator.estimate(OTHER, theta, state)


@pytest.mark.parametrize("name", ["full_es", "truncated_es", "es_single"])
def test_three_thetas_for_a_pair(name):
    """Both signs, and the noise as it is drawn: where a state is nothing beside theta."""
    num_pairs, theta = 16, jnp.zeros(100_000)

    def step(key, theta, state, t):
        state = 0.5 * state + jnp.mean(theta)
        return state, (state - 1) ** 2

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 4)
    estimator = REGISTRY[name].build(problem, truncation=2, sigma=0.1, num_pairs=num_pairs)
    args = KEY, theta, estimator.init(KEY, theta)
    plan = jax.jit(estimator.estimate).lower(*args).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 3.3 * num_pairs * theta.nbytes
