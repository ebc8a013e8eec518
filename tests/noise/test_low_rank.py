"""Low-rank noise: its moments, its estimators against dense noise, and its size in memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import present, raises
from tests.statistics import Samples
from unrollgrad._core.descriptions import settings_of
from unrollgrad.noise._dense import after

pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")

KEY = jax.random.key(0)
LEAVES = {"b": (3,), "u": (3, 5), "w": (4, 6)}
COUNT = 20_000


def gradient():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in LEAVES.items()}


def inner(x, y):
    return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def noise(law, key, theta, num_pairs):
    """The perturbations that the factors stand for, leading axis ``num_pairs``."""
    drawn = law.sample(key, law.init(theta), theta, num_pairs)
    return jax.vmap(lambda weights: law.contract(drawn, weights))(jnp.eye(num_pairs))


def estimates(law, theta, g, num_pairs=1, spoil=lambda e: e):
    """Estimates of a linear loss's gradient g, from independent draws."""

    def one(key):
        e = spoil(noise(law, key, theta, num_pairs))
        slopes = jax.vmap(lambda e: inner(g, e))(e)
        return flat(jax.tree.map(lambda x: jnp.tensordot(slopes, x, 1) / num_pairs, e))

    return jax.lax.map(one, jax.random.split(KEY, COUNT), batch_size=1000)


def formula(factors, rank):
    """The closed form of the variance, several leaves, one pair."""
    squares = {k: float(np.sum(x**2)) for k, x in gradient().items()}
    total, dim = sum(squares.values()), sum(int(np.prod(s)) for s in LEAVES.values())
    matrices = {k: sum(LEAVES[k]) for k in "uw"}
    if factors == "gaussian":
        extra = {k: 2 / rank * (sides + 1) for k, sides in matrices.items()}
        return (dim + 1) * total + sum(extra[k] * squares[k] for k in "uw")
    # A sign's fourth moment makes a sum of `rank` products vary within a matrix.
    return (dim - 1) * total + sum(2 * (1 - 1 / rank) * squares[k] for k in "uw")


CASES: list[tuple[Any, int]] = [
    (factors, rank) for factors in ("sign", "gaussian") for rank in (1, 2, 4)
]


def controls(theta, g):
    """Draws with a mistake each; the tests below would notice them."""
    law = ug.noise.low_rank(2, dense_below=0)
    square = ug.noise.low_rank(dense_below=0)

    def forgotten(e):  # 1 / sqrt(rank)
        return e | {k: e[k] * jnp.sqrt(2.0) for k in "uw"}

    def symmetric(key):  # the left factor again in place of the right one
        drawn: Any = square.sample(key, (), jnp.zeros((4, 4)), 1)
        mistaken = drawn._replace(b=drawn.a.reshape(drawn.b.shape))
        e = jnp.asarray(square.contract(mistaken, jnp.ones(1)))
        return jnp.sum(e * g["w"][:, :4]) * e.ravel()

    def shared(e):  # one key for two leaves
        return e | {"u": e["w"][:, :3, :5]}

    return {
        "forgotten": estimates(law, theta, g, spoil=forgotten),
        "symmetric": jax.vmap(symmetric)(jax.random.split(KEY, COUNT)),
        "shared": estimates(square, theta, g, spoil=shared),
    }


@pytest.fixture(scope="module")
def drawn():
    """All samples, from one program."""
    g = gradient()
    theta = jax.tree.map(jnp.zeros_like, g)
    only = {"w": theta["w"]}

    @jax.jit
    def run():
        out = {
            f"{case[0]} {case[1]}": estimates(
                ug.noise.low_rank(case[1], case[0], dense_below=0), theta, g
            )
            for case in CASES
        }
        for num_pairs in (1, 4, 8):  # in blocks of max(m, n) = 6
            law = ug.noise.low_rank(1, "orthogonal", dense_below=0)
            out[f"orthogonal {num_pairs}"] = estimates(law, only, {"w": g["w"]}, num_pairs)
        return out | controls(theta, g)

    return {case: Samples(np.asarray(x)) for case, x in run().items()}


@pytest.mark.parametrize(("factors", "rank"), CASES)
def test_mean_and_variance(drawn, factors, rank):
    s, truth = drawn[f"{factors} {rank}"], np.asarray(flat(gradient()))
    assert s.error_in_se(truth) < 5
    variance, se = s.variance()
    expected = formula(factors, rank)
    assert se < 0.03 * expected
    assert abs(variance - expected) < 5 * se


