"""``update``: its arguments, the meta-steps that it skips, and where it runs."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import unrollgrad as ug
from tests.helpers import mistyped, present, raises
from unrollgrad import apo

BOTH = ["learning_rate", "preconditioner"]


def make(name, **changes):
    if name == "learning_rate":
        return apo.learning_rate(optax.adam, 0.01, **changes)
    return apo.preconditioner(0.01, **changes)


def predict(w, batch):
    hidden = jnp.tanh(batch["x"] @ w["first"] + w["shift"])
    return hidden @ w["second"]


def loss(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(predict(w, batch), batch["y"]).mean()


def weights(dtype=jnp.float32):
    draws = np.random.default_rng(0)
    w = {"first": draws.normal(size=(6, 5)), "shift": np.zeros(5)}
    w["second"] = draws.normal(size=(5, 3))
    return {name: x.astype(dtype) for name, x in w.items()}


def batch(seed, size=16):
    draws = np.random.default_rng(seed)
    return {"x": draws.normal(size=(size, 6)).astype(np.float32), "y": draws.integers(3, size=size)}


def batches(i):
    return {"batch": batch(2 * i), "other_batch": batch(2 * i + 1)}


def extra(i):
    return {"loss": loss, "predict": predict, **batches(i)}


def first_gradient(of=loss):
    """The gradient at the weights of the first batch."""
    return jax.jit(jax.grad(of))(weights(), batch(0))


def train(optimizer, num_steps, w=None):
    """Returns the weights and the states after every step."""
    w = weights() if w is None else w
    states = [jax.jit(optimizer.init)(w)]

    @jax.jit
    def step(w, state, given):
        gradient = jax.grad(loss)(w, given["batch"])
        arguments = {"loss": loss, "predict": predict, **given}
        updates, state = optimizer.update(gradient, state, w, **arguments)
        return optax.apply_updates(w, updates), state

    for i in range(num_steps):
        w, state = step(w, states[-1], batches(i))
        states.append(state)
    return w, states


def hyperparams(state):
    return jax.tree.leaves(optax.tree.get(state, "hyperparams"))


def changed(before, after):
    """For each leaf, whether any of its numbers differs."""
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [bool(np.any(np.asarray(x) != np.asarray(y))) for x, y in leaves]


@pytest.mark.parametrize("name", BOTH)
def test_missing_arguments(name):
    optimizer, w, given = make(name), weights(), extra(0)
    state = jax.eval_shape(optimizer.init, w)

    def update(params=w, **given):
        jax.eval_shape(lambda g, s: optimizer.update(g, s, params, **given), w, state)

    with raises(ValueError, f"`apo.{name}` is missing `params` (the weights)"):
        update(None, **given)
    for key in given:
        some = {k: v for k, v in given.items() if k != key}
        with raises(ValueError, f"is missing `{key}` (", "update(updates, state, params, loss=..."):
            update(**some)
    with raises(TypeError, "`predict` must be a function, predict(params, other_batch)"):
        update(**given | {"predict": w})
    with raises(ValueError, "the loss of `loss` must be a scalar; got shape (16,)"):
        update(**given | {"loss": lambda w, b: b["x"][:, 0]})
    with raises(ValueError, "must be a scalar; got a tuple. Return the loss alone"):
        update(**given | {"loss": lambda w, b: (loss(w, b), {})})


@pytest.mark.parametrize("name", BOTH)
def test_discrepancies(name):
    """Scalars and other real outputs are allowed; the error names any other output."""
    w = weights()

    def update(w, discrepancy, predict):
        optimizer, given = make(name, discrepancy=discrepancy), extra(0) | {"predict": predict}
        state = optimizer.update(w, optimizer.init(w), w, **given)[1]
        return optax.tree.get(state, "total_notfinite")

    @jax.jit
    def counts(w):
        def square(a, b):
            return jnp.mean((a["y"] - b["y"]) ** 2)

        def undefined(a, b):
            return jnp.log(-1 - jnp.sum((a - b) ** 2))

        whole = update(w, square, lambda w, b: {"y": predict(w, b)})
        return whole, update(w, undefined, predict)

    assert [int(x) for x in counts(w)] == [0, 1]
    for bad in (lambda a, b: {"d": a}, lambda a, b: a + 1j, lambda a, b: "a"):
        with raises(TypeError, "`discrepancy` must return a real array; got"):
            jax.eval_shape(lambda w: update(w, bad, predict), w)  # noqa: B023


@pytest.mark.parametrize("name", BOTH)
def test_only_what_is_needed(name):
    """Predictions are needed only for a discrepancy, the loss only if it is not linearised."""
    given = extra(0)
    of_the_loss = {"loss": loss, "batch": given["batch"]}
    of_the_outputs = {"predict": predict, "other_batch": given["other_batch"]}

    @jax.jit
    def found(w):
        gradient, pairs = jax.grad(loss)(w, given["batch"]), []
        for changes, needed in (
            ({"lambda_fsd": 0.0, "discrepancy": None}, of_the_loss),
            ({"linearised": True}, of_the_outputs),
        ):
            optimizer = make(name, **changes)
            state = optimizer.init(w)
            pairs.append([hyperparams(state)])
            for arguments in (needed, given):
                new = optimizer.update(gradient, state, w, **arguments)[1]
                pairs[-1].append(hyperparams(new))
        return pairs

    for begin, with_needed, with_all in found(weights()):
        assert np.any(with_needed[0] != np.asarray(begin[0]))
        chex.assert_trees_all_equal(with_needed, with_all)  # unneeded arguments change nothing


@pytest.mark.parametrize("name", BOTH)
def test_bad_settings(name):
    for key in ("lambda_fsd", "lambda_wsd"):
        for value in (-0.1, float("nan"), float("inf")):
            with raises(ValueError, f"`{key}` must be at least 0 and finite; got {value}"):
                make(name, **{key: value})
        for value in (None, "1", np.ones(1), optax.sgd):
            with raises(TypeError, f"`{key}` must be a number; got"):
                make(name, **{key: value})
    with raises(TypeError, "`discrepancy` must be a function", "apo.kl_divergence"):
        make(name, discrepancy=None)
    with raises(TypeError, "`meta_optimizer` must be an optax transform; got a float"):
        make(name, meta_optimizer=0.1)
    with raises(ValueError, "`meta_interval` must be at least 1"):
        make(name, meta_interval=0)
    with raises(TypeError, "params['n'] is int32[2]", "Train the floating leaves alone"):
        jax.eval_shape(make(name).init, {"n": np.arange(2, dtype=np.int32), "w": np.zeros(3)})


def test_bad_bases_and_rates():
    with raises(TypeError, "`base` must be a function of the hyperparameters", "optax.adam"):
        apo.learning_rate(mistyped(optax.adam(0.1)), 0.1)
    with raises(ValueError, "'learning_rate'", "0 < value < inf", "got -0.1"):
        apo.learning_rate(optax.sgd, -0.1)
    for first in (None, {}):
        with raises(ValueError, "`initial` has no numbers"):
            apo.learning_rate(optax.sgd, first)
    with raises(TypeError, "`base` must return an optax transform; got a"):
        apo.learning_rate(lambda rate: rate, 0.1).init(weights())
    for rate in (0.0, -1.0, float("nan")):
        with raises(ValueError, "`initial_rate` must be"):
            apo.preconditioner(rate)
    with raises(TypeError, "`initial_rate` must be a number"):
        apo.preconditioner(mistyped(optax.sgd))


def test_leaves_without_a_rule():
    def rule(path, leaf):
        return apo.dense() if path.endswith("['shift']") else None

    with raises(ValueError, "no structure for params['first']", "returned None", "apo.kronecker()"):
        jax.eval_shape(apo.preconditioner(0.1, structure=rule).init, weights())
    for structure in ("dense", apo.dense):
        with raises(TypeError, "`structure` must be a Structure", "dense"):
            apo.preconditioner(0.1, structure=mistyped(structure))
    with raises(ValueError, "apo.dense() for float32[200,200] would keep 40000 x 40000", "6 GiB"):
        wide = jax.ShapeDtypeStruct((200, 200), jnp.float32)
        jax.eval_shape(apo.preconditioner(0.1, structure=apo.dense()).init, wide)
    turns, w = iter([apo.kronecker(), apo.diagonal()]), np.ones((2, 2), np.float32)
    fickle = apo.preconditioner(
        0.1, lambda_fsd=0, linearised=True, structure=lambda path, leaf: next(turns)
    )
    with raises(ValueError, "the structure of params is not the one of `init`"):
        jax.eval_shape(fickle.update, w, jax.eval_shape(fickle.init, w), w)


@pytest.mark.parametrize("name", BOTH)
def test_masked_weights(name):
    """A mask around the method is refused; a mask inside it keeps frozen leaves fixed."""
    w = weights()
    mask = {"first": True, "shift": True, "second": False}
    with raises(ValueError, "params have masked leaves", "apo.frozen()"):
        jax.eval_shape(optax.masked(make(name), mask).init, w)

    def base(rate):
        frozen = optax.masked(optax.set_to_zero(), {k: not v for k, v in mask.items()})
        return optax.chain(optax.sgd(rate), frozen)

    def rule(path, leaf):
        return apo.frozen() if "second" in path else apo.diagonal()

    optimizer = {
        "learning_rate": lambda: apo.learning_rate(base, 0.1),
        "preconditioner": lambda: apo.preconditioner(0.1, structure=rule),
    }[name]()
    moved, _ = train(optimizer, 2)
    np.testing.assert_array_equal(moved["second"], w["second"])
    assert np.any(np.asarray(moved["first"]) != w["first"])


@pytest.mark.parametrize("name", BOTH)
def test_the_state_may_be_donated(name):
    """An update may donate a state that is initialised again for another seed."""
    optimizer, given = make(name), extra(0)
    init = jax.jit(optimizer.init)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state):
        gradient = jax.grad(loss)(w, given["batch"])
        updates, state = optimizer.update(gradient, state, w, **given)
        return optax.apply_updates(w, updates), state

    ends = []
    for _ in range(2):
        w = jax.device_put(weights())
        w, state = step(w, init(w))
        ends.append(step(w, state))
    chex.assert_trees_all_equal(*ends)


@functools.cache
def growth():
    """The growth of a learning rate in five meta-steps, by initial rate and scale of the loss."""

    @jax.jit
    def grown(rate, scale):
        def scaled(w, b):
            return scale * loss(w, b)

        optimizer = apo.learning_rate(optax.sgd, rate, lambda_fsd=0.0, meta_interval=1)
        w = weights()
        gradient = jax.grad(scaled)(w, batch(0))

        def step(state, _):
            return optimizer.update(gradient, state, w, loss=scaled, batch=batch(0))[1], None

        state, _ = jax.lax.scan(step, optimizer.init(w), length=5)
        return jnp.log(optax.tree.get(state, "learning_rate") / rate)

    return grown


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_the_default_meta_steps_are_relative(rate, scale):
    """A rate changes about 10 % per meta-step, whatever its size and the units of the loss."""
    # The sum exceeds 0.5 since the meta-gradient grows with the rate.
    assert 0.5 < float(growth()(rate, scale)) < 0.56


def test_a_structure_for_each_leaf():
    def rule(path, leaf):
        return {"first": apo.kronecker(), "shift": apo.dense(), "second": apo.identity()}[
            path[2:-2]
        ]

    _, states = train(apo.preconditioner(0.1, structure=rule), 3)
    first, factors = (optax.tree.get(states[i], "preconditioner") for i in (0, -1))
    assert {k: sorted(v) for k, v in factors.items()} == {
        "first": ["a", "b", "s"],
        "shift": ["f"],
        "second": ["s"],
    }
    assert all(changed(first, factors))


@pytest.mark.parametrize("name", BOTH)
def test_meta_steps_that_are_not_finite_are_skipped_and_counted(name):
    """The loss is NaN at first and finite later."""
    optimizer, w, gradient = make(name, meta_interval=1), weights(), first_gradient()

    @jax.jit
    def update(state, right):
        def of(w, b):
            return jnp.where(right, loss(w, b), jnp.log(-jnp.sum(w["first"] ** 2)))

        return optimizer.update(gradient, state, w, **extra(0) | {"loss": of})

    state = jax.jit(optimizer.init)(w)
    before = hyperparams(state)
    for i in range(3):
        updates, state = update(state, False)
        assert int(optax.tree.get(state, "total_notfinite")) == i + 1
        chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_close(before, hyperparams(state), rtol=1e-6)
    _, state = update(state, True)
    assert int(optax.tree.get(state, "total_notfinite")) == 3
    assert changed(before, hyperparams(state))[0]


@pytest.mark.parametrize("name", BOTH)
def test_meta_steps_are_at_the_interval(name):
    _, states = train(make(name, meta_interval=3), 7)
    moved = [
        any(changed(hyperparams(a), hyperparams(b))) for a, b in itertools.pairwise(states[1:])
    ]
    assert moved == [False, False, True, False, False, True]


def test_the_state_of_the_base_is_not_copied():
    """The meta-step reads Adam's moments before the step overwrites them in place."""
    w, x = np.ones((256, 256), np.float32), np.ones((2, 256), np.float32)

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    def planned(base):
        optimizer = apo.learning_rate(base, 1e-3, discrepancy=apo.squared_error)

        def step(w, state):
            given = {"loss": loss, "predict": lambda w, x: x @ w, "batch": x, "other_batch": x}
            updates, state = optimizer.update(jax.grad(loss)(w, x), state, w, **given)
            return optax.apply_updates(w, updates), state

        program = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(w, jax.eval_shape(optimizer.init, w))
            .compile()
        )
        return present(program.memory_analysis()).temp_size_in_bytes / w.nbytes

    assert planned(optax.adam) < planned(optax.sgd) + 1.5  # 3 with two copied moments


