"""Samplers as problems: conditions, guidance, adapters, averages, dtypes, and their errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, numbers, present, raises
from tests.samplers import gaussian
from tests.statistics import Samples
from unrollgrad import samplers
from unrollgrad.samplers import _step

KEY, OTHER = jax.random.key(0), jax.random.key(1)
ONE = jnp.ones(())
PROMPTS = jnp.array([[-1.0, 0.5], [2.0, 1.0], [0.0, -2.0]])


def network(theta, x, t, condition):
    return theta["out"] @ jnp.tanh(theta["in"] @ jnp.concatenate([x, condition, t[None]]))


def weights():
    keys = jax.random.split(KEY)
    return {
        "in": 0.5 * jax.random.normal(keys[0], (6, 5)),
        "out": 0.5 * jax.random.normal(keys[1], (2, 6)),
    }


def conditioned(network=network, num_steps=6, eta=1.0):
    """Samples that should be their prompt."""
    return samplers.ddim(
        network,
        gaussian.VP,
        num_steps=num_steps,
        reward=lambda x, condition: -jnp.sum((x - condition) ** 2),
        sample_shape=(2,),
        eta=eta,
        condition=lambda key: PROMPTS[jax.random.randint(key, (), 0, 3)],
    )


def penalised(problem):
    """The reward less a penalty on theta itself."""
    evaluate = present(problem.evaluate)

    def penalty(theta):
        return 0.1 * sum(jnp.sum(w**2) for w in jax.tree.leaves(theta))

    return problem._replace(
        evaluate=lambda key, theta, state: evaluate(key, theta, state) + penalty(theta)
    )


PROBLEM = penalised(conditioned())
ESTIMATORS = {
    "draft": ug.bptt(PROBLEM, remat="step"),
    "draft-2": ug.bptt(PROBLEM, last=2),
    "alignprop": ug.bptt(PROBLEM, last=samplers.cutoff([1] * 6), unbiased=True),
    "adjoint dpm": ug.bptt(PROBLEM, remat="reverse", inverse=samplers.inverse(PROBLEM, 3)),
    "draft_lv": samplers.draft_lv(PROBLEM, 2),
    "skip_path": samplers.skip_path(PROBLEM, 2),
    "adjoint_matching": samplers.adjoint_matching(PROBLEM, weights(), 2.0, regression_steps=4),
    "full_es": ug.full_es(PROBLEM, sigma=0.1, num_pairs=2),
}


@functools.partial(jax.jit, static_argnums=0)
def gradient(estimator, key, theta):
    return estimator.estimate(key, theta, estimator.init(KEY, theta))[0]


def test_the_same_episode_for_all():
    """The loss is minus the reward of the sample that the call's key makes."""
    loss = float(ug.episode_loss(PROBLEM, OTHER, weights()))
    for name in ("draft", "draft-2", "alignprop", "adjoint dpm", "draft_lv", "adjoint_matching"):
        found = gradient(ESTIMATORS[name], OTHER, weights())
        assert float(found.loss) == pytest.approx(loss, rel=1e-5), name
        assert int(found.info.inner_steps) == 6


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_average_of_workers_in_fit(name):
    """``fit`` and ``average`` take each of them; the workers' estimates are those of their keys."""
    workers = ug.average(ESTIMATORS[name], 4)
    result = ug.fit(workers, weights(), optax.adam(1e-2), num_steps=3, key=KEY)
    assert np.all(np.isfinite(result.history["loss"]))
    assert np.all(result.history["grad_norm"] > 0)


def test_a_mean_over_workers_is_the_mean_of_their_estimates():
    """A drawn number of steps is the worker's own, also in a batch."""
    estimator = ESTIMATORS["alignprop"]
    workers = ug.average(estimator, 4)
    keys = [jax.random.fold_in(OTHER, i) for i in range(4)]
    alone = [numbers(gradient(estimator, key, weights()).grad)["in"] for key in keys]
    mean = numbers(gradient(workers, OTHER, weights()).grad)["in"]
    expected = np.mean(alone, axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-4 * np.abs(expected).max())