def test_ranks_and_factors_differ_by_more_than_the_tolerance(drawn):
    """The power of the test above: the wrong law's or rank's number would be seen."""
    variance, se = drawn["gaussian 1"].variance()
    for other in (("gaussian", 2), ("gaussian", 4), ("sign", 1)):
        assert abs(variance - formula(*other)) > 7 * se
    variance, se = drawn["sign 1"].variance()
    assert abs(variance - formula("gaussian", 4)) > 7 * se


def test_signs_of_rank_one_beat_dense_gaussian_noise(drawn):
    size, dim = np.sum(np.asarray(flat(gradient())) ** 2), sum(map(np.prod, LEAVES.values()))
    variance, se = drawn["sign 1"].variance()
    assert variance - 3 * se < (dim + 1) * size


@pytest.mark.parametrize(
    ("num_pairs", "expected"),
    # The last is a block of 6 and one of 2: weights 6/8 and 2/8, variances 24/6 - 1 and 24/2 - 1.
    [(1, 23), (4, 5), (8, (6 / 8) ** 2 * 3 + (2 / 8) ** 2 * 11)],
)
def test_orthogonal_pairs(drawn, num_pairs, expected):
    """P / M - 1 for M <= max(m, n) pairs; a second block is independent of the first."""
    s, g = drawn[f"orthogonal {num_pairs}"], gradient()["w"]
    variance, se = (x / np.sum(g**2) for x in s.variance())
    assert s.error_in_se(g.ravel()) < 5
    assert abs(variance - expected) < 5 * se
    assert abs(variance - 25 / num_pairs) > 8 * se  # dense Gaussian noise


def test_the_bias_of_a_cubic_beyond_gaussian_noise_falls_like_one_over_the_rank():
    """At W = 0 the estimate of d/dW (u W v)^3 / 6 is z^4 sigma^2 / 6 along u v, with z = u E v.

    z is a sum of ``rank`` independent products x y / sqrt(rank), of unit variance. So E z^4 =
    3 + (E x^4 E y^4 - 3) / rank, where E x^4 is 3 for Gaussian factors, 3 - 2 sum u^4 for signs,
    and E z^4 = 3 for dense Gaussian noise.
    """
    u, v = np.full(4, 0.5), np.array([0.6, 0.0, 0.8])
    fourth = {"gaussian": 9.0, "sign": (3 - 2 * np.sum(u**4)) * (3 - 2 * np.sum(v**4))}

    def along(law, key):
        drawn = law.sample(key, (), jnp.zeros((4, 3)), 200_000)
        one = lambda e: law.contract(jax.tree.map(lambda x: x[None], e), jnp.ones(1))  # noqa: E731
        return jnp.einsum("nij,i,j->n", jax.vmap(one)(drawn), u, v) ** 4

    @jax.jit
    def run():
        laws = {case: ug.noise.low_rank(case[1], case[0], dense_below=0) for case in CASES}
        return {case: along(law, KEY) for case, law in laws.items()}

    for (factors, rank), values in run().items():
        samples = Samples(np.asarray(values)[:, None])
        assert samples.error_in_se(np.array([3 + (fourth[factors] - 3) / rank])) < 5
        if rank < 4:  # the power: the next rank's number would be seen
            assert samples.error_in_se(np.array([3 + (fourth[factors] - 3) / rank / 2])) > 5


def test_mistakes_would_be_noticed(drawn):
    g = gradient()
    truth = np.asarray(flat(g))
    assert drawn["forgotten"].error_in_se(truth) > 20
    doubled = np.asarray(flat({"b": g["b"], "u": 2 * g["u"], "w": 2 * g["w"]}))
    assert drawn["forgotten"].error_in_se(doubled) < 5
    assert drawn["symmetric"].error_in_se(g["w"][:, :4].ravel()) > 20
    assert drawn["shared"].error_in_se(truth) > 20


def problem():
    """A loss that is not quadratic in theta; the state remembers, and is evaluated."""

    def step(key, theta, s, t):
        y = jnp.tanh(jnp.sin(s + t) @ theta["w"] + theta["b"]) @ theta["v"]
        return 0.7 * s + 0.3 * y[:3], jnp.mean((y - 1) ** 2)

    def init(key, theta):
        return jnp.ones(3) @ theta["w"][:, :3]

    def evaluate(key, theta, s):
        return jnp.sum((s @ theta["w"]) ** 2)

    keys = jax.random.split(KEY, 3)
    shapes = {"w": (3, 5), "b": (5,), "v": (5, 4)}
    theta = {
        k: 0.5 * jax.random.normal(key, s) for key, (k, s) in zip(keys, shapes.items(), strict=True)
    }
    return ug.UnrolledProblem(init, step, 6, evaluate), theta