@pytest.mark.parametrize("name", BOTH)
def test_trains_in_a_chain_compiled_once(name):
    """In a chain after clipping, the state keeps its structure and dtypes, and the loss falls."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), make(name, meta_interval=2))
    w = weights()
    state = jax.jit(optimizer.init)(w)
    assert jax.tree.structure(jax.eval_shape(optimizer.init, w)) == jax.tree.structure(state)
    traces, value = [], jax.jit(loss)

    @jax.jit
    def step(w, state):
        traces.append(1)
        gradient = jax.grad(loss)(w, batch(0))
        updates, state = optimizer.update(gradient, state, w, **extra(0))
        return optax.apply_updates(w, updates), state

    begin = value(w, batch(0))
    w, state = step(jax.device_put(w), state)
    for _ in range(19):
        w, new = step(w, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert len(traces) == 1
    assert value(w, batch(0)) < begin
    assert optax.tree.get(state, "hyperparams") is not None


def test_current_values_by_name():
    _, states = train(apo.learning_rate(optax.adam, 0.01), 2)
    rate = optax.tree.get(states[-1], "learning_rate")
    assert rate.dtype == jnp.float32
    assert 0.01 < rate < 0.02

    def base(h):
        return optax.sgd(h["learning_rate"], momentum=h["momentum"])

    kinds = {"learning_rate": ug.constraints.positive, "momentum": ug.constraints.unit_interval}
    first = {"learning_rate": 0.01, "momentum": 0.9}
    _, states = train(apo.learning_rate(base, first, constraints=kinds, meta_interval=1), 20)
    state = states[-1]
    assert optax.tree.get(state, "learning_rate") != 0.01
    assert 0 < optax.tree.get(state, "momentum") < 1
    assert optax.tree.get(state, "momentum") != 0.9


def test_injected_hyperparameters_follow():
    """They follow the updates; optax alone would keep the values of ``init``."""

    def base(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

    @jax.jit
    def both(w):
        gradient, found = jax.grad(loss)(w, batch(0)), []
        for optimizer in (apo.learning_rate(base, 0.1), apo.learning_rate(optax.sgd, 0.1)):
            begun = optimizer.init(w)
            found.append((begun, *optimizer.update(gradient, begun, w, **extra(0))))
        return found

    (injected, updates, _), (_, expected, state) = both(weights())
    assert state.hyperparams["learning_rate"] != 0.1
    kept = optax.tree.get(injected, "ApoState").hyperparams["learning_rate"]
    np.testing.assert_allclose(kept, 0.1, rtol=1e-6)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_extra_arguments_reach_the_base():
    """optax.polyak_sgd needs the value of the loss."""
    optimizer = apo.learning_rate(lambda scale: optax.polyak_sgd(scaling=scale), 1.0)

    @jax.jit
    def update(w):
        value, gradient = jax.value_and_grad(loss)(w, batch(0))
        arguments = {"value": value, "grad": gradient, "t": 1, **extra(0)}
        return optimizer.update(gradient, optimizer.init(w), w, **arguments)[0]

    updates = update(weights())
    assert all(changed(updates, jax.tree.map(np.zeros_like, updates)))


@jax.custom_jvp
def once(x):
    return jnp.sin(x)


@jax.custom_jvp
def slope(x):
    return jnp.cos(x)


@once.defjvp
def _(primals, tangents):
    return once(*primals), slope(*primals) * tangents[0]


@slope.defjvp
def _(primals, tangents):
    raise AssertionError("a second derivative")


@pytest.mark.parametrize(
    "make_of", [functools.partial(apo.learning_rate, optax.sgd), apo.preconditioner]
)
def test_traced_settings(make_of):
    """A compiled program may make a transform from numbers that it computes."""

    def step(rate):
        optimizer, w, arguments = make_of(rate, lambda_fsd=rate), weights(), extra(0)
        gradient = jax.grad(loss)(w, arguments["batch"])
        updates, state = optimizer.update(gradient, optimizer.init(w), w, **arguments)
        return updates, state.hyperparams

    found, expected = jax.jit(lambda rates: (jax.lax.map(step, rates), step(0.2)))(
        np.array([0.1, 0.2], np.float32)
    )
    found = jax.tree.map(lambda x: np.asarray(x)[1], found)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_no_second_derivative(name):
    def loss_of(w, b):
        return jnp.mean(once(predict(w, b)))

    w = weights()
    with pytest.raises(AssertionError, match="second"):  # a control
        jax.eval_shape(jax.grad(lambda w: optax.tree.norm(jax.grad(loss_of)(w, batch(0)))), w)
    optimizer = make(name)
    arguments = extra(0) | {"loss": loss_of, "predict": lambda w, b: once(predict(w, b))}

    def update(w):
        gradient = jax.grad(loss_of)(w, batch(0))
        return optimizer.update(gradient, optimizer.init(w), w, **arguments)

    jax.eval_shape(update, w)


@pytest.mark.parametrize("name", BOTH)
def test_batches_over_a_mesh(name):
    """Sharded arrays work under jit; shard_map and pmap take one batch for each device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w, plain = weights(), {"meta_interval": 1, "meta_optimizer": optax.sgd(0.1)}
    optimizer, local = make(name, **plain), make(name, **plain, axis_name="data")
    gradient = first_gradient()

    def update(optimizer, b, other):
        return optimizer.update(
            gradient, optimizer.init(w), w, loss=loss, predict=predict, batch=b, other_batch=other
        )[1].hyperparams

    one = jax.jit(lambda *b: update(optimizer, *b))(batch(0), batch(1))
    split = jax.device_put((batch(0), batch(1)), jax.NamedSharding(mesh, jax.P("data")))
    sharded = jax.jit(lambda *b: update(optimizer, *b))(*split)
    mapped = jax.jit(
        jax.shard_map(
            lambda *b: update(local, *b), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
        )
    )(batch(0), batch(1))
    by_device = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), (batch(0), batch(1)))
    pmapped = jax.pmap(lambda *b: update(local, *b), axis_name="data")(*by_device)
    for found in (sharded, mapped, jax.tree.map(lambda x: np.asarray(x)[5], pmapped)):
        chex.assert_trees_all_close(one, found, rtol=2e-4, atol=2e-6)
    alone = jax.shard_map(
        lambda *b: update(optimizer, *b), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
    )
    with raises(ValueError, "differs along the mesh axes ['data']", "pass axis_name='data'"):
        jax.eval_shape(alone, batch(0), batch(1))
    if name == "learning_rate":  # negative control: one device alone finds another rate
        alone = jax.jit(lambda *b: update(optimizer, *b))(*jax.tree.map(lambda x: x[0], by_device))
        assert not np.allclose(alone["learning_rate"], one["learning_rate"], rtol=2e-4)


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16(name):
    first = weights(jnp.bfloat16)
    w, states = train(make(name, meta_interval=1), 50, first)
    state, value = states[-1], jax.jit(loss)
    assert {x.dtype for x in jax.tree.leaves(w)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in hyperparams(state)} == {jnp.dtype(jnp.float32)}
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(w))
    assert int(optax.tree.get(state, "total_notfinite")) == 0
    assert value(w, batch(0)) < value(first, batch(0))


