"""Backpropagation that walks back: laws of ``last``, states made again by an inverse, memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, numbers, present, quadratic, raises
from tests.samplers import gaussian
from unrollgrad import samplers
from unrollgrad.samplers import _step

KEY, OTHER = jax.random.key(0), jax.random.key(1)


@functools.partial(jax.jit, static_argnums=0)
def gradient(estimator, theta, data=None):
    given = {} if data is None else {"data": data}
    return estimator.estimate(OTHER, theta, estimator.init(KEY, theta), **given)[0]


def assert_close(a, b, rtol=1e-5):
    chex.assert_trees_all_close(numbers(a), numbers(b), rtol=rtol, atol=1e-7)


def always(last):
    """A law that draws one number."""
    return samplers.cutoff([0.0] * (last - 1) + [1.0])


def with_evaluate(problem):
    return problem._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2) + theta["start"][0])


@pytest.mark.parametrize("last", [1, 7, 20])
@pytest.mark.parametrize("change", [lambda p: p, with_evaluate], ids=["steps", "evaluate"])
def test_a_law_that_draws_one_number_is_that_number(change, last):
    """Through ``init`` too, and with step losses."""
    problem, theta = quadratic()
    problem = change(problem)
    drawn = gradient(ug.bptt(problem, last=always(last)), theta)
    assert_close(drawn, gradient(ug.bptt(problem, last=last), theta))


def test_an_exact_inverse_gives_the_same_gradient():
    """Leapfrog steps of a pendulum, with noise from the step's key and streamed pushes."""

    def push(key, theta, t, batch):
        return 0.1 * jax.random.normal(key, (2,)) + batch + theta["b"] * t

    def step(key, theta, state, t, batch):
        x, v = state["x"], state["v"] + push(key, theta, t, batch)
        x = x + 0.1 * v
        v = v - 0.1 * theta["k"] * jnp.sin(x)
        return {"x": x, "v": v, "count": state["count"] + 1}, jnp.sum(x**2)

    def inverse(key, theta, state, t, batch):
        x, v = state["x"], state["v"] + 0.1 * theta["k"] * jnp.sin(state["x"])
        x = x - 0.1 * v
        return {"x": x, "v": v - push(key, theta, t, batch), "count": state["count"] - 1}

    def init(key, theta):
        x = theta["b"] + jax.random.normal(key, (2,))
        return {"x": x, "v": jnp.zeros(2), "count": jnp.int32(0)}

    problem = ug.UnrolledProblem(init, step, 30, lambda key, theta, s: jnp.sum(s["v"] ** 4))
    theta = {"k": jnp.float32(1.5), "b": jnp.float32(0.2)}
    data = 0.1 * np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    for last in (None, 11):
        exact = gradient(ug.bptt(problem, last=last), theta, data)
        made = ug.bptt(problem, last=last, remat="reverse", inverse=inverse)
        assert_close(gradient(made, theta, data), exact, rtol=2e-4)


def flow(x, theta):
    """The velocity of a linear and a nonlinear decay."""
    return theta["a"] * x - theta["b"] * jnp.sin(x)


def euler(x, theta, h):
    return x + h * flow(x, theta)


def heun(x, theta, h):
    first = flow(x, theta)
    return x + h / 2 * (first + flow(x + h * first, theta))


def runge_kutta(x, theta, h):
    a = flow(x, theta)
    b = flow(x + h / 2 * a, theta)
    c = flow(x + h / 2 * b, theta)
    d = flow(x + h * c, theta)
    return x + h / 6 * (a + 2 * b + 2 * c + d)


