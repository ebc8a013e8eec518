"""The contract of every estimator in the registry; its row alone covers a new estimator.

Every row runs once alone and once as 32 workers on a mesh of eight devices, on one problem with
every feature that an inner loop may have. The tests are assertions on these results: a row costs
four programs, however many properties are tested.
"""

import functools
import inspect
import pickle
import re
from functools import partial
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, call_steps, counted, numbers, present, quadratic, rows, types
from unrollgrad._core import unroll
from unrollgrad.estimators import REGISTRY, _pairs
from unrollgrad.types import Segment

KEY, OTHER = jax.random.key(0), jax.random.key(1)
HORIZON, TRUNCATION, WORKERS, PAIRS, SIGMA = 20, 5, 32, 3, 0.01
WINDOWS = HORIZON // TRUNCATION
DATA = np.random.default_rng(0).normal(size=(WORKERS, HORIZON, 3)).astype(np.float32)

every = pytest.mark.parametrize("name", rows())


def taking(setting, same_code):
    """Parameters: the rows that take the setting, except those that run another row's code."""
    names = [name for name, row in REGISTRY.items() if row.takes(setting)]
    return pytest.mark.parametrize("name", rows(n for n in names if n not in same_code))


def kitchen_sink(count=None) -> ug.UnrolledProblem:
    """A problem with state leaves of all kinds, mixed dtypes, streamed data and an evaluation.

    The state records its steps' draws. Every step that runs calls ``count`` once.
    """

    def init(key, theta):
        return {
            "x": jax.random.uniform(key, (3,)) + theta["start"].astype(jnp.float32),
            "half": theta["start"] * 2,
            "n": 0,
            "seen": False,
            "key": key,
            "pair": (np.int8(1), 2.0),
            "drawn": jnp.zeros((HORIZON, 3)),
            "empty": [jnp.zeros((0, 3)), jax.random.split(key, 0), None],
        }

    def step(key, theta, state, t, batch):
        if count is not None:
            jax.debug.callback(count, state["x"])
        own, _ = jax.random.split(state["key"])
        # The draws are not normal: XLA's rounding of those depends on the program (jax 0.12).
        drawn = jax.random.uniform(key, (3,))
        rate, (pull, _), _ = theta["rates"]
        pulled = 0.3 * pull[0] - 0.6 * pull[1]
        x = state["x"] - jnp.exp(5 * rate) * (state["x"] - drawn - batch) + pulled
        new = {
            "x": x,
            "half": 0.5 * state["half"] + theta["start"],
            "n": state["n"] + 1,
            "seen": ~state["seen"],
            "key": own,
            "pair": (state["pair"][0], state["pair"][1] * 1),
            "drawn": state["drawn"].at[t].set(drawn),
            "empty": state["empty"],
        }
        order = t * jnp.mean(batch) / 5  # the order of the slices matters
        return new, jnp.mean((x - 2) ** 2) + jnp.sum(state["half"].astype(jnp.float32)) / 2 + order

    def evaluate(key, theta, state):
        return jnp.mean(state["x"] ** 2) / 20

    return ug.UnrolledProblem(init, step, HORIZON, evaluate)


def theta_of_all_kinds():
    """A theta with nested containers, None, scalars, and a leaf in half precision."""
    return {
        "rates": (jnp.float32(-0.2), [jnp.array([0.1, -0.2]), None], ()),
        "start": jnp.zeros(3, jnp.bfloat16),
    }


class Call(NamedTuple):
    """One call of an estimator and its results; ``ran`` counts the steps that ran."""

    key: Any
    data: Any
    before: Any
    estimate: Any
    after: Any
    ran: int


class Alone(NamedTuple):
    """A single estimator: two episodes of the first worker, first windows of the others."""

    estimator: ug.GradientEstimator
    init: Any
    theta: Any
    calls: list[Call]
    others: list[list[Call]]


class Sharded(NamedTuple):
    """The mean of many workers on eight devices: the first calls and the executable."""

    mesh: Any
    theta: Any
    calls: list[Call]
    compiled: Any

    def firsts(self):
        """Every worker's gradients of the first windows of ``EPISODES`` further episodes."""
        call = self.calls[0]
        return [
            # One call after the other: two at once may deadlock in XLA's CPU collectives.
            jax.block_until_ready(self.compiled(key, self.theta, call.before, data=call.data))[
                0
            ].grad
            for key in episode_keys()[0]
        ]