@pytest.mark.parametrize("name", BOTH)
def test_flax_weights(name):
    """The weights may be the state of an nnx module with a convolution."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.conv(x)).mean((1, 2)))

    graph, w = nnx.split(nnx.jit(lambda: Net(nnx.Rngs(0)))(), nnx.Param)
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 1)).astype(np.float32)
    labels = np.arange(8) % 3

    def predict(w, images):
        return nnx.merge(graph, w)(images)

    def loss(w, images):
        logits = predict(w, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = make(name, meta_interval=1)
    state, begin = jax.jit(lambda w: (optimizer.init(w), loss(w, images)))(w)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(
            jax.grad(loss)(w, images),
            state,
            w,
            loss=loss,
            predict=predict,
            batch=images,
            other_batch=images + 0.1,
        )
        return optax.apply_updates(w, updates), state

    first = hyperparams(state)
    for _ in range(10):
        w, state = step(w, state)
    assert jax.jit(loss)(w, images) < begin
    assert all(changed(first, hyperparams(state)))


def test_flax_optimizer():
    """nnx.Optimizer renames the leaves when it updates; rules see the same name."""
    seen = set()

    def rule(path, leaf):
        seen.add(path)
        return apo.kronecker() if path == "['kernel']" else apo.dense()

    model = nnx.jit(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)))()
    graph = nnx.graphdef(model)
    optimizer = nnx.Optimizer(model, apo.preconditioner(0.1, structure=rule), wrt=nnx.Param)
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 3

    def predict(w, x):
        return nnx.merge(graph, w)(x)

    def loss(w, x):
        return optax.softmax_cross_entropy_with_integer_labels(predict(w, x), y).mean()

    before = nnx.state(model, nnx.Param)
    value = jax.jit(jax.value_and_grad(loss))
    begin, gradient = value(before, x)
    optimizer.update(model, gradient, loss=loss, predict=predict, batch=x, other_batch=-x)
    assert value(nnx.state(model, nnx.Param), x)[0] < begin
    assert seen == {"['kernel']", "['bias']"}