def slope(errors, steps):
    """The order of convergence."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 3), (runge_kutta, 5)])
def test_the_error_of_a_backward_solve_falls_with_the_order(solver, order):
    """The inverse is the solver with -h; checkpointed backpropagation is exact.

    A step of order p and back leaves C h^(p+1) + C (-h)^(p+1), so that solvers of even order gain
    one: the orders are 1, 2 and 4.
    """
    theta = {"a": np.float64(-0.7), "b": np.float64(0.9)}
    errors, steps = [], (8, 16, 32)
    with jax.enable_x64(True):
        for num_steps in steps:
            h = 2.0 / num_steps
            problem = ug.UnrolledProblem(
                lambda key, theta: jnp.float64(1.2),
                lambda key, theta, x, t, h=h: (solver(x, theta, h), jnp.zeros(())),
                num_steps,
                lambda key, theta, x: x**2,
            )
            back = ug.bptt(
                problem,
                remat="reverse",
                inverse=lambda key, theta, x, t, h=h: solver(x, theta, -h),
            )
            exact, made = (
                np.array(jax.tree.leaves(gradient(e, theta).grad))
                for e in (ug.bptt(problem, remat="step"), back)
            )
            errors.append(np.linalg.norm(made - exact) / np.linalg.norm(exact))
    assert slope(errors, steps) == pytest.approx(order, abs=0.25)


def sampler(num_steps, eta=0.0, shape=()):
    """A nonlinear denoiser of N(1/2, 1), whose rewards are curved."""

    def network(theta, x, t):
        return gaussian.noise(x, *gaussian.VP(t), 1.0) + theta["a"] * jnp.sin(theta["b"] * x + t)

    return samplers.ddim(
        network,
        gaussian.VP,
        num_steps=num_steps,
        reward=lambda x: -jnp.mean((x - 1) ** 2),
        sample_shape=shape,
        eta=eta,
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(estimator, keys, theta):
    def one(key):
        grad = estimator.estimate(key, theta, estimator.init(KEY, theta))[0].grad
        return jnp.stack(jax.tree.leaves(grad))

    return jax.vmap(one)(keys)


@pytest.mark.parametrize(("iterations", "eta", "order"), [(1, 0.0, 1), (2, 0.0, 2), (2, 1.0, 1.5)])
def test_the_inverse_of_a_sampler_has_the_order_of_its_iterations(iterations, eta, order):
    """DDIM inversion is the first of them. With noise x' - x is O(sqrt(h)): half an order less."""
    theta = {"a": np.float64(0.1), "b": np.float64(1.0)}
    errors, steps = [], (25, 50, 100)
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 64)
        for num_steps in steps:
            problem = sampler(num_steps, eta)
            back = ug.bptt(problem, remat="reverse", inverse=samplers.inverse(problem, iterations))
            exact = numbers(gradients(ug.bptt(problem), keys, theta))
            error = numbers(gradients(back, keys, theta)) - exact
            errors.append(float(np.linalg.norm(error) / np.linalg.norm(exact)))
    assert slope(errors, steps) == pytest.approx(order, abs=0.3)
    assert errors[-1] < 0.03


def compiled(estimator, theta):
    """The program of one call."""
    state = jax.eval_shape(estimator.init, KEY, theta)
    return estimator.estimate.lower(KEY, theta, state).compile()


def temporary(estimator, theta):
    """The bytes of temporaries that XLA plans."""
    return compiled(estimator, theta).memory_analysis().temp_size_in_bytes


ROWS, WIDTH, LAYERS = 256, 64, 6
LATENT = 4 * ROWS * WIDTH
ACTIVATIONS = LAYERS * LATENT
"""Bytes: the tanh of each layer is what the step's derivative needs."""


def deep(num_steps):
    """A denoiser of several layers on a batch of latents."""

    def network(theta, x, t):
        for w in theta:
            x = jnp.tanh(x @ w + t)
        return x

    problem = samplers.ddim(
        network,
        gaussian.VP,
        num_steps=num_steps,
        reward=lambda x: -jnp.mean(x**2),
        sample_shape=(ROWS, WIDTH),
    )
    keys = jax.random.split(KEY, LAYERS)
    return problem, [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]