class Ran(NamedTuple):
    """All results that the tests of one row use."""

    alone: Alone
    sharded: Sharded
    programs: list[int]


def made(name, problem):
    return REGISTRY[name].build(
        problem, truncation=TRUNCATION, sigma=SIGMA, noise_period=2 * TRUNCATION, num_pairs=PAIRS
    )


def data_of(call, estimator, workers: Any = slice(None)):
    """The data that a call streams to these workers: the next slices of the episode."""
    k = call_steps(estimator, kitchen_sink())
    begin = call * k % HORIZON
    return DATA[workers, begin : begin + k]


CALLS, EPISODES = 2, 64
"""The number of windows in which the mesh is compared with lone workers, and the number of each
worker's episodes over which the gradient is averaged."""


@functools.cache
def keys():
    """The keys of all calls, and each worker's key in each call, at [call][worker]."""
    calls = [jax.random.fold_in(KEY, i) for i in range(2 * WINDOWS)]
    fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
    workers = np.arange(WORKERS, dtype=np.int32)
    return calls, [list(fold(k, workers)) for k in [*calls[:CALLS], KEY]]


@functools.cache
def episode_keys():
    """The keys of further calls and the keys of the workers' episodes that begin in them."""
    calls = [jax.random.fold_in(OTHER, i) for i in range(EPISODES)]
    fold = jax.jit(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None)))
    return calls, fold(jnp.stack(calls), np.arange(WORKERS, dtype=np.int32))


def run_alone(name):
    count = [0]

    def bump(_):
        count[0] += 1

    estimator = made(name, kitchen_sink(bump))
    init, theta = jax.jit(estimator.init), jax.tree.map(jnp.asarray, theta_of_all_kinds())
    calls, workers = keys()

    def run(worker, start, keys):
        state, done = init(start, theta), []
        for i, key in enumerate(keys):
            count[0] = 0
            data = data_of(i, estimator, worker)
            estimate, after = estimator.estimate(key, theta, state, data=data)
            jax.effects_barrier()
            done.append(Call(key, data, state, estimate, after, count[0]))
            state = after
        return done

    others = [run(w, workers[-1][w], [k[w] for k in workers[:-1]]) for w in range(WORKERS)]
    return Alone(estimator, init, theta, run(0, KEY, calls), others)


def run_sharded(name):
    mesh = ug.make_worker_mesh(8)
    many = ug.average(made(name, kitchen_sink()), WORKERS, mesh=mesh)
    theta = jax.device_put(theta_of_all_kinds(), NamedSharding(mesh, P()))
    state, done, compiled = many.init(KEY, theta), [], None
    for i, key in enumerate(keys()[0][:CALLS]):
        data = data_of(i, many)
        if compiled is None:  # compiled ahead: any other shape, dtype or sharding is an error
            compiled = jax.jit(many.estimate).lower(key, theta, state, data=data).compile()
        estimate, after = compiled(key, theta, state, data=data)
        done.append(Call(key, data, state, estimate, after, 0))
        # Under a separate `jit` XLA puts results of size 0 on every device.
        state = jax.tree.map(
            lambda new, old: new if new.size else jax.device_put(new, old.sharding), after, state
        )
    assert compiled is not None
    return Sharded(mesh, theta, done, compiled)


@functools.cache
def ran(name) -> Ran:
    keys()
    theta_of_all_kinds()
    with counted() as programs:
        alone = run_alone(name)
        first = programs[0]
        sharded = run_sharded(name)
    return Ran(alone, sharded, [first, programs[0] - first])


@functools.cache
def whole_loop():
    """Runs every worker's first episode as one loop; returns its loss and its steps' draws."""
    problem, theta = kitchen_sink(), theta_of_all_kinds()

    def one(key, data):
        segment = Segment(problem, unroll.new_episode(problem.horizon, key, HORIZON), HORIZON, data)
        state = unroll.initial_state(problem, segment.episode, theta)
        after, _ = unroll.unroll(segment, theta, state)
        return ug.episode_loss(problem, key, theta, data=data), after["drawn"]

    return jax.jit(jax.vmap(one))(jnp.stack(keys()[1][0]), DATA)


