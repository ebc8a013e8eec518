"""Stochastic bilevel algorithms in ``fit`` and ``average``: data, bad arguments, divergence."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import unrollgrad as ug
from tests.helpers import mistyped, numbers, over_workers, raises
from unrollgrad import bilevel
from unrollgrad._core.descriptions import explained_by
from unrollgrad.bilevel import data as reading

KEY = jax.random.key(0)
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)), jnp.float32)


def outer(w, theta, x):
    return jnp.mean((w - x) ** 2) / 2


def inner(w, theta, x):
    return jnp.mean(jnp.sum((w - x - theta) ** 2, -1)) / 2


def soba(data=None, rate=0.1, **changes):
    data = bilevel.finite_sum(ROWS, 4) if data is None else data
    given: dict[str, Any] = {
        "init_params": lambda key: jnp.zeros(3),
        "outer_data": data,
        "inner_data": data,
        "inner_optimizer": optax.sgd(rate),
        **changes,
    }
    return bilevel.soba(given.pop("outer", outer), given.pop("inner", inner), **given)


def test_every_batch_once_per_epoch():
    """In an order that changes; unshuffled in file order; and the mean over an epoch is exact."""
    data = bilevel.finite_sum(ROWS, 3)
    assert (data.num_batches, data.tail) == (4, 1)

    @jax.jit
    def epochs(key):
        def step(place, _):
            token, place = reading.draw(data, key, place)
            value, weight = reading.on_batch(data, token, lambda x: jnp.mean(x, 0))
            return place, (token, weight * value)

        return jax.lax.scan(step, reading.start(data), length=12)[1]

    tokens, values = jax.vmap(epochs)(jax.random.split(KEY, 3))
    orders = np.asarray(tokens).reshape(9, 4)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(4), (9, 1)))
    assert len({tuple(order) for order in orders}) > 4
    np.testing.assert_allclose(
        np.asarray(values).reshape(3, 3, 4, 3).mean(2), np.tile(ROWS.mean(0), (3, 3, 1)), rtol=1e-5
    )
    plain, place = data._replace(shuffle=False), reading.start(data._replace(shuffle=False))
    drawn = []
    for _ in range(5):
        token, place = reading.draw(plain, KEY, place)
        drawn.append(int(token))
    assert drawn == [0, 1, 2, 3, 0]


def test_fit_resumes_bit_for_bit(tmp_path):
    def run(num_steps, folder):
        return ug.fit(
            soba(bilevel.finite_sum(ROWS, 5), directions=bilevel.saga()),
            jnp.zeros(3),
            optax.adam(1e-2),
            num_steps=num_steps,
            key=KEY,
            steps_per_dispatch=5,
            checkpoint_dir=folder,
        )

    whole = run(20, tmp_path / "whole")
    run(10, tmp_path / "parts")
    parts = run(20, tmp_path / "parts")
    jax.tree.map(
        np.testing.assert_array_equal,
        numbers((whole.theta, whole.worker_state)),
        numbers((parts.theta, parts.worker_state)),
    )
    assert set(whole.history) >= {"loss", "v_norm", "curvature", "inner_rate", "outer_rate"}
    np.testing.assert_allclose(whole.history["inner_rate"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(whole.history["curvature"][1:], 1.0, rtol=1e-5)


def test_average_is_a_mean_over_replicas_and_begins_a_bad_one_again():
    estimator, theta = soba(), jnp.zeros(3)
    workers = ug.average(estimator, 4)
    state = workers.init(KEY, theta)
    each = jax.vmap(lambda key, state: estimator.estimate(key, theta, state))
    alone, _ = each(jax.random.split(KEY, 4), state)
    out, after = workers.estimate(KEY, theta, state)
    np.testing.assert_allclose(out.grad, jnp.mean(alone.grad, 0), rtol=1e-6)
    v = after.carried.v.at[2].set(jnp.nan)
    broken = after._replace(carried=after.carried._replace(v=v))
    out, state = workers.estimate(KEY, theta, broken)
    assert int(over_workers(out).num_nonfinite) == 1
    assert np.all(np.isfinite(out.grad))
    out, state = workers.estimate(jax.random.key(7), theta, state)
    assert int(over_workers(out).num_nonfinite) == 0
    assert np.all(np.isfinite(state.carried.v))
    np.testing.assert_array_equal(state.episode.t, [4, 4, 2, 4])
    with raises(ValueError, "stagger", "truncation"):
        ug.average(estimator, 4, stagger="breakstep")


@pytest.mark.parametrize(
    ("rates", "which"),
    [((2.5, 2.5, 0.01), "inner"), ((0.1, 2.5, 0.01), "linear"), ((0.1, 0.1, 3.0), "outer")],
)
def test_a_run_that_diverges_says_which_rate_to_lower(rates, which):
    estimator = soba(rate=rates[0], linear_optimizer=optax.sgd(rates[1]))
    with pytest.raises(FloatingPointError) as error:
        ug.fit(estimator, jnp.ones(3), optax.sgd(rates[2]), num_steps=3000, key=KEY)
    notes = "\n".join(error.value.__notes__)
    assert f"fit: lower the {which} rate" in notes
    good = ug.fit(soba(), jnp.ones(3), optax.sgd(0.01), num_steps=200, key=KEY)
    assert bilevel.advice(good.history).startswith("nothing grows")


def test_rows_that_are_not_finite_are_named():
    """Also where only ``outer`` reads them; and infinities that the data do not explain."""
    bad = bilevel.finite_sum({"x": ROWS.at[7, 1].set(jnp.nan).at[9].set(jnp.inf)}, 4)
    losses: dict[str, Any] = {"outer": lambda w, t, batch: outer(w, t, batch["x"])}
    with pytest.raises(FloatingPointError) as error:
        ug.fit(soba(outer_data=bad, **losses), jnp.ones(3), optax.sgd(0.1), num_steps=9, key=KEY)
    says = "2 of the 10 rows in arrays['x'], number 7, 9"
    notes = "\n".join(error.value.__notes__)
    assert f"`outer_data` has rows with NaN or infinity: {says}" in notes
    assert "lower" not in notes
    assert "inner_data" not in notes
    history = {name: np.ones(5) for name in ("v_norm", "curvature", "loss")}
    history |= {name: np.full(5, 0.1) for name in ("inner_rate", "linear_rate", "outer_rate")}
    history["loss"][4] = np.nan
    assert bilevel.advice(history).startswith("a batch whose loss or gradient is not finite")


def primitives(program, in_loop=False):
    """(whether it is in a ``while`` loop, the name) of every operation of a program."""
    for equation in getattr(program, "jaxpr", program).eqns:
        name = equation.primitive.name
        yield in_loop, name
        for inside in core.jaxprs_in_params(equation.params):
            yield from primitives(inside, in_loop or name == "while")


@pytest.mark.parametrize("name", ["soba", "saba", "spaba"])
def test_a_batch_of_a_finite_sum_costs_no_key(name):
    """Folding a key takes a microsecond, a quarter of a small step: only a new epoch does it.

    The barrier keeps XLA from moving it out of the loop of the new epoch. SPABA tosses a coin.
    """

    def found(data):
        given = {"init_params": lambda key: jnp.zeros(3), "inner_optimizer": optax.sgd(0.1)}
        settings = {"outer_data": data, "inner_data": data, "batches": 2}
        estimator = bilevel.REGISTRY[name].build(outer, inner, **given, **settings, probability=0.5)
        args = KEY, jnp.zeros(3)
        state = jax.eval_shape(estimator.init, *args)
        return list(primitives(jax.make_jaxpr(estimator.estimate)(*args, state)))

    rows = found(bilevel.finite_sum(ROWS, 5))
    keys = [in_loop for in_loop, made in rows if made == "random_fold_in"]
    assert len(keys) - sum(keys) == (2 if name == "spaba" else 0)
    assert sum(made == "optimization_barrier" for in_loop, made in rows if in_loop) >= 2
    if name != "saba":
        endless = [in_loop for in_loop, made in found(lambda key: ROWS[:5]) if "fold_in" in made]
        assert len(endless) - sum(endless) >= 4


def test_help_explains_every_argument():
    for name, row in bilevel.REGISTRY.items():
        text = inspect.getdoc(row.factory) or ""
        assert "As in" not in text, name
        for argument in inspect.signature(row.factory).parameters:
            assert f"\n    {argument}: " in text, (name, argument)
    assert "    linear_optimizer: v's optimizer; by default the same.\n" in (
        inspect.getdoc(bilevel.saba) or ""
    )

    def other(rate):
        """Some algorithm.

        Args:
            rate: As in ``soba``.
        """

    with raises(ValueError, "`soba` does not describe `rate`"):
        explained_by(bilevel.soba)(other)


def test_bad_arguments():
    with raises(ValueError, "`arrays` must have the same leading axis", "[10,3]", "[9,3]"):
        bilevel.finite_sum({"x": ROWS, "y": ROWS[1:]}, 4)
    with raises(ValueError, "`batch_size`=11", "10 rows"):
        bilevel.finite_sum(ROWS, 11)
    with raises(ValueError, "no arrays"):
        bilevel.finite_sum({}, 4)
    with raises(ValueError, "`arrays` has no rows", "float32[0,3]"):
        bilevel.finite_sum(ROWS[:0], 1)
    with raises(ValueError, "arrays[0][1] is 2.0", "in place of lists of numbers"):
        bilevel.finite_sum(mistyped([[jnp.ones(2), 2.0]]), 1)
    with raises(TypeError, "`arrays`['y'] must be an array of numbers", "<U1[2]"):
        bilevel.finite_sum({"y": np.array(["a", "b"])}, 1)
    with raises(TypeError, "`batch_size` must be a whole number", "2.5"):
        bilevel.finite_sum(ROWS, mistyped(2.5))
    with raises(TypeError, "`inner_data` must be bilevel.finite_sum", "float32[10,3]"):
        soba(inner_data=ROWS)
    with raises(TypeError, "`inner_optimizer` must be an optax transformation", "0.1"):
        soba(inner_optimizer=0.1)
    with raises(TypeError, "`directions` must be bilevel.sgd()", "'saga'"):
        soba(directions="saga")
    with raises(TypeError, "`init_params` must be a function"):
        soba(init_params=jnp.zeros(3))
    theta = jnp.zeros(3)
    with raises(ValueError, "the loss of `inner` must be a scalar", "(4, 3)", "Take its mean"):
        soba(inner=lambda w, theta, x: (w - x) ** 2).init(KEY, theta)
    for name, loss in {"outer": outer, "inner": inner}.items():
        with raises(ValueError, f"`{name}` must be the mean over its batch", "jnp.mean"):
            added = {name: lambda w, t, x, loss=loss: len(x) * loss(w, t, x) + jnp.sum(t**2) + 1}
            soba(**added).init(KEY, theta)
        with raises(ValueError, f"`{name}` must be the mean over its batch"):
            ug.average(soba(**added), 2).init(KEY, theta)
        with raises(ValueError, f"`{name}` must be the mean over its batch"):
            ug.fit(soba(**added), theta, optax.sgd(0.1), num_steps=1, key=KEY)
        # Where a value is traced, the sum is not seen, and nothing else goes wrong.
        jax.eval_shape(soba(**added).init, KEY, theta)
    with raises(TypeError, "init_params(key)", "int32"):
        soba(init_params=lambda key: jnp.zeros(3, int)).init(KEY, theta)
    endless = lambda key: ROWS[:4]  # noqa: E731
    with raises(ValueError, "`saga` needs passes", "`outer_data` is an endless sampler"):
        soba(endless, directions=bilevel.saga()).init(KEY, theta)
    with raises(ValueError, "sarah", "endless", "`batches`"):
        soba(endless, directions=bilevel.sarah(4)).init(KEY, theta)
    with raises(ValueError, "`period` has no default for endless data"):
        bilevel.srba(
            outer,
            inner,
            init_params=lambda key: jnp.zeros(3),
            outer_data=endless,
            inner_data=endless,
            inner_optimizer=optax.sgd(0.1),
        )
    with raises(ValueError, "`probability` must be in (0, 1]", "0"):
        bilevel.page(0.0)
    with raises(ValueError, "`eta` must be in [0, 1]", "2"):
        bilevel.storm(2.0)
    with raises(ValueError, "no v_norm", "average"):
        bilevel.advice({"loss": np.ones(3)})
    estimator = soba()
    state = estimator.init(KEY, theta)
    with raises(ValueError, "draws its own batches", "`outer_data`"):
        estimator.estimate(KEY, theta, state, data=ROWS)
    with raises(TypeError, "not this estimator's", "soba(directions=saga())"):
        other = soba(directions=bilevel.saga())
        estimator.estimate(KEY, theta, other.init(KEY, theta))


def test_endless_data_in_passes_of_draws():
    """sarah and page with ``batches``: the mean over fresh draws begins each stretch."""
    endless = lambda key: 1 + 0.1 * jax.random.normal(key, (4, 3))  # noqa: E731
    for law in (bilevel.sarah(8, batches=16), bilevel.page(0.2, batches=16)):
        estimator = soba(endless, directions=law)
        run = ug.fit(estimator, jnp.ones(3), optax.sgd(0.05), num_steps=400, key=KEY)
        np.testing.assert_allclose(run.theta, 0.0, atol=0.1)
        assert set(np.unique(run.history["gradients"])) == {8, 8 + 16 * 4}