def guiding(count):
    """A subspace for ``problem``'s theta."""
    return jax.tree.map(lambda x: np.ones((count, *x.shape), np.float32), problem()[1])


def as_arrays(law):
    """The same noise as arrays: what a dense law draws."""

    def sample(key, law_state, theta, num_pairs):
        return noise(law, key, theta, num_pairs)

    return ug.noise.Noise(law.init, sample)


def along(estimator, theta, windows):
    """The gradients of an episode's windows while theta moves."""

    def call(state, i):
        moved = jax.tree.map(lambda x: x + 0.01 * i, theta)
        estimate, state = estimator.estimate(jax.random.fold_in(KEY, i), moved, state)
        return state, flat(estimate.grad)

    return jax.lax.scan(call, estimator.init(KEY, theta), jnp.arange(windows))[1]


def test_estimators_with_factors_are_those_with_arrays():
    """Window by window: the sum of earlier factors is drawn again, the arrays' is kept."""
    unrolled, theta = problem()
    law = ug.noise.low_rank(2, dense_below=0)
    common = {"sigma": {"w": 0.1, "b": 0.3, "v": 0.2}, "num_pairs": 3}

    def estimators(noise):
        return {
            "full_es": (ug.full_es(unrolled, **common, noise=noise), 1),
            "truncated_es": (ug.truncated_es(unrolled, truncation=2, **common, noise=noise), 3),
            "pes": (ug.pes(unrolled, truncation=1, **common, noise=noise), 7),
            "gpes": (ug.gpes(unrolled, truncation=1, noise_period=2, **common, noise=noise), 6),
            "es_single": (ug.es_single(unrolled, truncation=2, **common, noise=noise), 4),
        }

    @jax.jit
    def run():
        both = estimators(law), estimators(as_arrays(law))
        return [{k: along(e, theta, n) for k, (e, n) in made.items()} for made in both]

    by_factors, by_arrays = run()
    for name, expected in by_arrays.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            by_factors[name], expected, rtol=0, atol=1e-6 * scale, err_msg=name
        )
        assert np.ptp(np.asarray(expected)) > 0.1 * scale
    # Noise of the present period alone, or of one more, would be far off.
    assert np.abs(by_arrays["pes"] - by_arrays["gpes"][:1]).max() > 0.1


def test_nothing_of_thetas_size_is_kept():
    unrolled, theta = problem()
    law = ug.noise.low_rank(dense_below=0)
    for estimator in (
        ug.pes(unrolled, truncation=1, sigma=0.1, num_pairs=3, noise=law),
        ug.es_single(unrolled, truncation=1, sigma=0.1, num_pairs=3, noise=law),
    ):
        carried = jax.eval_shape(estimator.init, KEY, theta).carried
        assert carried.accumulated is None
        assert {x.shape for x in jax.tree.leaves(carried.states)} == {(6, 3)}


def test_no_perturbed_matrix_is_in_the_program(optimized):
    """A 512 x 512 layer and 256 pairs: no buffer has 256 (or 512) x 512 x 512 numbers.

    The product with the layer itself is one for the whole population.
    """
    theta = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def step(key, theta, s, t):
        s = jnp.tanh(s @ theta["w"])
        return s, jnp.mean(s**2)

    unrolled = ug.UnrolledProblem(lambda key, theta: jnp.ones(512), step, 4)

    def lowered(law):
        estimator = ug.pes(unrolled, truncation=2, sigma=0.01, num_pairs=256, noise=law)
        state = jax.eval_shape(estimator.init, KEY, theta)
        return jax.jit(estimator.estimate).lower(KEY, theta, state)

    def largest(text):
        shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    low_rank = lowered(ug.noise.low_rank())
    product = r"dot_general.*tensor<2x256x512xf32>, tensor<512x512xf32>\)"
    assert len(re.findall(product, low_rank.as_text())) == 1
    thin = low_rank.compile()
    assert largest(thin.as_text()) <= 2 * 256 * 512  # both signs' states; w has as many numbers
    factors, activations = 256 * (512 + 512) * 4, 512 * 512 * 4
    temporary = present(thin.memory_analysis()).temp_size_in_bytes
    assert temporary <= 2 * (factors + activations)
    assert largest(lowered(ug.noise.rademacher()).compile().as_text()) >= 256 * 512 * 512


