"""User code on perturbed leaves: what does not add them up, and what warns that it does."""

import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import raises

quax = pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")

KEY = jax.random.key(0)
SCALE = 0.5


@functools.partial(jax.jit, static_argnums=1)
def perturbed(theta, law):
    """Theta with low-rank noise, and the same as arrays."""
    drawn = law.sample(KEY, law.init(theta), theta, 1)
    one = jax.tree.map(lambda x: x[0], drawn)
    added = jax.tree.map(lambda x, e: x + SCALE * e, theta, law.contract(drawn, jnp.ones(1)))
    return law.perturb(theta, one, SCALE), added


def compare(function, theta, *args, law=None, atol=1e-4):
    """Asserts that the function gives equal numbers for both, without a warning."""
    law = law or ug.noise.low_rank(dense_below=0)

    @jax.jit
    def both(theta, *args):
        factored, arrays = perturbed(theta, law)
        return quax.quaxify(function)(factored, *args), function(arrays, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = both(theta, *args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    named = jax.tree_util.tree_leaves_with_path(expected)
    for (path, x), y in zip(named, jax.tree.leaves(found), strict=True):
        assert np.abs(x).max() > 0.01, path
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=atol, err_msg=str(path))


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2])
def test_products_and_rows(rank):
    theta = {"w": normal(6, 4), "s": normal(3, 4, 4), "v": normal(4, 1), "h": normal(6, 2, 4)}

    def function(theta, x):
        w, s = theta["w"], theta["s"]
        two = jnp.ones((2, 4))
        return {
            "right": x @ w,
            "left": w.T @ x.T,
            "vector": x[0] @ w,
            "column": x @ w @ theta["v"],
            "row": w[2],
            "rows": w[jnp.array([1, 5, 5])],
            "filled rows": w.at[jnp.array([1, 9])].get(mode="fill", fill_value=0.5),
            "cut": x[:, :3] @ w[1:4],
            "traced cut": x[:, :2] @ jax.lax.dynamic_slice_in_dim(w, x.astype(jnp.int32)[0, 0], 2),
            "scaled": x @ (-w / 2.0),
            "mapped": jax.vmap(lambda x: x @ w)(x),
            "jitted": jax.jit(jnp.matmul)(x, w),
            "own function": ug.noise.matmul(x, w),
            "scanned": jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), two, s)[0],
            "layer": two @ s[1],
            "traced layer": two @ s[x.astype(jnp.int32)[0, 0]],
            "all layers": jnp.einsum("bi,lij->lbj", two, s),
            "over layers": jnp.einsum("bl,lij->bij", x[:, :3], s),
            "heads": jnp.einsum("bi,ihj->bhj", x, theta["h"]),
            "merged": x @ w.reshape(1, 6, 4)[0],
            "both axes": jnp.einsum("bi,ij->b", x, w),
            "named": x @ jax.ad_checkpoint.checkpoint_name(w, "w"),
            "held": x @ jax.lax.optimization_barrier({"w": w, "x": x})["w"],
            "split": [x[:, :2] @ part for part in jnp.split(w, 3)],
            "backwards": x @ w[::-1],
        }

    law = ug.noise.low_rank(rank, dense_below=0, stacked={"w": 0, "s": 1, "v": 0, "h": 0})
    compare(function, theta, np.abs(normal(3, 6)) % 1, law=law)


@pytest.mark.parametrize("x64", [False, True])
def test_products_with_other_dtypes(x64):
    """As the dense product's: numbers without fractions, imaginary parts, unequal precisions."""
    law = ug.noise.low_rank(2, "gaussian", dense_below=0)
    names = ["bool", "int8", "int32", "bfloat16", "complex64"]
    names += ["int64", "float64", "complex128"] if x64 else []
    x = 2 * normal(3, 6) * np.exp(1j * normal(1, 6))
    given = {k: (x if "complex" in k else x.real).astype(jnp.dtype(k)) for k in names}
    with jax.enable_x64(x64):

        def function(theta, given):
            w = theta["w"]
            out = {k: (x @ w, w.T @ x.T, ug.noise.matmul(x, w)) for k, x in given.items()}
            assert {k: y[0].dtype for k, y in out.items()} == {
                k: jnp.result_type(x, jnp.float32) for k, x in given.items()
            }
            return out

        compare(function, {"w": normal(6, 4)}, given, law=law, atol=1e-5)