@functools.cache
def exact_gradient(num_steps: int):
    """The mean gradient of the first windows of ``episode_keys``' episodes, by backpropagation.

    A window contributes its mean loss, and the evaluation at its end as often as an episode has
    windows.
    """
    problem, theta = kitchen_sink(), theta_of_all_kinds()
    evaluate, scale = present(problem.evaluate), HORIZON // num_steps
    first = problem._replace(horizon=num_steps, evaluate=lambda *args: scale * evaluate(*args))

    def loss(theta, keys):
        def one(key, data):
            return ug.episode_loss(first, key, theta, data=data)

        return jnp.mean(jax.vmap(lambda keys: jax.vmap(one)(keys, DATA[:, :num_steps]))(keys))

    return numbers(jax.jit(jax.grad(loss))(theta, episode_keys()[1]))


def in_state(state, name):
    """The leaves with this name of the inner states in a worker state, at any depth."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in found if f"['{name}']" in jax.tree_util.keystr(path)]


def assert_equal(a, b):
    """Asserts the same structure and the same bits."""
    chex.assert_trees_all_equal(numbers(a), numbers(b), strict=True)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(numbers(a), numbers(b), rtol=rtol, atol=atol)


@every
def test_a_row_costs_four_programs(name):
    """``init`` and ``estimate`` compile once alone, for 72 calls, and once on a mesh."""
    assert ran(name).programs == [2, 2]


@every
def test_states_keep_their_types(name):
    alone, sharded, _ = ran(name)
    for call in [*alone.calls, *sharded.calls]:
        assert jax.tree.structure(call.before) == jax.tree.structure(call.after)
        assert types(call.before) == types(call.after)
        assert call.estimate.loss.shape == ()
        assert call.estimate.loss.dtype == jnp.float32
        assert call.estimate.info.inner_steps.dtype == jnp.int32
    for call in alone.calls:
        assert types(alone.theta) == types(call.estimate.grad)
    assert jax.tree.structure(alone.theta) == jax.tree.structure(alone.calls[0].estimate.grad)


@every
def test_eval_shape_of_init(name):
    alone, state = ran(name).alone, ran(name).alone.calls[0].before
    abstract = jax.eval_shape(alone.estimator.init, KEY, alone.theta)
    chex.assert_trees_all_equal_structs(abstract, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)


@every
def test_argument_names(name):
    estimator = ran(name).alone.estimator
    for one in [estimator, ug.average(estimator, 3)]:
        assert list(inspect.signature(one.init).parameters) == ["key", "theta"]
        parameters = inspect.signature(one.estimate).parameters
        assert list(parameters) == ["key", "theta", "state", "data"]
        assert parameters["data"].default is None
        assert parameters["data"].kind is inspect.Parameter.KEYWORD_ONLY
        assert one.truncation in (None, TRUNCATION)
    factory = inspect.signature(REGISTRY[name].factory).parameters
    assert next(iter(factory)) == "problem"
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(factory.values())[1:])


@every
def test_the_same_key_replays_and_another_does_not(name):
    alone = ran(name).alone
    first, second = alone.calls[:2]

    def again(key, state):
        return alone.estimator.estimate(key, alone.theta, state, data=first.data)

    assert_equal((first.estimate, first.after), again(first.key, first.before))
    # The inner state before an episode is a placeholder: its numbers change nothing.
    placeholder = alone.init(OTHER, alone.theta)
    assert_equal((first.estimate, first.after), again(first.key, placeholder))
    other, _ = again(OTHER, first.before)
    assert float(other.loss) != float(first.estimate.loss)
    assert float(second.estimate.loss) != float(first.estimate.loss)


@every
def test_episodes_begin_at_the_start_of_a_call(name):
    alone = ran(name).alone
    k = call_steps(alone.estimator, kitchen_sink())
    windows = HORIZON // k
    for i, call in enumerate(alone.calls):
        place = i % windows
        assert int(call.before.episode.t) == place * k
        assert int(call.after.episode.t) == (place + 1) % windows * k
        assert_equal(call.after.episode.key, keys()[0][i - place])


@every
def test_later_keys_of_an_episode_change_nothing(name):
    alone = ran(name).alone
    if alone.estimator.truncation is None:  # every call begins an episode: its key decides
        assert all(int(call.after.episode.t) == 0 for call in alone.calls)
        return
    call = alone.calls[1]
    again = alone.estimator.estimate(OTHER, alone.theta, call.before, data=call.data)
    assert_equal((call.estimate, call.after), again)


def restored_from_host(state, like):
    """The state as a file would restore it: numpy arrays in the abstract state's structure."""

    def leaf(saved, like):
        is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(saved) if is_key else jnp.asarray(saved)

    def raw(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(leaf, jax.tree.map(raw, state), like)


@every
def test_a_saved_state_continues_bit_for_bit(name):
    """In the middle of an episode, from numpy arrays, from its leaves, and from a pickle."""
    alone = ran(name).alone
    call = alone.calls[2]
    leaves, structure = jax.tree.flatten(call.before)
    abstract = jax.eval_shape(alone.estimator.init, KEY, alone.theta)
    for again in [
        restored_from_host(call.before, abstract),
        structure.unflatten(leaves),
        pickle.loads(pickle.dumps(call.before)),
    ]:
        assert types(again) == types(call.before)
        assert jax.tree.structure(again) == structure
        out = alone.estimator.estimate(call.key, alone.theta, again, data=call.data)
        assert_equal((call.estimate, call.after), out)


@every
def test_inner_steps_are_those_that_run(name):
    """A callback in the step counts both signs and the mean pass, but no backward steps.

    To go back through ``init``, ``uoro`` runs an episode's first step once more, which is part of
    going back.
    """
    alone, sharded, _ = ran(name)
    steps = call_steps(alone.estimator, kitchen_sink())
    expected = REGISTRY[name].passes(PAIRS) * steps
    for i, call in enumerate(alone.calls):
        again = name == "uoro" and i * steps % HORIZON == 0
        assert int(call.estimate.info.inner_steps) == expected
        assert call.ran == expected + again
    assert int(sharded.calls[0].estimate.info.inner_steps) == WORKERS * expected


@every
def test_steps_are_those_of_the_whole_loop(name):
    """Windows use the same keys, data slices and losses as the plain loop."""
    alone = ran(name).alone
    losses, drawn = whole_loop()
    rows = np.asarray(drawn).reshape(-1, 3)
    assert len(np.unique(rows, axis=0)) == len(rows)  # every step of every worker has its own draw
    for w, calls in enumerate(alone.others[:4]):
        for place, call in enumerate(calls):
            steps = (place + 1) * TRUNCATION
            found = in_state(call.after, "drawn")
            assert bool(found) == (alone.estimator.truncation is not None)
            for leaf in found:
                seen = np.asarray(leaf).reshape(-1, HORIZON, 3)
                for each in seen:
                    np.testing.assert_array_equal(each[:steps], drawn[w, :steps])
            for leaf in in_state(call.after, "n"):
                np.testing.assert_array_equal(leaf, np.full(leaf.shape, steps))
    # The lone worker's first episode began from its own key; this is its windows' mean loss.
    per_episode = HORIZON // call_steps(alone.estimator, kitchen_sink())
    mean = np.mean([call.estimate.loss for call in alone.calls[:per_episode]])
    np.testing.assert_allclose(mean, first_loss(), rtol=5e-3)  # sigma changes it by 1e-3
    if alone.estimator.truncation is None:
        firsts = [calls[0].estimate.loss for calls in alone.others]
        np.testing.assert_allclose(np.mean(firsts), np.mean(losses), rtol=5e-3)


@functools.cache
def first_loss():
    """The loss of the lone worker's first episode, run as one loop."""
    problem, theta = kitchen_sink(), theta_of_all_kinds()
    loss = jax.jit(lambda data: ug.episode_loss(problem, keys()[0][0], theta, data=data))
    first = float(loss(DATA[0]))
    for wrong in [DATA[0][::-1], np.roll(DATA[0], 1, axis=0), DATA[1]]:  # the order matters
        assert abs(float(loss(wrong)) - first) > 0.02 * first
    return first


@every
def test_the_gradient_of_the_first_window(name):
    """All estimators agree there: each leaf of the mean is close to backpropagation's.

    A dropped leaf would be wrong by its norm, a wrong sign by twice its norm, a missing 1/K by four
    times its norm; ``test_statistics.py`` has the exact tests.
    """
    alone, sharded, _ = ran(name)
    exact = exact_gradient(call_steps(alone.estimator, kitchen_sink()))
    got = mean([numbers(grad) for grad in sharded.firsts()])
    named = jax.tree_util.tree_leaves_with_path(exact)
    for (path, wanted), leaf in zip(named, jax.tree.leaves(got), strict=True):
        gap = np.linalg.norm(leaf - wanted) / np.linalg.norm(wanted)
        assert gap < 0.3, jax.tree_util.keystr(path)


def mean(estimates):
    return jax.tree.map(
        lambda *x: np.mean([np.asarray(v, np.float64) for v in x], axis=0), *estimates
    )


@every
def test_a_mesh_gives_the_mean_of_lone_workers(name):
    """All draws are bit-equal; losses and gradients agree up to rounding."""
    alone, sharded, _ = ran(name)
    for i, call in enumerate(sharded.calls):
        each = [calls[i] for calls in alone.others]
        grad, loss = mean([(c.estimate.grad, c.estimate.loss) for c in each])
        got = numbers(call.estimate.grad)
        # In bfloat16 the lone gradients are rounded before the mean, the mesh's after it.
        assert_close(got.pop("start"), grad.pop("start"), rtol=1e-2, atol=2e-2)
        assert_close(got, grad, rtol=1e-4, atol=1e-5)
        assert_close(call.estimate.loss, loss, rtol=1e-5)
        assert int(call.estimate.info.num_nonfinite) == 0
        states = [c.after for c in each]
        assert bool(in_state(call.after, "drawn")) == (alone.estimator.truncation is not None)
        for leaf in ("drawn", "n", "seen", "key"):
            wanted = zip(*(in_state(numbers(state), leaf) for state in states), strict=True)
            for a, b in zip(in_state(numbers(call.after), leaf), wanted, strict=True):
                np.testing.assert_array_equal(a, np.stack(b))
        episodes = [numbers(state.episode) for state in states]
        assert_equal(call.after.episode, jax.tree.map(lambda *x: np.stack(x), *episodes))


@every
def test_a_saved_state_of_many_workers_continues_bit_for_bit(name):
    """From numpy arrays, placed on their devices, and from a pickle, in the same executable."""
    sharded = ran(name).sharded
    call = sharded.calls[1]
    restored = restored_from_host(call.before, call.before)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), restored, call.before)
    for again in [placed, pickle.loads(pickle.dumps(call.before))]:
        out = sharded.compiled(call.key, sharded.theta, again, data=call.data)
        assert_equal((call.estimate, call.after), out)


