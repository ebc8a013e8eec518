"""Means and variances equal closed forms; the tests have power and reject wrong formulas.

Each estimator has one program with the structure as its argument. An estimator's draws on a
structure serve the tests of its mean, of its variances and the negative controls.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import settings
from tests.statistics import Samples, mean_square, sampler
from unrollgrad.estimators import REGISTRY
from unrollgrad.problems import theory

DIM, HORIZON, EPISODES = 5, 16, 8000


class Structure(NamedTuple):
    """A pattern of the influence of each step's theta on each loss."""

    gradients: str = "identical"
    memory: float = 0.0
    curvature: float = 0.0
    init_influence: float = 0.0

    def exact(self):
        """The recurrence's data, theta, and all influences."""
        example = ug.problems.linear_recurrence(DIM, HORIZON, **self._asdict())
        # Without memory a step's influence on its own loss is the direction of the loss.
        plain = ug.problems.linear_recurrence(DIM, HORIZON, gradients=self.gradients)
        directions = np.einsum("ttp->tp", plain.influence(plain.theta))
        data = {"directions": directions.astype(np.float32), **self._asdict()}
        del data["gradients"]
        return data, example.theta, example.influence(example.theta)


STRUCTURES = {
    "identical": Structure(),
    "identical, full memory": Structure(memory=1.0),
    "independent": Structure("independent"),
    "independent, full memory": Structure("independent", memory=1.0),
    "decaying": Structure(memory=0.7, init_influence=1.0),
    "curved": Structure(memory=0.8, curvature=0.1),
    "curved from the start": Structure(memory=0.8, curvature=0.1, init_influence=2.0),
}


class Setting(NamedTuple):
    """An estimator, with its truncation and noise period."""

    name: str
    truncation: int = HORIZON
    noise_period: int | None = None
    num_pairs: int = 1

    def build(self, problem):
        return REGISTRY[self.name].build(
            problem, **settings(self.truncation, 0.1, self.noise_period, self.num_pairs)
        )

    @property
    def period(self):
        """The steps between draws of noise; None means one draw per episode."""
        return self.truncation if self.name == "pes" else self.noise_period


SETTINGS = [
    Setting("full_es"),
    Setting("es_single", 4),
    Setting("pes", 4),
    Setting("pes", 1),
    Setting("gpes", 2, 4),
    Setting("gpes", 2, 6),
]
TRUNCATED = Setting("truncated_es", 4)


def names(setting):
    return "-".join(str(x) for x in setting[:3] if x)


def recurrence(data):
    """``linear_recurrence`` with a structure that may be traced."""

    def step(key, theta, state, t):
        state = data["memory"] * state + theta
        return state, data["directions"][t] @ state + data["curvature"] * state @ state / 2

    return ug.UnrolledProblem(lambda key, theta: 1 + data["init_influence"] * theta, step, HORIZON)


@functools.cache
def program(setting):
    num_windows = HORIZON // (setting.build(recurrence({})).truncation or HORIZON)
    return sampler(lambda data: setting.build(recurrence(data)), num_windows)


@functools.cache
def drawn(setting, structure):
    """The gradients of all windows (episodes, windows, P), and the exact influences."""
    data, theta, influence = structure.exact()
    # If windows conflict, the mean of PES takes more samples; with full memory its variance is
    # 0.95 times ES-Single's: distinguishing them takes 64,000 samples.
    hard = setting.truncation == 1 and structure.gradients == "independent"
    calls = {0.0: 3, 1.0: 8}[structure.memory] if hard else 1
    keys = [jax.random.fold_in(jax.random.key(12), i) for i in range(calls)]
    grads = [program(setting)(key, EPISODES, theta, data) for key in keys]
    return np.concatenate(grads), influence


def episodes(setting, structure):
    """Samples of the mean over an episode's windows, and the exact influences."""
    grads, influence = drawn(setting, structure)
    return Samples(grads.mean(axis=1)), influence


def is_unbiased(samples, truth):
    """The test of every unbiased estimator: it has power, and the mean equals the truth."""
    assert samples.relative_se(truth) < 0.05, "not enough samples to tell"
    return samples.error_in_se(truth) < 5


def agrees(measured, exact):
    """The test of every variance: it has power, and the measurement equals the closed form."""
    value, se = measured
    assert se < 0.05 * exact, "not enough samples to tell"
    return abs(value - exact) < 5 * se


