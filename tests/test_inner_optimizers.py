"""Inner optimizers under differentiation: correct, or a message names the remedy."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import numbers, raises
from unrollgrad._training import inner_optimizers

KEY = jax.random.key(0)
RATE = jnp.float32(-2.0)  # the logarithm of the inner learning rate
ZERO = "where an inner gradient is exactly zero"
PLAIN = "on plain gradients"


def make(optimizer, start=(0.0, 3.0, 1.0), dtype=jnp.float32, horizon=8):
    """A quadratic in (w, its square root); the third coordinate is at its optimum."""

    def loss(theta, w, batch, key):
        return jnp.mean((w["w"].astype(jnp.float32) - 1.0) ** 2)

    return ug.training_problem(
        loss=loss,
        init_params=lambda key: {"w": jnp.array(start, dtype)},
        optimizer=optimizer,
        sample_batch=lambda key: None,
        horizon=horizon,
    )


def gradients(theta, *estimators):
    """The gradients of each estimator's first call, all in one program."""

    def all_of_them(theta):
        return [e.estimate(KEY, theta, e.init(KEY, theta))[0].grad for e in estimators]

    return jax.jit(all_of_them)(theta)


def gradient(problem, factory=ug.bptt, theta=RATE, **settings):
    return gradients(theta, factory(problem, **settings))[0]


def shapes_of(tree):
    return inner_optimizers.shapes(tree)


def said(optimizer, params, theta=RATE):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inner_optimizers.warn_of_derivatives(optimizer, shapes_of(theta), shapes_of(params))
    return [str(w.message) for w in caught]


OPTIMIZERS = {
    "adam": (lambda lr: optax.adam(lr), ZERO),
    "nadamw": (lambda lr: optax.nadamw(lr), ZERO),
    "rmsprop, eps outside": (lambda lr: optax.rmsprop(lr, eps_in_sqrt=False), ZERO),
    "radam": (lambda lr: optax.radam(lr), PLAIN),
    "radam eps_root": (lambda lr: optax.radam(lr, eps_root=1e-8), PLAIN),
    "adam eps_root": (lambda lr: optax.adam(lr, eps_root=1e-8), None),
    "adamw eps_root": (lambda lr: optax.adamw(lr, eps_root=1e-8), None),
    "rmsprop": (lambda lr: optax.rmsprop(lr, momentum=0.9), None),
    "sgd": (lambda lr: optax.sgd(lr), None),
    "momentum": (lambda lr: optax.sgd(lr, 0.9, nesterov=True), None),
    "clipped": (lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)), None),
    "lion": (lambda lr: optax.lion(lr), None),
    "a line search": (lambda lr: optax.lbfgs(lr, memory_size=2), None),
}