@every
def test_a_mesh_shards_states_and_reduces_once(name):
    """The executable contains one all-reduce and no other collective."""
    sharded = ran(name).sharded
    for call in sharded.calls:
        assert all(g.is_fully_replicated for g in jax.tree.leaves(call.estimate))
        workers = NamedSharding(sharded.mesh, P("workers"))
        for leaf in [x for x in jax.tree.leaves(call.after) if x.size]:
            assert leaf.sharding.is_equivalent_to(workers, leaf.ndim)
    other = "all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    assert len(re.findall(r" all-reduce(?:-start)?\(", sharded.compiled.as_text())) == 1
    assert len(re.findall(other, sharded.compiled.as_text())) == 0


@every
def test_raw_keys_are_typed_at_the_door(name):
    alone = ran(name).alone
    call, raw = alone.calls[0], jax.random.key_data(KEY)
    assert jax.eval_shape(alone.estimator.init, raw, alone.theta) == jax.eval_shape(
        alone.estimator.init, KEY, alone.theta
    )
    typed, untyped = (
        jax.eval_shape(alone.estimator.estimate, key, alone.theta, call.before, data=call.data)
        for key in (KEY, raw)
    )
    assert typed == untyped


def test_raw_keys_give_the_same_numbers():
    problem, theta = quadratic()
    for estimator in [build("pes", problem), ug.average(build("pes", problem), 3)]:
        raw = jax.random.key_data(KEY)
        state = estimator.init(raw, theta)
        assert_equal(state, estimator.init(KEY, theta))
        assert_equal(estimator.estimate(raw, theta, state), estimator.estimate(KEY, theta, state))


def test_states_survive_orbax(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    alone = ran("pes").alone
    call = alone.calls[2]

    def as_data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    def filled(tree):
        """The leaves except those of size 0, which orbax does not write."""
        return [as_data(x) for x in jax.tree.leaves(tree) if np.size(x)]

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", filled(call.before))
        checkpointer.wait_until_finished()
        saved = iter(checkpointer.restore(tmp_path / "state", filled(alone.calls[0].before)))
    leaves, structure = jax.tree.flatten(call.before)
    leaves = [jnp.asarray(next(saved) if np.size(x) else as_data(x)) for x in leaves]
    again = structure.unflatten(
        [jax.random.wrap_key_data(x) if x.dtype == np.uint32 else x for x in leaves]
    )
    assert_equal(call.before, again)
    out = alone.estimator.estimate(call.key, alone.theta, again, data=call.data)
    assert_equal((call.estimate, call.after), out)


def test_python_numbers_are_theta():
    problem, _ = ug.problems.influence_balancing(horizon=20)
    estimator = ug.pes(problem, truncation=5, sigma=0.1)
    state = jax.eval_shape(estimator.init, KEY, 0.5)
    estimate, _ = jax.eval_shape(estimator.estimate, KEY, 0.5, state)
    assert estimate.grad.shape == ()
    assert estimate.grad.dtype == jnp.float32
    assert not estimate.grad.weak_type


def equinox_mlp():
    arrays, static = eqx.partition(eqx.nn.MLP(2, 1, 4, 1, key=KEY), eqx.is_array)
    return arrays, lambda params, x: eqx.combine(params, static)(x)


def flax_mlp():
    graph, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


MODELS = {"equinox": equinox_mlp, "flax": flax_mlp}


@functools.cache
def training(model):
    params, predict = MODELS[model]()
    return ug.training_problem(
        loss=lambda theta, params, batch, key: jnp.mean(
            (jax.vmap(partial(predict, params))(batch) - 1.0) ** 2
        ),
        init_params=lambda key: params,
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta), momentum=0.9),
        sample_batch=lambda key: jax.random.uniform(key, (8, 2)),
        horizon=10,
    )