def rejects(measured, exact):
    value, se = measured
    return abs(value - exact) > 5 * se


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("setting", SETTINGS, ids=names)
class TestLinearRecurrence:
    def test_mean(self, setting, structure):
        samples, influence = episodes(setting, structure)
        assert is_unbiased(samples, theory.gradient(influence))
        if structure.init_influence == 2:  # negative control: the influence through init left out
            _, _, without = structure._replace(init_influence=0.0).exact()
            assert samples.error_in_se(theory.gradient(without)) > 5

    def test_variance_of_an_episode(self, setting, structure):
        samples, influence = episodes(setting, structure)
        exact = theory.episode_variance(influence, setting.truncation, setting.period)
        assert agrees(samples.variance(), exact)
        one_noise = (DIM + 1) * np.sum(theory.gradient(influence) ** 2)
        if setting.period is None:
            np.testing.assert_allclose(exact, one_noise)
        elif setting.truncation == 1:  # the same test distinguishes PES from ES-Single
            assert rejects(samples.variance(), one_noise)

    def test_variance_of_a_window_at_a_random_place(self, setting, structure):
        grads, influence = drawn(setting, structure)
        value, se = mean_square(grads)
        measured = value - np.sum(theory.gradient(influence) ** 2), se
        exact = theory.window_variance(influence, setting.truncation, setting.period)
        assert agrees(measured, exact)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_truncated_es(structure):
    """Its bias and variance equal their closed forms, and the test detects the bias."""
    samples, influence = episodes(TRUNCATED, structure)
    assert is_unbiased(samples, theory.truncated_gradient(influence, 4))
    if structure.memory:
        assert samples.error_in_se(theory.gradient(influence)) > 20
    assert agrees(samples.variance(), theory.truncated_variance(influence, 4))
    assert rejects(samples.variance(), theory.episode_variance(influence, 4, 4))  # for PES


@pytest.mark.parametrize("init_influence", [0.0, 2.0])
def test_backpropagation(init_influence):
    structure = Structure(memory=0.8, curvature=0.1, init_influence=init_influence)
    data, theta, influence = structure.exact()
    truth, biased = theory.gradient(influence), theory.truncated_gradient(influence, 4)
    for setting, expected in [(Setting("bptt"), truth), (Setting("tbptt", 4), biased)]:
        grads = program(setting)(jax.random.key(7), 3, theta, data)
        np.testing.assert_allclose(grads.mean(axis=1), np.tile(expected, (3, 1)), rtol=1e-5)
    # Negative controls: the two differ, and so does the truth without init's influence.
    assert np.linalg.norm(biased - truth) > 0.2 * np.linalg.norm(truth)
    _, _, without = structure._replace(init_influence=0.0).exact()
    if init_influence:
        wrong = theory.gradient(without)
        assert np.linalg.norm(wrong - truth) > 0.1 * np.linalg.norm(wrong)


def test_pairs_divide_the_variance():
    samples, influence = episodes(Setting("pes", 4, num_pairs=4), STRUCTURES["decaying"])
    exact = theory.episode_variance(influence, 4, noise_period=4)
    assert agrees(samples.variance(), exact / 4)
    assert rejects(samples.variance(), exact)