def test_control_flow_and_derivatives():
    theta = {"w": normal(4, 4), "s": normal(3, 4, 4)}

    def function(theta, x):
        def loss(x):
            y = jnp.tanh(x @ theta["w"])
            y = jax.checkpoint(lambda y, w: jnp.tanh(y @ w))(y, theta["w"])
            y, _ = jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), y, theta["s"])
            return jnp.sum(jax.nn.softmax(y) ** 2)

        return {
            "backwards": jax.grad(loss)(x),
            "forwards": jax.jvp(loss, (x,), (x,)),
            "each": jax.vmap(jax.grad(lambda x: loss(x[None])))(x),
            "while": jax.lax.while_loop(
                lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ theta["w"]), (0, x)
            )[1],
            "cond": jax.lax.cond(
                x[0, 0] > 0, lambda x: x @ theta["w"], lambda x: x @ theta["w"].T, x
            ),
        }

    compare(function, theta, normal(3, 4))


def test_derivative_rules_of_ones_own():
    """By ``custom_jvp`` a leaf passes; by ``custom_vjp`` nothing does, which the error says."""

    @jax.custom_vjp
    def loss(y):
        return jnp.mean(y**2)

    loss.defvjp(lambda y: (loss(y), y), lambda y, g: (g * y,))

    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda x, t: (product(*x), t[0] @ x[1] + x[0] @ t[1]))
    theta, x = {"layer": {"w": normal(8, 8)}}, jnp.ones((2, 8))
    law = ug.noise.low_rank(dense_below=0)

    def run(loss):
        def step(key, theta, s, t):
            return s, loss(product(s, theta["layer"]["w"]))

        es = ug.full_es(ug.UnrolledProblem(lambda key, theta: x, step, 2), sigma=0.1, noise=law)
        jax.eval_shape(es.estimate, KEY, theta, jax.eval_shape(es.init, KEY, theta))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(jnp.mean)
    with raises(NotImplementedError, "`step`", "custom_vjp", "theta['layer']['w']", "custom_jvp"):
        run(loss)


def test_flax():
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, tokens):
            x = nn.relu(nn.Conv(8, (3, 3), padding="SAME")(x))
            x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2)(x)
            x = nn.gelu(nn.LayerNorm()(nn.Dense(6)(x.reshape(x.shape[0], -1))))
            row = nn.Conv(6, (3,))(x[None])
            found = nn.MultiHeadDotProductAttention(num_heads=2)(row)
            return x, nn.Embed(7, 5)(tokens), nn.RNN(nn.GRUCell(3))(x[None]), row, found

    network, x, tokens = Network(), normal(2, 6, 6, 4), jnp.array([1, 2])
    theta = jax.jit(network.init)(KEY, x, tokens)
    # Kernels are no stacks: three axes are those of attention's heads, or of a convolution of rows.
    stacked = jax.tree_util.tree_map_with_path(
        lambda path, x: int("bias" in jax.tree_util.keystr(path)), theta
    )
    law = ug.noise.low_rank(2, dense_below=0, stacked=stacked)
    drawn = jax.eval_shape(lambda theta: law.sample(KEY, (), theta, 1), theta)["params"]
    attention = drawn["MultiHeadDotProductAttention_0"]
    assert [x.shape for x in attention["query"]["kernel"]] == [(1, 6, 1, 1, 2), (1, 1, 2, 3, 2)]
    assert [x.shape for x in attention["out"]["kernel"]] == [(1, 2, 3, 1, 2), (1, 1, 1, 6, 2)]
    assert attention["query"]["bias"].shape == (1, 2, 3)
    compare(lambda theta, x: network.apply(theta, x, tokens), theta, x, law=law)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = {
        "mlp": eqx.nn.MLP(4, 3, 8, 2, key=KEY),
        "convolution": eqx.nn.Conv2d(2, 4, 3, groups=2, key=KEY),
        "cell": eqx.nn.LSTMCell(4, 6, key=KEY),
        "embedding": eqx.nn.Embedding(5, 4, key=KEY),
    }
    theta, static = eqx.partition(model, eqx.is_array)

    def function(theta, x):
        model = eqx.combine(theta, static)
        start = jnp.zeros(6), jnp.zeros(6)
        return {
            "mlp": jax.vmap(model["mlp"])(x),
            "convolution": model["convolution"](jnp.ones((2, 5, 5)) * x[0, 0]),
            "cell": jax.lax.scan(lambda c, x: (model["cell"](x, c), None), start, x)[0],
            "embedding": model["embedding"](jnp.int32(2)),
            "embeddings": jax.vmap(model["embedding"])(jnp.array([1, 2])),
        }

    compare(function, theta, normal(3, 4), law=ug.noise.low_rank(dense_below=0, stacked=0))