@every
@pytest.mark.parametrize("model", MODELS)
def test_params_of_equinox_and_flax(model, name):
    """They keep their classes; gpes runs with flax, two other estimators with equinox."""
    estimator, theta = build(name, training(model)), jnp.float32(-3.0)
    state = jax.eval_shape(estimator.init, KEY, theta)
    estimate, after = jax.eval_shape(estimator.estimate, KEY, theta, state)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert estimate.grad == jax.eval_shape(lambda: theta)
    if (name, model) in [("gpes", "flax"), ("tbptt", "equinox"), ("dodge", "equinox")]:
        state = jax.jit(estimator.init)(KEY, theta)
        grad = estimator.estimate(OTHER, theta, state)[0].grad
        assert np.isfinite(float(grad))
        assert float(grad) != 0


@taking("sigma", same_code=["pes", "es_single", "pes_analytic_replacement"])
def test_sigma_may_be_traced_and_a_prefix(name):
    """A tree of equal traced sigmas equals one number; a leaf's own sigma changes that leaf."""
    alone = ran(name).alone
    first = alone.calls[0]

    @jax.jit
    def run(sigma):
        estimator = REGISTRY[name].build(
            kitchen_sink(), truncation=TRUNCATION, sigma=sigma, noise_period=10, num_pairs=PAIRS
        )
        state = first.before
        return estimator.estimate(first.key, alone.theta, state, data=first.data)[0].grad

    def sigmas(pull):
        return {"rates": (SIGMA, [np.full(2, pull, np.float32), None], ()), "start": SIGMA}

    def pull(grad):
        return np.asarray(grad["rates"][1][0])

    same, other = run(sigmas(SIGMA)), run(sigmas(3 * SIGMA))
    assert_close(same, first.estimate.grad, rtol=2e-3, atol=2e-3)
    rounding = np.abs(pull(same) - pull(first.estimate.grad)).max()
    moved = np.abs(pull(other) - pull(same)).max()
    assert moved > max(10 * rounding, 1e-4)