@pytest.mark.parametrize(("optimizer", "expected"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_which_optimizers_are_warned_of(optimizer, expected):
    messages = said(lambda theta, t: optimizer(jnp.exp(theta)), {"w": jnp.ones((20, 3))})
    assert [expected] == [m for m in [ZERO, PLAIN] if m in "".join(messages)] or not expected
    assert len(messages) == (expected is not None)


def averaged(problem, **settings):
    return ug.average(ug.tbptt(problem, **settings), 2)


@pytest.mark.parametrize(
    ("factory", "settings"),
    [(ug.bptt, {}), (averaged, {"truncation": 4})],
)
def test_adam_at_a_zero_gradient_is_warned_of_once_and_eps_root_cures_it(factory, settings):
    problem = make(lambda theta, t: optax.adam(jnp.exp(theta)))
    inside = lambda: gradient(problem, factory, **settings)  # noqa: E731
    with pytest.warns(UserWarning, match="eps_root=1e-8") as caught:
        assert np.isnan(float(jax.jit(inside)()))  # the warning is right
    assert len(caught) == 1
    jax.make_jaxpr(lambda: 2 * inside())()  # no second warning, which would be an error
    cured = make(lambda theta, t: optax.adam(jnp.exp(theta), eps_root=1e-8))
    assert np.isfinite(float(gradient(cured, factory, **settings)))


def test_derivatives_with_eps_root_are_those_of_central_differences():
    """Derivatives for rate, both decays and eps_root; one coordinate has no gradient."""

    def optimizer(theta, t):
        b1, b2 = jax.nn.sigmoid(theta["b1"]), jax.nn.sigmoid(theta["b2"])
        return optax.adam(jnp.exp(theta["rate"]), b1, b2, eps_root=jnp.exp(theta["eps_root"]))

    problem = make(optimizer)
    theta = {"rate": RATE, "b1": 2.0, "b2": 1.0, "eps_root": -3.0}
    theta = jax.tree.map(jnp.float32, theta)
    exact = gradient(problem, theta=theta)
    loss = jax.jit(lambda theta: ug.episode_loss(problem, KEY, theta))
    for name, x in theta.items():
        up, down = (float(loss({**theta, name: x + h})) for h in (0.02, -0.02))
        np.testing.assert_allclose(exact[name], (up - down) / 0.04, rtol=5e-3, atol=2e-5)


def test_radam_is_nan_in_reverse_mode_from_its_third_update_on():
    with pytest.warns(UserWarning, match="update 3.*optax.radam is one that does"):
        reverse = gradient(make(lambda theta, t: optax.radam(jnp.exp(theta), eps_root=1e-8)))
    assert np.isnan(float(reverse))
    cured = make(lambda theta, t: optax.nadam(jnp.exp(theta), eps_root=1e-8))
    assert np.isfinite(float(gradient(cured)))


def test_evolution_strategies_and_forward_runs_are_not_warned():
    for optimizer in [optax.adam, optax.radam]:
        problem = make(lambda theta, t: optimizer(jnp.exp(theta)))  # noqa: B023
        assert np.isfinite(float(gradient(problem, ug.pes, truncation=4, sigma=0.1)))
        jax.make_jaxpr(lambda theta: ug.episode_loss(problem, KEY, theta))(RATE)  # noqa: B023


def test_any_differentiation_is_seen():
    for differentiate in [jax.grad, jax.jacfwd]:
        problem = make(lambda theta, t: optax.adam(jnp.exp(theta)))
        with pytest.warns(UserWarning, match=ZERO):
            jax.make_jaxpr(differentiate(functools.partial(ug.episode_loss, problem, KEY)))(RATE)


def test_optimizers_that_a_trial_does_not_suit():
    params = {"w": jnp.ones((20, 3)), "b": jnp.ones(3)}

    def by_name(theta, t):
        return optax.multi_transform(
            {"adam": optax.adam(jnp.exp(theta)), "sgd": optax.sgd(0.1)}, {"w": "adam", "b": "sgd"}
        )

    assert len(said(by_name, params)) == 1  # the trial has the real structure

    def fails(updates, state, params=None):
        raise ZeroDivisionError

    raising = optax.GradientTransformation(lambda params: (), fails)
    assert said(lambda theta, t: raising, params) == []

    @jax.jit
    def inside(scale):  # the trial cannot know a traced value in the optimizer
        return gradient(make(lambda theta, t: optax.adam(scale * jnp.exp(theta)), (0.0, 3.0)))

    assert np.isfinite(float(inside(1.0)))


def test_float16_weights_where_eps_is_rounded_to_zero():
    """init warns once; with a larger eps the forward run is finite."""
    small = make(lambda theta, t: optax.adam(jnp.exp(theta)), dtype=jnp.float16)
    with pytest.warns(UserWarning, match=r"float16, in which its eps .*eps=1e-4") as caught:
        assert not np.isfinite(float(gradient(small, ug.pes, truncation=4, sigma=0.1)))
    assert len(caught) == 1
    cured = make(lambda theta, t: optax.adam(jnp.exp(theta), eps=1e-4), dtype=jnp.float16)
    assert np.isfinite(float(gradient(cured, ug.pes, truncation=4, sigma=0.1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyperparameters_that_are_kept_in_16_bits(dtype):
    def optimizer(theta, t, **more):
        inner = optax.inject_hyperparams(optax.adam, **more)
        return optax.chain(optax.clip(1.0), inner(jnp.exp(theta), eps=1e-4, eps_root=1e-4))

    problem = make(optimizer, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError,
            match=rf"hyperparameter 'b1' in {dtype.__name__}.*\['b1'\].*hyperparam_dtype=",
        ):
            gradient(problem, ug.pes, truncation=4, sigma=0.1)


def test_a_number_that_16_bits_round_to_1_is_named_everywhere():
    """optax.inject_hyperparams(adam) keeps b2 = 0.999 as 1.0, and all updates would be NaN."""
    w = jnp.ones(2, jnp.bfloat16)

    def inner(w, theta):
        return jnp.sum((w - theta) ** 2)

    approximate = ug.implicit.hypergradient(inner, inner, solver=ug.implicit.identity(0.5))
    problem = ug.UnrolledProblem(lambda k, th: th, lambda k, th, x, t: (x, jnp.sum(x**2)), 2)

    def fitted(adam):
        return ug.fit(ug.bptt(problem), w, adam, num_steps=1, key=jax.random.key(0)).theta

    def solved(inner_optimizer, outer_optimizer):
        given = {"inner_optimizer": inner_optimizer, "outer_optimizer": outer_optimizer}
        return ug.bilevel.solve(inner, approximate, w, w, inner_steps=1, num_steps=1, **given).theta

    def unrolled(adam):
        return ug.bilevel.unrolled(inner, inner, optimizer=adam, num_steps=1)(w, w).grad

    sgd = optax.sgd(0.1)
    runs = {
        "`optimizer`": fitted,
        "`outer_optimizer`": lambda adam: solved(sgd, adam),
        "the inner optimizer": lambda adam: solved(adam, sgd),
        "the inner optimizer keeps": unrolled,
    }
    for name, run in runs.items():
        with raises(ValueError, name, "in bfloat16", "hyperparam_dtype=jnp.float32"):
            run(optax.inject_hyperparams(optax.adam)(1e-3, eps_root=1e-4))
    wide = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(0.25, eps_root=1e-4)
    plain = optax.adam(0.25, eps_root=1e-4)
    assert jnp.array_equal(fitted(wide), fitted(plain))
    assert jnp.array_equal(solved(sgd, wide), solved(sgd, plain))
    # A rate loses digits in 16 bits, and is not refused where it can be read.
    assert jnp.isfinite(fitted(optax.inject_hyperparams(optax.sgd)(0.01))).all()


def test_a_rate_from_a_bf16_theta_is_the_users_own():
    def optimizer(theta, t):
        return optax.inject_hyperparams(optax.adam)(jnp.exp(theta), eps_root=1e-4)

    bptt = ug.bptt(make(optimizer))
    assert np.isfinite(numbers(gradients(jnp.bfloat16(-3.0), bptt)[0]))


def test_bf16_weights_with_injected_float32_hyperparameters():
    """The gradients are finite and equal those of float32 weights within a few percent."""

    def optimizer(theta, t):
        inner = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)
        return inner(jnp.exp(theta["rate"]), jax.nn.sigmoid(theta["b1"]), eps_root=1e-6)

    theta = {"rate": jnp.float32(-3.0), "b1": jnp.float32(2.0)}
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        problem = make(optimizer, (0.0, 3.0, -2.0), dtype)
        pes = ug.pes(problem, truncation=4, sigma=0.3, num_pairs=50)
        found.append(gradients(theta, ug.bptt(problem), pes))
    chex.assert_trees_all_close(*map(numbers, found), rtol=0.05, atol=5e-3)


def test_theta_in_16_bits():
    problem = make(lambda theta, t: optax.adam(jnp.exp(theta), eps_root=1e-8))
    made = ug.bptt(problem), ug.pes(problem, truncation=4, sigma=0.1, num_pairs=20)
    full = gradients(RATE, *made)
    for dtype in [jnp.bfloat16, jnp.float16]:
        low = gradients(RATE.astype(dtype), *made)
        assert [g.dtype for g in low] == [dtype] * 2
        np.testing.assert_allclose(np.array(low, np.float32), np.array(full), rtol=0.05)


def test_whole_numbers_among_the_hyperparameters():
    """optax takes whole numbers; injected they are arrays, which optax may refuse."""
    start = np.zeros((4, 3))
    plain = make(lambda theta, t: optax.adafactor(jnp.exp(theta), min_dim_size_to_factor=2), start)
    assert np.isfinite(float(gradient(plain, ug.pes, truncation=4, sigma=0.1)))

    def injected(theta, t, static_args=()):
        inner = optax.inject_hyperparams(optax.adafactor, static_args=static_args)
        return inner(jnp.exp(theta), min_dim_size_to_factor=2)

    with pytest.raises(TypeError, match=r"needs a Python number .*static_args"):
        gradient(make(injected, start), ug.pes, truncation=4, sigma=0.1)
    named = make(lambda theta, t: injected(theta, t, "min_dim_size_to_factor"), start)
    assert np.isfinite(float(gradient(named, ug.pes, truncation=4, sigma=0.1)))


@pytest.mark.parametrize(
    ("inject", "factory", "settings"),
    [
        (optax.inject_hyperparams, ug.tbptt, {"truncation": 4}),
        (
            lambda factory: lambda *a: optax.chain(optax.inject_hyperparams(factory)(*a)),
            ug.truncated_es,
            {"truncation": 4, "sigma": 0.1},
        ),
    ],
    ids=["tbptt, alone", "truncated_es, in a chain"],
)
def test_theta_counts_in_every_window_through_injected_hyperparameters(inject, factory, settings):
    """optax reads them from `init`'s state; here they equal plain optax's hyperparameters."""
    windows = []
    for make_sgd in [inject(optax.sgd), optax.sgd]:
        problem = make(lambda theta, t: make_sgd(jnp.exp(theta) / (t + 1)))  # noqa: B023
        estimator = factory(problem, **settings)
        state, here = estimator.init(KEY, RATE), []
        for window in range(2):
            theta = RATE + 0.5 * window  # theta changes between the windows of one episode
            out, state = estimator.estimate(jax.random.key(window), theta, state)
            here.append(float(out.grad))
        windows.append(here)
    assert all(abs(g) > 1e-3 for g in windows[1])
    np.testing.assert_allclose(*windows, rtol=1e-5)


def test_injected_hyperparameters_keep_optax_schedules_and_nesting():
    def optimizer(theta, t):
        def inner(learning_rate, scale):
            injected = optax.inject_hyperparams(optax.sgd)(jnp.exp(theta))
            return optax.chain(injected, optax.scale(learning_rate * scale))

        schedule = optax.linear_schedule(1.0, 0.2, 8)
        return optax.inject_hyperparams(inner)(schedule, 1.0)

    def plain(theta, t):
        return optax.sgd(jnp.exp(theta) * (1.0 - 0.1 * t))

    injected, by_hand = (gradient(make(o), ug.tbptt, truncation=8) for o in (optimizer, plain))
    np.testing.assert_allclose(injected, by_hand, rtol=1e-5)


@pytest.mark.parametrize("shape", [(20, 10), (400, 300)], ids=["as it is", "clipped"])
def test_a_rate_for_every_weight(shape):
    """Theta fits the weights only if both or neither are clipped."""
    theta = {"lr": jnp.zeros(shape)}

    def rates(theta, t):
        return optax.adam(jnp.exp(theta["lr"]), eps_root=0.0)

    assert ZERO in "".join(said(rates, jnp.ones(shape), theta))
    cured = lambda theta, t: optax.adam(jnp.exp(theta["lr"]), eps_root=1e-8)  # noqa: E731
    assert said(cured, jnp.ones(shape), theta) == []


@pytest.mark.parametrize("name", ["dog", "muon"])
def test_optimizers_that_are_sound_on_the_weights_they_get(name):
    """dog takes a root only at the first weights; muon passes only vectors to Adam."""

    def optimizer(theta, t):
        return getattr(optax.contrib, name)(jnp.exp(theta))

    start = np.random.default_rng(0).normal(size=(4, 3))
    assert np.isfinite(float(gradient(make(optimizer, start))))  # a warning is an error
    if name == "muon":
        vectors = said(optimizer, {"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
        assert ZERO in "".join(vectors)