def test_many_devices_compute_what_one_does():
    """Theta is replicated and the workers' keys are not; a summed gradient would be 4 times it."""
    names = ("alignprop", "adjoint dpm", "draft_lv", "skip_path", "adjoint_matching")
    mesh = ug.make_worker_mesh(4)

    def estimates(**where):
        workers = {name: ug.average(ESTIMATORS[name], 4, **where) for name in names}
        states = {name: w.init(KEY, weights()) for name, w in workers.items()}

        @jax.jit
        def run(theta, states):
            return {
                name: w.estimate(OTHER, theta, states[name])[0].grad for name, w in workers.items()
            }

        return numbers(run(weights(), states))

    one, many = estimates(), estimates(mesh=mesh)
    for name in names:
        for a, b in zip(jax.tree.leaves(one[name]), jax.tree.leaves(many[name]), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max(), err_msg=name)


def by_hand(problem, trained, stop, theta):
    """DRTune as its code has it: every input of the network is a constant."""
    episode_key = OTHER
    for_init, for_step = (jax.random.fold_in(episode_key, i) for i in (0, 1))
    state = problem.init(for_init, theta)
    hold = jax.lax.stop_gradient
    for t in range(stop + 1):
        c = _step.step_of("test", problem).coefficients(t, jnp.float32)
        out = network(theta, hold(state.x), c.time, state.condition)
        out = jnp.where(t in trained, out, hold(out))
        if t == stop:
            return problem.evaluate(
                KEY, theta, state._replace(x=c.data_keep * state.x + c.data_move * out)
            )
        z = jax.random.normal(jax.random.fold_in(for_step, t), (2,))
        state = state._replace(x=c.keep * state.x + c.move * out + c.noise * z)


def test_the_linear_skip_path_is_the_loop_with_constant_inputs():
    theta = weights()
    found = gradient(samplers.skip_path(PROBLEM, 6, early_stop=0.0), OTHER, theta)
    value, grad = jax.jit(
        jax.value_and_grad(functools.partial(by_hand, PROBLEM, tuple(range(6)), 5))
    )(theta)
    assert float(found.loss) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(found.grad), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_guidance_scales_the_gradient():
    theta, empty = weights(), jnp.zeros(2)
    x, t, prompt = jnp.ones(2), jnp.float32(0.3), PROMPTS[1]

    @jax.jit
    def derivatives(theta):
        def total(network):
            return jax.grad(lambda theta: jnp.sum(network(theta, x, t, prompt)))(theta)["in"]

        both = samplers.guided(network, 7.5, unconditional=empty)
        detached = samplers.guided(network, 7.5, unconditional=empty, detach_unconditional=True)
        none = functools.partial(lambda theta, x, t, c: network(theta, x, t, empty))
        return total(both), total(detached), total(network), total(none)

    both, detached, toward, away = derivatives(theta)
    np.testing.assert_allclose(both, 7.5 * toward - 6.5 * away, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(detached, 7.5 * toward, rtol=1e-5)


def test_adapters_begin_at_the_model_and_learn():
    params = {**weights(), "name": None, "conv": jnp.ones((3, 3, 2, 4)), "bias": jnp.zeros(2)}
    theta, merge = samplers.lora(params, 2, KEY)
    assert theta["bias"] is None
    assert jax.tree.map(np.shape, tuple(theta["conv"])) == ((18, 2), (2, 4))
    merged = jax.jit(merge)(theta)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    theta = {name: theta[name] for name in ("in", "out")}
    params = {name: params[name] for name in ("in", "out")}
    _, merge = samplers.lora(params, 2, KEY)

    def denoiser(theta, x, t, condition):  # that of N(0, 1), and a correction
        return gaussian.VP(t)[1] * x + 0.1 * network(merge(theta), x, t, condition)

    workers = ug.average(ug.bptt(conditioned(denoiser, eta=0.0)), 32)
    result = ug.fit(workers, theta, optax.adam(0.05), num_steps=100, key=KEY)
    losses = result.history["loss"]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    moved = jax.jit(merge)(result.theta)["in"] - params["in"]
    assert np.linalg.matrix_rank(moved, tol=1e-4) == 2


ETAS = (0.0, 1.0, 1.5, 5.0)
"""Without noise, DDPM's, with all noise drawn anew in some steps, and in all of them."""


def law_of_samples(eta, num_steps=50):
    """The mean and the variance of the linear steps with the exact denoiser of N(1/2, 4)."""
    alpha, sigma = gaussian.vp(np.linspace(1, 0, num_steps + 1))
    mean, variance = 0.0, 1.0
    for a, b, g, h in zip(alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], strict=True):
        added = min(eta**2 * h**2 / g**2 * (g**2 - (a / b) ** 2 * h**2), h**2)
        factor = np.sqrt(h**2 - added) - b * g / a
        gain = g / (4 * a**2 + g**2)
        mean = (b / a + factor * gain) * mean - factor * gain * a * gaussian.MU
        variance = (b / a + factor * gain) ** 2 * variance + added
    return mean, variance