def test_sigma_may_be_a_tree_of_numbers():
    problem, theta = quadratic()
    grads = []
    for start in [None, 0.1, np.full(3, 0.1)]:
        sigma = 0.1 if start is None else {"log_rate": 0.1, "start": start}
        estimator = ug.pes(problem, truncation=5, sigma=sigma)
        state = jax.jit(estimator.init)(KEY, theta)
        grads.append(estimator.estimate(OTHER, theta, state)[0].grad)
    assert_equal(grads[0], grads[1])
    assert_close(grads[0], grads[2])


def test_sigma_may_change_inside_an_episode():
    """The accumulator is in units of sigma, so that a new sigma does not change its content."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=4, memory=1.0)

    @jax.jit
    def run(state, sigma):
        return ug.pes(problem, truncation=2, sigma=sigma).estimate(OTHER, theta, state)[1]

    state = ug.pes(problem, truncation=2, sigma=0.1).init(KEY, theta)
    for sigma in [0.1, 0.4]:
        state = run(state, sigma)
    law, noise = ug.noise.gaussian(), jax.random.fold_in(OTHER, 2)
    units: list[Any] = [law.sample(jax.random.fold_in(noise, j), (), theta, 1) for j in range(2)]
    np.testing.assert_allclose(state.carried.accumulated, sum(units), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_a_sampled_horizon_of_a_narrow_dtype(dtype):
    problem, theta = quadratic()
    narrow = problem._replace(horizon=lambda key: dtype(120))
    begin = jax.jit(build("pes", narrow, truncation=50).init)
    assert int(begin(KEY, theta).episode.horizon) == 150


@taking("noise", same_code=["pes"])
def test_bf16_uses_the_realised_difference(name, optimized):
    """On a linear loss the estimate is exact given the perturbation after rounding to bf16.

    XLA's optimizations are on, since they may drop a cast and its inverse.
    """
    theta = jnp.ones(64, jnp.bfloat16)
    slope = np.random.default_rng(0).normal(size=64).astype(np.float32)

    def step(key, theta, state, t):
        return state, slope @ (theta.astype(jnp.float32) - 1)

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 1)
    sigma = 0.02  # bf16 near 1 resolves 1/128 above and 1/256 below: most of eps is rounded
    estimator = build(name, problem, truncation=1, noise_period=1, sigma=sigma, num_pairs=1)
    run = jax.jit(lambda: estimator.estimate(OTHER, theta, estimator.init(KEY, theta))[0])
    estimate = run()
    noise = jax.random.fold_in(jax.random.fold_in(OTHER, 2), 0)
    unit = np.asarray(ug.noise.gaussian().sample(noise, (), theta, 1)[0], np.float32)
    up = (1 + sigma * unit).astype(jnp.bfloat16).astype(np.float32)
    down = (1 - sigma * unit).astype(jnp.bfloat16).astype(np.float32)
    realised = (up - down) / (2 * sigma)
    expected = realised * (slope @ realised)
    grad = numbers(estimate.grad)
    np.testing.assert_allclose(grad, expected, rtol=1e-2, atol=1e-2)
    intended = unit * (slope @ realised)
    assert np.abs(realised - unit).max() > 0.05
    assert not np.allclose(grad, intended, rtol=1e-2, atol=1e-2)
    # XLA may drop a cast and its inverse, but not this.
    assert "reduce_precision[exponent_bits=8 mantissa_bits=7]" in str(jax.make_jaxpr(run)())


def test_the_difference_of_bf16_signs_has_more_than_8_bits():
    both = jnp.asarray([[256.0, 1.0], [-0.00390625, 3.0]], jnp.bfloat16)  # (plus and minus, 2)
    difference = _pairs.difference(both, 0.5)
    assert isinstance(difference, jax.Array)
    assert difference.dtype == jnp.float32
    np.testing.assert_array_equal(difference, [[256.00390625, -2.0]])


@pytest.mark.parametrize("name", ["full_es", "truncated_es", "es_single", "pes"])
def test_the_thetas_of_a_pair(name):
    """The registry has the peak memory: both signs, noise, accumulator; theta and grad apart."""
    num_pairs, theta = 16, jnp.zeros(100_000)

    def step(key, theta, state, t):
        state = 0.5 * state + jnp.mean(theta)
        return state, (state - 1) ** 2

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 4)
    estimator = REGISTRY[name].build(problem, truncation=2, sigma=0.1, num_pairs=num_pairs)
    args = KEY, theta, jax.eval_shape(estimator.init, KEY, theta)
    plan = present(
        jax.jit(estimator.estimate, donate_argnums=2).lower(*args).compile().memory_analysis()
    )
    given = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    peak = (given + plan.temp_size_in_bytes) / theta.nbytes - 2
    per_pair = int(present(re.search(r"(\d)NP", REGISTRY[name].memory))[1])
    assert abs(peak / num_pairs - per_pair) < 0.3