def test_bfloat16(optimized):
    """A matrix is not rounded; a vector is weighed with what is left after rounding."""
    theta = {"w": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    law = ug.noise.low_rank(dense_below=0)
    slope = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)

    def step(key, theta, s, t):
        y = jnp.eye(8, dtype=jnp.float32) @ theta["w"].astype(jnp.float32)
        return s, jnp.sum(y * slope) + slope @ theta["b"].astype(jnp.float32)

    unrolled = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 1)
    sigma = 0.006  # bfloat16 near 1 resolves 1/128 above and 1/256 below
    estimator = ug.full_es(unrolled, sigma=sigma, noise=law)
    key = jax.random.fold_in(jax.random.fold_in(KEY, 2), 0)

    @jax.jit
    def run():
        estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
        unit = jax.tree.map(lambda x: x[0], noise(law, key, theta, 1))
        return jax.tree.map(lambda x: x.astype(jnp.float32), (estimate.grad, unit, slope))

    grad, unit, slopes = jax.tree.map(np.asarray, run())
    up, down = (
        (1 + s * sigma * unit["b"]).astype(jnp.bfloat16).astype(np.float32) for s in (1, -1)
    )
    realised = (up - down) / (2 * sigma)
    assert np.abs(realised - unit["b"]).max() > 0.1
    difference = np.sum(unit["w"] * slopes) + slopes @ realised
    expected = {"b": realised * difference, "w": unit["w"] * difference}
    for k, x in expected.items():
        np.testing.assert_allclose(grad[k], x, rtol=2e-2, err_msg=k)
    # A sigma under the vectors' resolution is refused; the matrix's does not matter.
    ug.full_es(unrolled, sigma={"w": 1e-6, "b": sigma}, noise=law).init(KEY, theta)
    with raises(ValueError, "sigma['b']", "bfloat16"):
        ug.full_es(unrolled, sigma={"w": sigma, "b": 1e-6}, noise=law).init(KEY, theta)