def test_bfloat16_products():
    """Within bfloat16's rounding of the exact product: the perturbation itself is not rounded."""
    theta, x = {"w": normal(64, 8).astype(jnp.bfloat16)}, normal(4, 64).astype(jnp.bfloat16)
    law = ug.noise.low_rank(dense_below=0)

    @jax.jit
    def run():
        drawn = law.sample(KEY, (), theta, 1)
        one = jax.tree.map(lambda a: a[0], drawn)
        found = quax.quaxify(jnp.matmul)(x, law.perturb(theta, one, 1e-4)["w"])
        noise = law.contract(drawn, jnp.ones(1))["w"]
        small = x.astype(jnp.float32) @ noise * 1e-4
        return found, x.astype(jnp.float32) @ theta["w"].astype(jnp.float32), small

    found, without, small = run()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), without + small, rtol=1e-2, atol=2e-2)


def test_what_adds_up_a_leaf_warns():
    theta = {"layer": {"w": normal(64, 32)}}
    law = ug.noise.low_rank()
    factored, arrays = perturbed(theta, law)

    def penalty(theta):
        return jnp.sum(theta["layer"]["w"] ** 2)

    words = (
        r"theta\['layer'\]\['w'\] is materialised .* 0.00781 MiB each \(float32\[64,32\]\): .*pow"
        r".*`stacked=`.*`dense_below`"
    )
    with pytest.warns(UserWarning, match=words):
        found = jax.jit(quax.quaxify(penalty))(factored)
    np.testing.assert_allclose(found, np.sum(np.asarray(arrays["layer"]["w"]) ** 2), rtol=1e-5)


def test_theta_as_a_state_is_added_up():
    """A state is arrays, so that one that begins as a leaf of theta is materialised."""
    theta = normal(8, 8)

    def step(key, theta, s, t):
        s = 0.9 * s
        return s, jnp.sum(s**2)

    problem = ug.UnrolledProblem(lambda key, theta: theta, step, 2)
    es = ug.full_es(problem, sigma=0.1, num_pairs=2, noise=ug.noise.low_rank(dense_below=0))
    with pytest.warns(UserWarning, match="theta is materialised"):
        jax.eval_shape(es.estimate, KEY, theta, jax.eval_shape(es.init, KEY, theta))


def test_a_product_outside_of_a_step():
    theta = {"w": normal(6, 4)}
    factored, arrays = perturbed(theta, ug.noise.low_rank(dense_below=0))
    x, y, product = normal(3, 6), normal(4, 2), jax.jit(ug.noise.matmul)
    w = np.asarray(arrays["w"])
    np.testing.assert_allclose(product(x, factored["w"]), x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product(factored["w"], y), w @ y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product(x, w), x @ w, rtol=1e-5, atol=1e-5)


def test_without_quax(monkeypatch):
    from unrollgrad.noise import _arrays

    theta = {"w": np.ones((6, 4), np.float32)}
    law = ug.noise.low_rank(dense_below=0)
    drawn = jax.eval_shape(lambda: law.sample(KEY, (), theta, 1))
    one = jax.tree.map(lambda x: np.ones(x.shape[1:], np.float32), drawn)
    _arrays.low_rank_type.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "quax", None)
        with pytest.raises(ImportError, match=r'pip install "unrollgrad\[lowrank\]"'):
            law.perturb(theta, one, 0.1)


def test_a_law_prints_as_its_call():
    """Alone, and among an estimator's arguments."""
    law, (problem, _) = ug.noise.low_rank(2, factors="gaussian"), ug.problems.influence_balancing()
    assert repr(law) == "low_rank(2, factors='gaussian')"
    assert repr(ug.full_es(problem, sigma=0.1, noise=law)) == f"full_es(sigma=0.1, noise={law})"
    assert repr(ug.noise.rademacher()) == "rademacher()"
    assert repr(ug.noise.Noise(law.init, law.sample)) == repr(law)
    assert repr(ug.noise.Noise(lambda theta: (), law.sample)) == "Noise(sample)"