def test_the_double_sum_on_known_structures():
    """Without memory and with equal windows it is (P/2 (1 + 1/n) + 1/n) |g|^2."""
    _, _, influence = STRUCTURES["identical"].exact()
    g = theory.gradient(influence)
    for n in [1, 4, 16]:
        exact = theory.episode_variance(influence, 16 // n, noise_period=16 // n)
        np.testing.assert_allclose(exact, (5 / 2 * (1 + 1 / n) + 1 / n) * g @ g)


class Balance(NamedTuple):
    """Weights of the losses on influence balancing: of the steps, of the end, of theta itself."""

    steps: float = 0.0
    end: float = 0.0
    theta: float = 0.0


def balancing(weights):
    problem, _ = ug.problems.influence_balancing(horizon=60)

    def step(key, theta, state, t):
        state, loss = problem.step(key, theta, state, t)
        return state, weights.steps * loss

    def evaluate(key, theta, state):
        return weights.end * 0.5 * (state[0] - 1) ** 2 + weights.theta * theta**2

    return ug.UnrolledProblem(problem.init, step, 60, evaluate)


def balance_truth(weights, theta=0.5):
    """The derivative of J by the sensitivity recursion, in NumPy."""
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    drive = np.where(np.arange(23) < 10, 1.0, -1.0)
    s, ds, total = np.ones(23), np.zeros(23), 0.0
    for _ in range(60):
        s, ds = matrix @ s + theta * drive, matrix @ ds + drive
        total += (s[0] - 1) * ds[0]
    end = weights.end * (s[0] - 1) * ds[0]
    return np.array([weights.steps * total / 60 + end + weights.theta * 2 * theta])


@functools.cache
def balancing_program(name):
    setting = Setting(name, 10, 20, num_pairs=4)
    num_windows = 6 if REGISTRY[name].takes("truncation") else 1
    return sampler(lambda weights: setting.build(balancing(weights)), num_windows)


@functools.cache
def balanced(name, weights):
    draw = balancing_program(name)
    num_episodes = {"gpes": 8000, "bptt": 3, "tbptt": 3}.get(name, 2000)
    return Samples(draw(jax.random.key(7), num_episodes, jnp.float32(0.5), weights).mean(axis=1))


UNBIASED = ["full_es", "es_single", "gpes"]
STEPS, END, THETA = Balance(steps=1.0), Balance(end=1.0), Balance(theta=20.0)


@pytest.mark.parametrize("name", UNBIASED)
def test_influence_balancing(name):
    assert is_unbiased(balanced(name, STEPS), balance_truth(STEPS))


def test_influence_balancing_rejects_truncation():
    truth = balance_truth(STEPS)
    np.testing.assert_allclose(balanced("bptt", STEPS).mean, truth, rtol=1e-5)
    assert balanced("tbptt", STEPS).relative_error(truth) > 0.2
    assert balanced("truncated_es", STEPS).error_in_se(truth) > 20


@pytest.mark.parametrize("name", UNBIASED)
def test_final_loss(name):
    """The estimate is the gradient of the final loss, neither divided by T nor times T/K."""
    assert is_unbiased(balanced(name, END), balance_truth(END))
    assert balanced(name, END).error_in_se(balance_truth(END) / 60) > 5
    both = Balance(end=1.0, theta=20.0)
    assert is_unbiased(balanced(name, both), balance_truth(both))
    for wrong in (balance_truth(END), balance_truth(both._replace(theta=120.0))):
        assert balanced(name, both).error_in_se(wrong) > 5


def test_final_loss_of_theta_alone():
    """A truncation loses nothing if the state does not matter."""
    np.testing.assert_allclose(balanced("tbptt", THETA).mean, 20.0, rtol=1e-5)
    assert is_unbiased(balanced("truncated_es", THETA), [20.0])


@pytest.mark.parametrize("name", ["full_es", "es_single", "pes", "gpes"])
def test_a_loss_that_is_not_quadratic(name):
    """Each estimates the gradient of its own smoothed J: not of J, and not of the other.

    The loss of step t is exp(s_t) with s_t = t theta + sigma sum_j c[t, j] u_j, where c counts the
    steps so far in period j: sum_j c[t, j]^2 is t^2 with one draw per episode, and 1, 4, 5, 8 with
    a draw for every two of the four steps.
    """
    sigma = 0.5

    def step(key, theta, state, t):
        return state + theta, jnp.sum(jnp.exp(state + theta))

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(2), step, 4)
    theta = np.array([0.1, -0.3], np.float32)
    t = np.arange(1, 5)[:, None]
    squares = {"episode-smoothed J": [1, 4, 9, 16], "period-smoothed J": [1, 4, 5, 8], "J": [0] * 4}
    gradients = {
        target: (t * np.exp(t * theta.astype(float) + sigma**2 * np.array([c]).T / 2)).mean(axis=0)
        for target, c in squares.items()
    }
    truncation = 1 if name == "gpes" else 2
    estimator = REGISTRY[name].build(problem, **settings(truncation, sigma, 2, num_pairs=4))
    draw = sampler(lambda _: estimator, 4 // (estimator.truncation or 4))
    samples = Samples(draw(jax.random.key(7), 100_000, theta).mean(axis=1))
    assert is_unbiased(samples, gradients.pop(REGISTRY[name].unbiased_for))
    assert len(gradients) == 2
    assert all(samples.error_in_se(other) > 5 for other in gradients.values())


@pytest.mark.parametrize("name", ["es_single", "gpes"])
def test_sampled_horizon_weighs_every_window_equally(name):
    """J = E[sum of losses] / E[T] is the mean over all windows that a worker spends."""
    problem, theta, influence = ug.problems.linear_recurrence(dim=2, horizon=12, memory=0.7)
    lengths = [4, 8, 12]
    exact = influence(theta)
    truth = sum(exact[:n].sum(axis=(0, 1)) for n in lengths) / sum(lengths)
    episodes_alike = sum(exact[:n].sum(axis=(0, 1)) / n for n in lengths) / 3

    def horizon(key):
        return jax.random.choice(key, jnp.array([3, 7, 12]))  # rounded up to 4, 8, 12

    sampled = problem._replace(horizon=horizon)
    estimator = REGISTRY[name].build(sampled, **settings(4, 0.1, 8, num_pairs=8))
    draw = sampler(lambda _: estimator, 200)
    samples = Samples(draw(jax.random.key(3), 200, theta).mean(axis=1))
    assert is_unbiased(samples, truth)
    assert samples.error_in_se(episodes_alike) > 5