@pytest.mark.parametrize("last", [1, 10, 50])
def test_fifty_steps_remade_keep_a_latent_each(last, optimized):
    problem, theta = deep(50)
    kept = temporary(ug.bptt(problem, last=last, remat="step"), theta)
    assert kept < last * LATENT + 2 * ACTIVATIONS


def test_the_memory_of_a_backward_solve_does_not_grow(optimized):
    few, many = (
        temporary(ug.bptt(problem, remat="reverse", inverse=samplers.inverse(problem)), theta)
        for problem, theta in (deep(5), deep(50))
    )
    assert many < 1.02 * few
    assert few < 2 * ACTIVATIONS + 4 * LATENT


def test_a_law_keeps_a_latent_for_each_step(optimized):
    problem, theta = deep(50)
    kept = temporary(ug.bptt(problem, last=samplers.alignprop_cutoff(50)), theta)
    assert kept < 50 * LATENT + 2 * ACTIVATIONS + 4 * LATENT


def test_a_sampler_computes_what_the_loop_by_hand_does(optimized):
    """Operations and bytes of one gradient, by XLA's count, within 3 %."""
    problem, theta = deep(50)
    network, evaluate = _step.step_of("test", problem).network, present(problem.evaluate)

    def by_hand(key, theta):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(x, k):
            (alpha, sigma), (alpha_next, sigma_next) = (
                gaussian.VP(k / 50),
                gaussian.VP((k - 1) / 50),
            )
            noise = network(theta, x, k / 50, None)
            return alpha_next * (x - sigma * noise) / alpha + sigma_next * noise, None

        start = problem.init(key, theta)
        x, _ = jax.lax.scan(step, start.x, jnp.arange(50.0, 0.0, -1.0))
        return evaluate(key, theta, start._replace(x=x))

    def cost(program):
        counts = program.cost_analysis()
        return np.array([counts["flops"], counts["bytes accessed"]])

    ours = cost(compiled(ug.bptt(problem, remat="step"), theta))
    assert np.all(ours < 1.03 * cost(jax.jit(jax.grad(by_hand, 1)).lower(KEY, theta).compile()))


def test_errors():
    problem, _ = quadratic()
    law = samplers.cutoff([1, 1])
    with raises(ValueError, "`unbiased` is for a law", "last=5", "samplers.cutoff"):
        ug.bptt(problem, last=5, unbiased=True)
    with raises(ValueError, "differentiates all 20 steps", "is 2"):
        ug.bptt(problem, last=law, unbiased=True)
    with raises(ValueError, "differentiates all 20 steps", "is 3"):
        ug.bptt(problem, last=lambda key: jnp.int32(3), unbiased=True)
    with raises(ValueError, "a law `last` keeps the state of every step", "'sqrt'"):
        ug.bptt(problem, last=law, remat="sqrt")
    with raises(ValueError, '`remat`="reverse" needs `inverse`', "inverse=None"):
        ug.bptt(problem, remat="reverse")
    with raises(ValueError, '`inverse` is for remat="reverse"', "remat='step'"):
        ug.bptt(problem, remat="step", inverse=lambda *args: args)
    with raises(ValueError, "`last`=21", "horizon of 20"):
        ug.bptt(problem, last=21, remat="reverse", inverse=lambda *args: args)
    with raises(ValueError, "`remat` must be None", '"reverse"', "'steps'"):
        ug.bptt(problem, remat=mistyped("steps"))
    with raises(ValueError, "`probabilities` must be a list"):
        samplers.cutoff([-1.0, 2.0])
    with raises(ValueError, "gives no probability", "0.84"):
        samplers.alignprop_cutoff(10, mean=1e4)
    wrong, theta = sampler(5), {"a": jnp.float32(0.1), "b": jnp.float32(1.0)}
    bad = ug.bptt(wrong, remat="reverse", inverse=lambda key, theta, s, t: s._replace(x=s.x[None]))
    with raises(TypeError, "`inverse` must return a state", "state.x: float32[] -> float32[1]"):
        gradient(bad, theta)
