"""``update``: what it needs, what it skips, where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import unrollgrad as ug
from tests.helpers import raises
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
    a, b = jax.random.split(jax.random.key(0))
    first, second = jax.random.normal(a, (6, 5), dtype), jax.random.normal(b, (5, 3), dtype)
    return {"first": first, "shift": jnp.zeros(5, dtype), "second": second}


def batch(seed, size=16):
    a, b = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(a, (size, 6)), "y": jax.random.randint(b, (size,), 0, 3)}


def extra(i):
    return {
        "loss": loss,
        "predict": predict,
        "batch": batch(2 * i),
        "other_batch": batch(2 * i + 1),
    }


def train(optimizer, num_steps, w=None):
    w = weights() if w is None else w
    state = optimizer.init(w)

    @jax.jit
    def step(w, state, i):
        arguments = extra(i)
        gradient = jax.grad(loss)(w, arguments["batch"])
        updates, state = optimizer.update(gradient, state, w, **arguments)
        return optax.apply_updates(w, updates), state

    for i in range(num_steps):
        w, state = step(w, state, i)
    return w, state


def hyperparams(state):
    return jax.tree.leaves(optax.tree.get(state, "hyperparams"))


@pytest.mark.parametrize("name", BOTH)
def test_missing_arguments(name):
    optimizer, w = make(name), weights()
    state, gradient, given = optimizer.init(w), weights(), extra(0)
    with raises(ValueError, f"`apo.{name}` is missing `params` (the weights)"):
        optimizer.update(gradient, state, **given)
    for key in given:
        some = {k: v for k, v in given.items() if k != key}
        with raises(ValueError, f"is missing `{key}` (", "update(updates, state, params, loss=..."):
            optimizer.update(gradient, state, w, **some)
    with raises(TypeError, "`predict` must be a function, predict(params, other_batch)"):
        optimizer.update(gradient, state, w, **given | {"predict": w})
    with raises(ValueError, "the loss of `loss` must be a scalar; got shape (16,)"):
        optimizer.update(gradient, state, w, **given | {"loss": lambda w, b: b["x"][:, 0]})
    with raises(ValueError, "must be a scalar; got a tuple. Return the loss alone"):
        optimizer.update(gradient, state, w, **given | {"loss": lambda w, b: (loss(w, b), {})})


@pytest.mark.parametrize("name", BOTH)
def test_discrepancies(name):
    """Scalars and other outputs are fine; what is not real is named."""
    w, given = weights(), extra(0)
    gradient = jax.grad(loss)(w, given["batch"])

    def update(discrepancy, predict):
        optimizer = make(name, discrepancy=discrepancy)
        given["predict"] = predict
        return optimizer.update(gradient, optimizer.init(w), w, **given)[1]

    whole = update(lambda a, b: jnp.mean((a["y"] - b["y"]) ** 2), lambda w, b: {"y": predict(w, b)})
    assert int(optax.tree.get(whole, "total_notfinite")) == 0
    bad = update(lambda a, b: jnp.log(-1 - jnp.sum((a - b) ** 2)), predict)
    assert int(optax.tree.get(bad, "total_notfinite")) == 1
    for wrong in (lambda a, b: {"d": a}, lambda a, b: a + 1j, lambda a, b: "a"):
        with raises(TypeError, "`discrepancy` must return a real array; got"):
            update(wrong, predict)


@pytest.mark.parametrize("name", BOTH)
def test_only_what_is_needed(name):
    """Without a discrepancy no predictions; with the loss linearised no loss."""
    w, given = weights(), extra(0)
    gradient = jax.grad(loss)(w, given["batch"])
    of_the_loss = {"loss": loss, "batch": given["batch"]}
    of_the_outputs = {"predict": predict, "other_batch": given["other_batch"]}
    for changes, needed in (
        ({"lambda_fsd": 0.0, "discrepancy": None}, of_the_loss),
        ({"linearised": True}, of_the_outputs),
    ):
        found = []
        for arguments in (needed, given):  # what is not needed changes nothing
            optimizer = make(name, **changes)
            state = optimizer.init(w)
            _, new = optimizer.update(gradient, state, w, **arguments)
            found.append(hyperparams(new))
            assert jnp.any(found[-1][0] != hyperparams(state)[0])
        jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("name", BOTH)
def test_bad_settings(name):
    for key in ("lambda_fsd", "lambda_wsd"):
        for value in (-0.1, float("nan"), float("inf")):
            with raises(ValueError, f"`{key}` must be at least 0 and finite; got {value}"):
                make(name, **{key: value})
        for value in (None, "1", jnp.ones(1), optax.sgd):
            with raises(TypeError, f"`{key}` must be a number; got"):
                make(name, **{key: value})
    with raises(TypeError, "`discrepancy` must be a function", "apo.kl_divergence"):
        make(name, discrepancy=None)
    with raises(TypeError, "`meta_optimizer` must be an optax transform; got a float"):
        make(name, meta_optimizer=0.1)
    with raises(ValueError, "`meta_interval` must be at least 1"):
        make(name, meta_interval=0)
    with raises(TypeError, "params['n'] is int32[2]", "Train the floating leaves alone"):
        make(name).init({"n": jnp.arange(2), "w": jnp.zeros(3)})


def test_bad_bases_and_rates():
    with raises(TypeError, "`base` must be a function of the hyperparameters", "optax.adam"):
        apo.learning_rate(optax.adam(0.1), 0.1)
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
        apo.preconditioner(optax.sgd)


def test_leaves_without_a_rule():
    def rule(path, leaf):
        return apo.dense() if path.endswith("['shift']") else None

    with raises(ValueError, "no structure for params['first']", "returned None", "apo.kronecker()"):
        apo.preconditioner(0.1, structure=rule).init(weights())
    for wrong in ("dense", apo.dense):
        with raises(TypeError, "`structure` must be a Structure", "dense"):
            apo.preconditioner(0.1, structure=wrong)
    with raises(ValueError, "apo.dense() for float32[200,200] would keep 40000 x 40000", "6 GiB"):
        apo.preconditioner(0.1, structure=apo.dense()).init(jnp.zeros((200, 200)))
    turns, w = iter([apo.kronecker(), apo.diagonal()]), jnp.ones((2, 2))
    fickle = apo.preconditioner(
        0.1, lambda_fsd=0, linearised=True, structure=lambda path, leaf: next(turns)
    )
    with raises(ValueError, "the structure of params is not the one of `init`"):
        fickle.update(w, fickle.init(w), w)


@pytest.mark.parametrize("name", BOTH)
def test_masked_weights(name):
    """Refused from outside; inside, what is frozen does not move."""
    w = weights()
    mask = {"first": True, "shift": True, "second": False}
    with raises(ValueError, "params have masked leaves", "apo.frozen()"):
        optax.masked(make(name), mask).init(w)

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
    assert jnp.any(moved["first"] != w["first"])


@pytest.mark.parametrize("name", BOTH)
def test_the_state_may_be_donated(name):
    """By an update of a state that begins anew for another seed."""
    optimizer, given = make(name), extra(0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state):
        gradient = jax.grad(loss)(w, given["batch"])
        updates, state = optimizer.update(gradient, state, w, **given)
        return optax.apply_updates(w, updates), state

    ends = []
    for _ in range(2):
        w = weights()
        w, state = step(w, optimizer.init(w))
        ends.append(step(w, state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_the_default_meta_steps_are_relative(rate, scale):
    """About 10 % per meta-step from any rate, of a loss in any units, if all say the same."""

    def scaled(w, b):
        return scale * loss(w, b)

    optimizer, w = apo.learning_rate(optax.sgd, rate, lambda_fsd=0.0, meta_interval=1), weights()
    state, gradient = optimizer.init(w), jax.grad(scaled)(w, batch(0))
    for _ in range(5):
        _, state = optimizer.update(gradient, state, w, loss=scaled, batch=batch(0))
    growth = np.log(float(optax.tree.get(state, "learning_rate")) / rate)
    assert 0.5 < growth < 0.56  # more than 0.5, as the meta-gradient grows with the rate


def test_a_structure_for_each_leaf():
    def rule(path, leaf):
        return {"first": apo.kronecker(), "shift": apo.dense(), "second": apo.identity()}[
            path[2:-2]
        ]

    _, state = train(apo.preconditioner(0.1, structure=rule), 3)
    factors = optax.tree.get(state, "preconditioner")
    assert {k: sorted(v) for k, v in factors.items()} == {
        "first": ["a", "b", "s"],
        "shift": ["f"],
        "second": ["s"],
    }
    assert all(jnp.any(x != y) for x, y in zip(
        jax.tree.leaves(factors),
        jax.tree.leaves(apo.preconditioner(0.1, structure=rule).init(weights()).hyperparams),
        strict=True,
    ))  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_meta_steps_that_are_not_finite_are_skipped_and_counted(name):
    optimizer, w = make(name, meta_interval=1), weights()
    state, given = optimizer.init(w), extra(0)
    gradient = jax.grad(loss)(w, given["batch"])
    bad = given | {"loss": lambda w, b: jnp.log(-jnp.sum(w["first"] ** 2))}
    before = hyperparams(state)
    for i in range(3):
        updates, state = optimizer.update(gradient, state, w, **bad)
        assert int(optax.tree.get(state, "total_notfinite")) == i + 1
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
    for x, y in zip(before, hyperparams(state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    _, state = optimizer.update(gradient, state, w, **given)
    assert int(optax.tree.get(state, "total_notfinite")) == 3
    assert all(jnp.any(x != y) for x, y in zip(before[:1], hyperparams(state)[:1], strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_meta_steps_are_at_the_interval(name):
    moved = []
    for num_steps in range(1, 8):
        _, state = train(make(name, meta_interval=3), num_steps)
        moved.append(float(sum(jnp.sum(x) for x in hyperparams(state))))
    changes = np.diff(moved) != 0
    assert changes.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("name", BOTH)
def test_trains_in_a_chain_compiled_once(name):
    """Beside clipping before it; the state keeps its structure and dtypes; the loss falls."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), make(name, meta_interval=2))
    w = weights()
    state = optimizer.init(w)
    assert jax.tree.structure(jax.eval_shape(optimizer.init, w)) == jax.tree.structure(state)
    traces = []

    @jax.jit
    def step(w, state):
        traces.append(1)
        gradient = jax.grad(loss)(w, batch(0))
        updates, state = optimizer.update(gradient, state, w, **extra(0))
        return optax.apply_updates(w, updates), state

    begin = loss(w, batch(0))
    for _ in range(20):
        w, new = step(w, state)
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
        state = new
    assert len(traces) == 1
    assert loss(w, batch(0)) < begin
    assert optax.tree.get(state, "hyperparams") is not None