def test_leaves_of_equal_shape_are_drawn_and_added_up_together():
    """Of more leaves only their slices are in the program, whose draws and products stay."""

    def operations(count):
        theta = [{"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)} for _ in range(count)]
        law = ug.noise.low_rank()

        def both(key, weights):
            drawn = law.sample(key, (), theta, 4)
            return law.perturb(theta, jax.tree.map(lambda x: x[0], drawn), 0.1), law.contract(
                drawn, weights
            )

        text = jax.jit(both).lower(KEY, jnp.ones(4)).as_text()
        found = re.findall(r"stablehlo\.(\w+)", text)
        return {name: found.count(name) for name in set(found)}

    few, many = operations(2), operations(32)
    assert many["dot_general"] == few["dot_general"] == 2  # of matrices, and of vectors
    for name in ("shift_right_logical", "xor", "while"):
        assert many[name] == few[name]
    assert many["slice"] > few["slice"]


@jax.enable_x64(True)
def test_leaves_that_differ_only_in_their_axes():
    """A kernel, a stack of one layer and matrices of two dtypes: each has 16 rows, 32 columns."""
    shapes = {"conv": (2, 2, 4, 32), "stack": (1, 16, 32), "w": (16, 32), "wide": (16, 32)}
    dtypes = {k: np.float64 if k == "wide" else np.float32 for k in shapes}
    theta = {k: np.zeros(shape, dtypes[k]) for k, shape in shapes.items()}
    law = ug.noise.low_rank(factors="orthogonal")
    both = jax.jit(lambda: (law.sample(KEY, (), theta, 4), noise(law, KEY, theta, 4)))()
    drawn, found = jax.tree.map(np.asarray, both)
    for k, e in found.items():
        assert e.shape == (4, *shapes[k])
        assert e.dtype == dtypes[k]
        np.testing.assert_allclose(e, (drawn[k].a * drawn[k].b)[..., 0], rtol=1e-6, err_msg=k)
        flattened = e.reshape(4, -1)
        np.testing.assert_allclose(flattened @ flattened.T, 512 * np.eye(4), atol=1e-3, err_msg=k)


def test_which_leaves_have_factors():
    theta = {
        "wide": (300, 200),
        "thin": (300, 4),
        "stack": (7, 30, 20),
        "flax conv": (3, 3, 16, 32),
        "torch conv": (32, 16, 3, 3),
        "bias": (32, 1, 1),
    }
    theta = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in theta.items()}

    def shapes(law):
        drawn = jax.eval_shape(lambda t: law.sample(KEY, (), t, 2), theta)
        return {k: jax.tree.map(lambda x: x.shape[1:], x) for k, x in drawn.items()}

    found = shapes(ug.noise.low_rank())
    assert found == {
        "wide": ((300, 1, 1), (1, 200, 1)),
        "thin": (300, 4),
        "stack": ((7, 30, 1, 1), (7, 1, 20, 1)),
        "flax conv": ((3, 3, 16, 1, 1), (1, 1, 1, 32, 1)),
        "torch conv": ((32, 1, 1, 1, 1), (1, 16, 3, 3, 1)),
        "bias": (32, 1, 1),
    }
    every = shapes(ug.noise.low_rank(2, dense_below=0))
    assert every["thin"] == ((300, 1, 2), (1, 4, 2))
    stacked = {k: int(k == "flax conv") for k in theta}
    given = shapes(ug.noise.low_rank(stacked=stacked, dense_below=0))
    assert given["flax conv"] == ((3, 3, 16, 1, 1), (3, 1, 1, 32, 1))
    assert given["stack"] == ((7, 30, 1, 1), (1, 1, 20, 1))


def test_errors():
    with raises(ValueError, "`factors`", "'normal'"):
        ug.noise.low_rank(factors="normal")  # type: ignore[bad-argument-type]
    with raises(ValueError, "`rank` must be at least 1"):
        ug.noise.low_rank(0)
    cases: list[tuple[Any, dict[str, Any], list[str]]] = [
        (ValueError, {"stacked": -1}, ["`stacked` must be at least 0; got -1", "leading axes"]),
        (ValueError, {"stacked": {"w": -2}}, ["`stacked['w']` must be at least 0; got -2"]),
        (TypeError, {"stacked": 1.0}, ["`stacked` must be a whole number; got 1.0 (float)"]),
        (TypeError, {"dense_below": "x"}, ["`dense_below` must be a whole number; got 'x' (str)"]),
    ]
    for kind, given, words in cases:
        with raises(kind, *words):
            ug.noise.low_rank(**given)
    unrolled, theta = problem()
    with raises(ValueError, "`stacked`", "prefix of theta", "{'x': *}", "{'b': *, 'v': *, 'w': *}"):
        jax.eval_shape(lambda: ug.noise.low_rank(stacked={"x": 1}).sample(KEY, (), theta, 1))
    sigma = {"w": jnp.full((3, 5), 0.1), "b": 0.1, "v": 0.1}
    estimator = ug.full_es(unrolled, sigma=sigma, noise=ug.noise.low_rank(dense_below=0))
    with raises(ValueError, "sigma['w'] has shape (3, 5)", "one for each stacked layer"):
        jax.eval_shape(estimator.estimate, KEY, theta, jax.eval_shape(estimator.init, KEY, theta))


def test_another_law_does_not_continue_an_episode():
    """Its noise is not that which the states and the sum of earlier noise have seen."""
    unrolled, theta = problem()
    low_rank = functools.partial(ug.noise.low_rank, dense_below=0)
    for factory, before, law, words in (
        (ug.es_single, ug.noise.gaussian(), ug.noise.rademacher(), ["gaussian()", "rademacher()"]),
        (ug.es_single, ug.noise.gaussian(), low_rank(), ["gaussian()", "low_rank(dense_below=0)"]),
        (ug.pes, low_rank(1), low_rank(rank=2), ["low_rank(", "this is", "low_rank(rank=2"]),
        (ug.pes, low_rank(stacked=0), low_rank(stacked={"w": 0, "b": 0, "v": 1}), ["['v']: 1"]),
    ):
        make = functools.partial(factory, unrolled, truncation=2, sigma=0.1)
        state = jax.eval_shape(make(noise=before).init, KEY, theta)
        with raises(TypeError, "made by", *words, "init"):
            jax.eval_shape(make(noise=law).estimate, KEY, theta, state)

    def each(last):  # a tree of many leaves is shown by its beginning
        many: Any = [*[0] * 40, last]
        return settings_of(low_rank(stacked=many))

    assert each(0) != each(1)
    assert len(each(0)) < 200
    # One law, however it is called; what may change while it is used is not compared.
    two: Any = np.int64(2)
    for before, law in (
        (low_rank(2, "sign"), low_rank(rank=two)),
        (ug.noise.guided(guiding(1), 1), ug.noise.guided(guiding(2), share=0.5, floor=0.1)),
    ):
        state = jax.eval_shape(make(noise=before).init, KEY, theta)
        jax.eval_shape(make(noise=law).estimate, KEY, theta, state)


def test_decompositions_wait_for_each_other():
    """XLA keeps what makes the second wait; two batched ones at once may wait for ever on a CPU."""
    waiting = jax.jit(functools.partial(after, 3))
    rows = jnp.ones((2, 4))
    assert int(waiting(rows)) == 3
    assert int(waiting(rows.at[0, 0].set(jnp.inf))) == 4  # a constant would not need the rows