def test_the_law_of_samples():
    theta = {"s": jnp.float32(2.0), "shift": jnp.float32(0.0)}
    problems = [
        samplers.ddim(
            gaussian.denoiser,
            gaussian.VP,
            num_steps=50,
            reward=gaussian.linear,
            sample_shape=(),
            eta=eta,
        )
        for eta in ETAS
    ]

    @jax.jit
    def draw(keys, steps):
        def coefficients(t):
            every = [_step.step_of("test", p).coefficients(t, jnp.float32) for p in problems]
            return jnp.stack([c.move for c in every])

        samples = jax.vmap(lambda key: [samplers.sample(p, key, theta) for p in problems])
        return samples(keys), jax.vmap(coefficients)(steps)

    draws, moves = draw(jax.random.split(KEY, 40_000), np.arange(50))
    assert np.all(np.isfinite(moves))  # what is left of the old noise does not fall below 0
    variances = []
    for eta, x in zip(ETAS, draws, strict=True):
        samples, (mean, variance) = Samples(x), law_of_samples(eta)
        assert samples.error_in_se(mean) < 4
        found, se = samples.variance()
        assert abs(found - variance) < 4 * se
        variances.append(variance)
    assert variances[:2] == pytest.approx([4.0, 4.0], rel=0.2)
    # Negative control: more noise than DDPM's makes another law.
    assert variances[3] < 0.9 * variances[2] < 0.85 * variances[1]


def test_derivatives_by_the_schedule_and_the_noise():
    """Against differences, where the last step ends in sigma = 0 and where the noise is clipped."""
    theta = {"s": np.float64(0.7), "shift": np.float64(0.1)}
    table = samplers.tabulated(np.cumprod(1 - np.linspace(1e-3, 0.2, 20)))

    def loss(schedule, eta):
        problem = samplers.ddim(
            lambda theta, x, t: jnp.tanh(gaussian.denoiser(theta, x, t)),
            schedule,
            num_steps=5,
            reward=lambda x: -jnp.sum((x - 1) ** 2),
            sample_shape=(2,),
            eta=eta,
        )
        return ug.episode_loss(problem, OTHER, theta)

    def values(p):
        rate, time, *etas = p  # of the schedule, of the table, and amounts of noise
        rates = samplers.vp(0.1, rate)
        noisy = jax.vmap(lambda eta: loss(rates, eta))(jnp.stack(etas))
        return jnp.append(noisy, loss(rates, 0.0) + loss(lambda t: table(time * t), 0.0))

    @jax.jit
    def both(p, h):
        shifts = jax.vmap(lambda by: (values(p + by) - values(p - by)) / (2 * h))(h * jnp.eye(5))
        return jax.jacrev(values)(p), shifts.T

    with jax.enable_x64(True):
        p = np.array([15.0, 0.93, 0.5, 1.0, 1.075])  # the last one clips two of four steps
        derivatives, differences = numbers(both(p, np.float64(1e-6)))
    np.testing.assert_allclose(derivatives, differences, rtol=1e-6, atol=1e-7)
    assert np.count_nonzero(derivatives) == 4 + 3 + 1  # each by what it depends on


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtypes_in_and_out_of_x64(dtype):
    """In x64 the latents are float64; a theta of float32 has a gradient of float32."""
    theta = jax.tree.map(lambda x: np.asarray(x, np.float32), weights())
    with jax.enable_x64(dtype == np.float64):
        x = jax.jit(lambda theta: samplers.sample(PROBLEM, OTHER, theta))(theta)
        grad = gradient(ESTIMATORS["skip_path"], OTHER, theta).grad
        assert x.dtype == dtype
        assert grad["in"].dtype == np.float32