def test_current_values_by_name():
    _, state = train(apo.learning_rate(optax.adam, 0.01), 2)
    rate = optax.tree.get(state, "learning_rate")
    assert rate.dtype == jnp.float32
    assert 0.01 < rate < 0.02

    def base(h):
        return optax.sgd(h["learning_rate"], momentum=h["momentum"])

    kinds = {"learning_rate": ug.constraints.positive, "momentum": ug.constraints.unit_interval}
    first = {"learning_rate": 0.01, "momentum": 0.9}
    _, state = train(apo.learning_rate(base, first, constraints=kinds, meta_interval=1), 20)
    assert optax.tree.get(state, "learning_rate") != 0.01
    assert 0 < optax.tree.get(state, "momentum") < 1
    assert optax.tree.get(state, "momentum") != 0.9


def test_injected_hyperparameters_follow():
    """optax alone would keep those of ``init``."""

    def base(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

    w, given = weights(), extra(0)
    gradient = jax.grad(loss)(w, given["batch"])
    found = []
    for optimizer in (apo.learning_rate(base, 0.1), apo.learning_rate(optax.sgd, 0.1)):
        updates, state = optimizer.update(gradient, optimizer.init(w), w, **given)
        found.append(updates)
    assert state.hyperparams["learning_rate"] != 0.1
    injected = apo.learning_rate(base, 0.1).init(w)
    kept = optax.tree.get(injected, "ApoState").hyperparams["learning_rate"]
    np.testing.assert_allclose(kept, 0.1, rtol=1e-6)
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_extra_arguments_reach_the_base():
    """optax.polyak_sgd needs the value of the loss."""
    optimizer = apo.learning_rate(lambda scale: optax.polyak_sgd(scaling=scale), 1.0)
    w, given = weights(), extra(0)
    value, gradient = jax.value_and_grad(loss)(w, given["batch"])
    updates, _ = optimizer.update(
        gradient, optimizer.init(w), w, value=value, grad=gradient, t=1, **given
    )
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(updates))


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
    """A transform may be made inside a compiled program, of numbers that it computes."""

    def step(rate):
        optimizer, w, arguments = make_of(rate, lambda_fsd=rate), weights(), extra(0)
        gradient = jax.grad(loss)(w, arguments["batch"])
        updates, state = optimizer.update(gradient, optimizer.init(w), w, **arguments)
        return updates, state.hyperparams

    found = jax.tree.map(lambda x: x[1], jax.lax.map(step, jnp.array([0.1, 0.2])))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(step(0.2)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_no_second_derivative(name):
    def loss_of(w, b):
        return jnp.mean(once(predict(w, b)))

    w = weights()
    with pytest.raises(AssertionError, match="second"):  # a control
        jax.grad(lambda w: optax.tree.norm(jax.grad(loss_of)(w, batch(0))))(w)
    optimizer = make(name)
    gradient = jax.grad(loss_of)(w, batch(0))
    arguments = extra(0) | {"loss": loss_of, "predict": lambda w, b: once(predict(w, b))}
    jax.jit(lambda w, s: optimizer.update(gradient, s, w, **arguments))(w, optimizer.init(w))


@pytest.mark.parametrize("name", BOTH)
def test_batches_over_a_mesh(name):
    """Sharded arrays under jit; shard_map and pmap with a batch for each device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer, w = make(name, meta_interval=1), weights()
    local = make(name, meta_interval=1, axis_name="data")
    gradient = jax.grad(loss)(w, batch(0))

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
    for found in (sharded, mapped, jax.tree.map(lambda x: x[5], pmapped)):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)
    alone = jax.shard_map(
        lambda *b: update(optimizer, *b), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
    )
    with raises(ValueError, "differs along the mesh axes ['data']", "pass axis_name='data'"):
        jax.jit(alone)(batch(0), batch(1))
    if name == "learning_rate":  # a control: a device alone finds another rate
        alone = update(optimizer, *jax.tree.map(lambda x: x[0], by_device))
        assert not np.allclose(alone["learning_rate"], one["learning_rate"], rtol=2e-4)


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16(name):
    w, state = train(make(name, meta_interval=1), 50, weights(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(w)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in hyperparams(state)} == {jnp.dtype(jnp.float32)}
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(w))
    assert int(optax.tree.get(state, "total_notfinite")) == 0
    assert loss(w, batch(0)) < loss(weights(jnp.bfloat16), batch(0))


@pytest.mark.parametrize("name", BOTH)
def test_flax_weights(name):
    """The state of an nnx module, with a convolution."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.conv(x)).mean((1, 2)))

    graph, w = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    images = jax.random.normal(jax.random.key(0), (8, 6, 6, 1))
    labels = jnp.arange(8) % 3

    def predict(w, images):
        return nnx.merge(graph, w)(images)

    def loss(w, images):
        logits = predict(w, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = make(name, meta_interval=1)
    state, begin = optimizer.init(w), loss(w, images)

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
    assert loss(w, images) < begin
    assert all(jnp.any(x != y) for x, y in zip(first, hyperparams(state), strict=True))


def test_flax_optimizer():
    """nnx.Optimizer names the leaves in another way when it updates; rules see one name."""
    seen = set()

    def rule(path, leaf):
        seen.add(path)
        return apo.kronecker() if path == "['kernel']" else apo.dense()

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(model)
    optimizer = nnx.Optimizer(model, apo.preconditioner(0.1, structure=rule), wrt=nnx.Param)
    x, y = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3

    def predict(w, x):
        return nnx.merge(graph, w)(x)

    def loss(w, x):
        return optax.softmax_cross_entropy_with_integer_labels(predict(w, x), y).mean()

    before = nnx.state(model, nnx.Param)
    begin, gradient = loss(before, x), jax.grad(loss)(before, x)
    optimizer.update(model, gradient, loss=loss, predict=predict, batch=x, other_batch=-x)
    assert loss(nnx.state(model, nnx.Param), x) < begin
    assert seen == {"['kernel']", "['bias']"}