def test_strict_promotion():
    """Tracing is enough: no dtypes are mixed without a cast."""
    theta = weights()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), theta)
    low_rank, merge = samplers.lora(params, 2, KEY)
    with jax.numpy_dtype_promotion("strict"):
        for name, estimator in ESTIMATORS.items():
            state = jax.eval_shape(estimator.init, KEY, theta)
            out, _ = jax.eval_shape(estimator.estimate, KEY, theta, state)
            assert out.grad["in"].dtype == jnp.float32, name
        assert jax.eval_shape(merge, low_rank)["in"].dtype == jnp.bfloat16


def test_a_table_of_noise_levels():
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
    times = np.array([0.0, 0.01, 0.5, 1.0], np.float32)
    alpha, sigma = numbers(jax.jit(samplers.tabulated(table))(times))
    np.testing.assert_allclose(alpha, np.sqrt(np.append(1.0, table)[[0, 1, 50, 100]]), rtol=1e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    with raises(ValueError, "`alphas_cumprod` must be", "decrease"):
        samplers.tabulated(table[::-1])
    with raises(ValueError, "0 <= beta_min <= beta_max", "beta_min=3"):
        samplers.vp(3.0, 1.0)


def make(denoiser=lambda theta, x, t: theta * x, schedule=gaussian.VP, **changes: Any):
    given: dict[str, Any] = {"num_steps": 4, "reward": jnp.sum, "sample_shape": (2,), **changes}
    return samplers.ddim(denoiser, schedule, **given)


def test_errors_of_samplers():
    with raises(ValueError, "`schedule(1.0)` has alpha=0.0", "samplers.flow"):
        make(schedule=lambda t: (1 - t, t))
    with raises(TypeError, "`schedule(t)` must return two scalars"):
        make(schedule=mistyped(lambda t: t))
    with raises(TypeError, "`denoiser", "cannot be called", "theta, x, t, condition"):
        make(denoiser=lambda theta, x: x)
    with raises(TypeError, "`reward", "cannot be called", "x0, condition"):
        make(reward=lambda x: jnp.sum(x), condition=jnp.ones(3))
    with raises(TypeError, "`sample_shape` must be a tuple", "64 (int)"):
        make(sample_shape=mistyped(64))
    with raises(TypeError, "`condition", "cannot be called", "key"):
        make(condition=mistyped(lambda: jnp.ones(3)))
    with raises(ValueError, "`num_steps` must be at least 1"):
        make(num_steps=0)
    with raises(ValueError, "`eta` must be at least 0"):
        make(eta=-1.0)
    with raises(ValueError, '`noise` must be "none", "memoryless"', "'full'"):
        samplers.flow(
            lambda theta, x, t: x,
            num_steps=4,
            reward=jnp.sum,
            sample_shape=(),
            noise=mistyped("full"),
        )
    theta = jnp.float32(1.0)
    with raises(ValueError, "`reward` must return a scalar", "float32[2]", "mean over the batch"):
        ug.episode_loss(make(reward=lambda x: x), KEY, theta)
    with raises(ValueError, "the network must return the shape of x, (2,)", "float32[]"):
        ug.episode_loss(make(denoiser=lambda theta, x, t: theta * x[0]), KEY, theta)


def test_errors_of_estimators():
    problem = make()
    other = ug.final_loss(problem, lambda key, theta, s: jnp.sum(s.x))
    for factory in (
        lambda p: samplers.draft_lv(p, 2),
        samplers.skip_path,
        lambda p: samplers.adjoint_matching(p, ONE, 1.0),
        samplers.inverse,
        lambda p: samplers.sample(p, KEY, ONE),
    ):
        with raises(TypeError, "needs the problem of a sampler", "_replace(evaluate=...)"):
            factory(other)
    with raises(ValueError, "problem.horizon=3", "made for 4 steps", "`num_steps`"):
        samplers.draft_lv(problem._replace(horizon=3), 2)
    with raises(ValueError, "the earliest stop leaves 3 evaluations", "steps=4"):
        samplers.skip_path(problem, 4)
    with raises(ValueError, "`early_stop` must be in [0, 1)"):
        samplers.skip_path(problem, 1, early_stop=1.0)
    with raises(ValueError, "`num_noised` must be at least 1"):
        samplers.draft_lv(problem, 0)
    for noise, step in (("memoryless", 0), (2**0.5, 4), (2.0, 3)):
        forgetful = samplers.flow(
            lambda theta, x, t: theta * x,
            num_steps=5,
            reward=jnp.sum,
            sample_shape=(),
            noise=noise,
        )
        with raises(ValueError, f"step {step} of", "0 to 4", "forgets x", 'remat="step"'):
            samplers.inverse(forgetful)


def test_errors_of_networks():
    def shifted(theta, x, t, condition):
        return x @ theta + condition

    theta, prompts = np.eye(2, dtype=np.float32), np.ones((3, 2), np.float32)
    for network, condition, expected in (
        (shifted, prompts, "x=float32[4,2], t=float32[], condition=float32[3,2]"),
        (samplers.guided(shifted, 2.0), prompts[0], "unconditional=None"),
        (samplers.guided(shifted, 2.0, unconditional=0.0), None, "condition=None"),
        (lambda theta, x, t, c: x + c["a"][0], {"a": [prompts]}, "condition['a'][0]=float32[3,2]"),
    ):
        problem = make(
            network, sample_shape=(4, 2), condition=condition, reward=lambda x, c: jnp.sum(x)
        )
        with raises((TypeError, ValueError), expected, "pass another"):
            ug.episode_loss(problem, KEY, theta)
    problem = make(
        lambda theta, x, t, c: x,
        sample_shape=(4, 2),
        condition=prompts,
        reward=lambda x, c: jnp.sum(x - c),
    )
    with raises(TypeError, "`reward` of a sampler", "x0=float32[4,2], condition=float32[3,2]"):
        ug.episode_loss(problem, KEY, theta)


def test_errors_of_adapters():
    with raises(ValueError, "`params` has no floating matrix"):
        samplers.lora({"b": jnp.ones(3)}, 2, KEY)
    theta, merge = samplers.lora(weights(), 2, KEY)
    original = jax.tree.map(np.asarray, weights())
    with raises(ValueError, "`theta` has 1 updates for 2 leaves"):
        merge({"in": theta["in"]})
    with raises(ValueError, "params['w'] is empty: float32[3,0]", "Remove"):
        samplers.lora({"w": np.ones((3, 0), np.float32)}, 2, KEY)
    made = "must be LowRank(float32[6,2], float32[2,5]); got"
    with raises(ValueError, "theta['in']", made, "float32[6,5]"):
        merge(theta | {"in": original["in"]})
    with raises(ValueError, "theta['in']", made, "None"):  # W without its update, silently
        merge(theta | {"in": None})
    with raises(ValueError, "theta['in']", made, "LowRank(float32[2,6], float32[5,2])"):
        merge(jax.tree.map(np.transpose, numbers(theta)))
    bias = np.zeros(2, np.float32)
    theta, merge = samplers.lora({"b": bias, **original}, 2, KEY)
    with raises(ValueError, "theta['b'] must be None; got float32[2]"):
        merge(theta | {"b": bias})
