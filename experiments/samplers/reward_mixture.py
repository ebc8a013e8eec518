"""``reward_mixture``: every reward gradient on a mixture whose tilted law is known."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework.experiment import Experiment, Progress, Write
from experiments._framework.settings import CommonSettings
from experiments.samplers import eight_gaussians as mixture
from experiments.samplers import reward_mixture_figure as figure
from unrollgrad import samplers
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """A reward asks a sampler of eight Gaussians for one of them; theta is a network's push.

    The sampler is a memoryless flow with the exact velocity, and theta an MLP that is added to it,
    zero at the start. All methods have the same number of network evaluations: one without a
    gradient counts 1, a backward pass through one 2 more. Each method's learning rate is the best
    of the same grid, on a key that is not reported, by its own aim: the geometric mean of the loss
    along the run for methods that maximise the reward, the distance to the tilted law at the end
    for adjoint matching. It falls to zero linearly during each run.
    """

    horizon: int = 20
    """Denoising steps (T)."""
    budget: int = 18_000
    """Network evaluations of a run, for each of the workers."""
    num_workers: int = 64
    """Samples in an update; each is an episode (an antithetic pair of them for ES)."""
    reward_scale: float = 0.1
    """The tilted law is p(x) exp(reward_scale reward(x)). Only adjoint matching is told."""
    hidden: int = 64
    """Units in each of the MLP's two hidden layers."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """The grid of learning rates of Adam."""
    sigma: float = 0.03
    """The perturbation's standard deviation for ES."""
    num_samples: int = 2048
    """Samples that measure the reward and the distances at each point of a curve."""
    num_gradients: int = 4096
    """Gradients that measure each method's norm, variance and direction at a theta."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the network's initial weights, the episodes and the samples."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        horizon=5,
        budget=150,
        num_workers=4,
        hidden=8,
        learning_rates=(1e-2,),
        num_samples=64,
        num_gradients=32,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", horizon=50, budget=450_000, num_workers=256, hidden=256),
}

POINTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""The shares of the budget at which a run is measured."""
EARLY = 2
"""The place in ``POINTS`` of the early reward: after 2 % of the budget."""
GRADIENTS = 256
"""Gradients that are computed at once."""
UNTOLD = 0.1
"""A mean gradient is told if its noise, squared, is at most this share of its squared norm."""
TUNING = 1000
"""The key of the runs that choose the learning rates."""


class Method(NamedTuple):
    """One way to train theta.

    Attributes:
        estimator: The gradient estimator of one worker.
        evaluations: Network evaluations of one call.
        tilts: Whether its aim is the tilted law.
    """

    estimator: GradientEstimator
    evaluations: int
    tilts: bool = False


def methods(settings: Settings, problem: ug.UnrolledProblem, base: Theta) -> dict[str, Method]:
    """The methods by name. What they evaluate is counted as the settings' help says."""
    steps, scale = settings.horizon, settings.reward_scale
    few = min(5, steps)
    alignprop = samplers.alignprop_cutoff(steps)
    every = samplers.cutoff([1 / steps] * steps)

    def walked(law):  # the steps that are walked back are computed again
        mean = sum(k * p for k, p in enumerate(law.probabilities, 1))
        return steps + round(3 * mean)

    def matching(adjoint):
        return samplers.adjoint_matching(problem, base, scale, adjoint=adjoint)

    return {
        "DRaFT": Method(ug.bptt(problem), 3 * steps),
        f"DRaFT-{few}": Method(ug.bptt(problem, last=few), steps + 2 * few),
        "DRaFT-1": Method(ug.bptt(problem, last=1), steps + 2),
        "DRaFT-LV": Method(samplers.draft_lv(problem, 2), steps + 9),
        "AlignProp": Method(ug.bptt(problem, last=alignprop), walked(alignprop)),
        "AlignProp, unbiased": Method(ug.bptt(problem, last=every, unbiased=True), walked(every)),
        "DRTune": Method(samplers.skip_path(problem, 3), steps + 10),
        "ES": Method(ug.full_es(problem, sigma=settings.sigma), 2 * steps),
        "adjoint matching": Method(matching("lean"), 7 * steps, True),
        "adjoint matching, basic": Method(matching("basic"), 10 * steps, True),
    }


def network(settings: Settings, key: Key) -> list[dict[str, jax.Array]]:
    """The weights of an MLP whose output is zero at first."""
    sizes = (7, settings.hidden, settings.hidden, 2)
    layers = [
        {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
    ]
    layers[-1]["w"] = jnp.zeros_like(layers[-1]["w"])
    return layers


def push(theta: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """What the MLP adds to the velocity at x."""
    angles = jnp.pi * t * jnp.array([1.0, 2.0])
    hidden = jnp.concatenate([x / 2, t[None], jnp.sin(angles), jnp.cos(angles)])
    for layer in theta[:-1]:
        hidden = jax.nn.silu(hidden @ layer["w"] + layer["b"])
    return hidden @ theta[-1]["w"] + theta[-1]["b"]


class Programs(NamedTuple):
    """What all seeds share: the problem and compiled functions.

    Attributes:
        problem: The sampler.
        methods: The methods by name.
        trainers: Their training, by name.
        whole: The mean of ``num_gradients`` whole gradients.
        measure: The numbers of a theta, from the key of its samples.
    """

    problem: ug.UnrolledProblem
    methods: dict[str, Method]
    trainers: dict[str, "Trainer"]
    whole: GradientEstimator
    measure: Callable[[Key, Theta], dict[str, jax.Array]]


class Trainer(NamedTuple):
    """A method's training in one program, whatever the rate, the key and the stretch.

    Attributes:
        num_steps: Updates that the budget allows.
        evaluations: Network evaluations of an update, for each worker.
        tilts: Whether the method's aim is the tilted law.
        begin: ``begin(theta)``, the carry before the first update.
        run: ``run(carry, key, rate, until)``, the carry after update number ``until``.
    """

    num_steps: int
    evaluations: int
    tilts: bool
    begin: Callable[[Theta], Any]
    run: Callable[..., Any]


class Carry(NamedTuple):
    """The state of a run.

    Attributes:
        theta: The parameters.
        worker: The estimator's state.
        adam: The optimizer's state.
        step: Updates so far.
        log_loss: The sum of the logarithms of the updates' losses.
    """

    theta: Theta
    worker: Any
    adam: Any
    step: jax.Array
    log_loss: jax.Array


def trainer(settings: Settings, method: Method) -> Trainer:
    """The training with one method."""
    estimator, adam = ug.average(method.estimator, settings.num_workers), optax.scale_by_adam()
    num_steps = max(settings.budget // method.evaluations, 1)

    @jax.jit
    def begin(theta):
        worker = estimator.init(jax.random.key(0), theta)
        return Carry(theta, worker, adam.init(theta), jnp.int32(0), jnp.float32(0))

    def update(key, rate, carry):
        theta, worker, state, step, log_loss = carry
        estimate, worker = estimator.estimate(jax.random.fold_in(key, step), theta, worker)
        updates, state = adam.update(estimate.grad, state, theta)
        size = -rate * (1 - step / num_steps)
        theta = jax.tree.map(lambda x, u: x + size * u, theta, updates)
        return Carry(theta, worker, state, step + 1, log_loss + jnp.log(estimate.loss))

    @jax.jit
    def run(carry, key, rate, until):
        return jax.lax.while_loop(
            lambda carry: carry.step < until, functools.partial(update, key, rate), carry
        )

    return Trainer(num_steps, method.evaluations, method.tilts, begin, run)


@functools.lru_cache(maxsize=2)
def programs(settings: Settings) -> Programs:
    """The functions that all seeds share; ``settings`` is ``without_run``."""
    problem = samplers.flow(
        lambda theta, x, t: mixture.velocity(x, t) + push(theta, x, t),
        num_steps=settings.horizon,
        reward=mixture.reward,
        sample_shape=(2,),
        noise="memoryless",
    )
    target, data = mixture.tilted(settings.reward_scale), mixture.tilted(0.0)

    @jax.jit
    def measure(key, theta):
        keys = jax.random.split(key, settings.num_samples)
        x = jax.vmap(lambda key: samplers.sample(problem, key, theta))(keys)
        return {
            "reward": jnp.mean(jax.vmap(mixture.reward)(x)),
            "kl": mixture.divergence(x, target),
            "kl_modes": mixture.mode_divergence(x, target),
            "kl_data": mixture.divergence(x, data),
            "shares": mixture.shares(x),
        }

    table = methods(settings, problem, untrained(settings))
    trainers = {name: trainer(settings, method) for name, method in table.items()}
    batch = {"batch_size": min(settings.num_gradients, GRADIENTS)}
    whole = ug.average(table["DRaFT"].estimator, settings.num_gradients, **batch)
    return Programs(problem, table, trainers, whole, measure)


def untrained(settings: Settings) -> Theta:
    """Parameters with which the network adds nothing: the base of adjoint matching."""
    return network(settings, jax.random.key(TUNING))


@functools.lru_cache(maxsize=2)
def rates(settings: Settings) -> dict[str, float]:
    """The best rate of the grid for each method, on a key that is not reported."""
    tools, start, grid = programs(settings), untrained(settings), settings.learning_rates
    out = {}
    for name, method in tools.trainers.items():
        found = []
        for rate in grid if len(grid) > 1 else ():
            key = jax.random.key(TUNING)
            end = method.run(method.begin(start), key, rate, method.num_steps)
            score = tools.measure(key, end.theta)["kl"] if method.tilts else end.log_loss
            found.append(float(score) if np.isfinite(score) else np.inf)
        out[name] = grid[int(np.argmin(found))] if found else grid[0]
    return out


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the curves, the modes' shares at the end, and the gradients at three thetas."""
    shared = settings.without_run()
    progress("learning rates", 0.0)
    tools, best = programs(shared), rates(shared)
    for_theta, for_runs, for_samples, for_gradients = jax.random.split(jax.random.key(seed), 4)
    start = network(settings, for_theta)
    thetas, curves = {"start": start}, {}
    for i, (name, method) in enumerate(tools.trainers.items()):
        progress(name, 0.8 * i / len(tools.trainers))
        carry, seconds, modes = method.begin(start), 0.0, np.zeros(8)
        method.run(carry, for_runs, best[name], 0)  # compiles
        for share in POINTS:
            begun = time.perf_counter()
            until = round(share * method.num_steps)
            carry = jax.block_until_ready(method.run(carry, for_runs, best[name], until))
            seconds += time.perf_counter() - begun
            numbers = dict(tools.measure(for_samples, carry.theta))
            modes = np.asarray(numbers.pop("shares"))
            numbers = {k: float(x) for k, x in numbers.items()}
            numbers |= {"evaluations": until * method.evaluations, "seconds": seconds}
            write({"estimator": name, "place": "", "step": until, **numbers})
            curves.setdefault(name, []).append(numbers)
            if name == "DRaFT" and share == POINTS[3]:
                thetas["on the way"] = carry.theta
        write({"estimator": name, "place": "", "rate": best[name]})
        if name == "adjoint matching":
            thetas["tilted"] = carry.theta
        for mode, number in enumerate(modes):
            write({"estimator": name, "place": "modes", "step": mode, "share": float(number)})
    least = min(curve[-1]["seconds"] for curve in curves.values())
    for name, curve in curves.items():
        write({"estimator": name, "place": "path", **along(curve, least)})
    for i, (place, theta) in enumerate(thetas.items()):
        progress(f"gradients, {place}", 0.8 + 0.2 * i / len(thetas))
        for name, numbers in gradients(settings, tools, for_gradients, theta).items():
            write({"estimator": name, "place": place, **numbers})


def along(curve: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Numbers along a run: early rewards, the least divergence, and what a time gives.

    Args:
        curve: The numbers at the ``POINTS``.
        seconds: The time at which the reward and the divergence are read, by interpolation.
    """
    lines = {name: np.array([numbers[name] for numbers in curve]) for name in curve[0]}
    return {
        "reward_early": float(lines["reward"][EARLY]),
        "kl_least": float(np.min(lines["kl"][1:])),
        "reward_at_seconds": float(np.interp(seconds, lines["seconds"], lines["reward"])),
        "kl_at_seconds": float(np.interp(seconds, lines["seconds"], lines["kl"])),
    }


def gradients(
    settings: Settings, tools: Programs, key: Key, theta: Theta
) -> dict[str, dict[str, float]]:
    """Norm, noise and direction of each method's gradient for one sample, at a frozen theta.

    ``norm_ratio`` is |E g| over the norm of the whole gradient, ``noise`` the variance over
    |E g|^2, and ``cosine`` the one of E g and the whole gradient. The squared norms are without the
    noise of the means, and products are those with a whole gradient from other episodes, so that
    they have no noise in common; the whole gradient's own product stands for its squared norm. If
    the mean is mostly noise, there is only ``noise_above``, a number that its ``noise`` exceeds.
    """
    n = settings.num_gradients
    other, key = jax.random.split(key)
    reference, _ = tools.whole.estimate(other, theta, tools.whole.init(other, theta))
    comparison = ug.diagnostics.compare(
        tools.problem,
        theta,
        {name: method.estimator for name, method in tools.methods.items()},
        reference=reference.grad,
        num_samples=n,
        num_chains=0,
        batch_size=min(n, GRADIENTS),
        key=key,
        progress=lambda *args: None,
        on_row=lambda row: None,
    )
    rows = {row["name"]: row for row in comparison.rows}
    means = {name: _mean(row, n) for name, row in rows.items()}
    whole, out = means["DRaFT"], {}
    for name, mean in means.items():
        if not mean.told:
            out[name] = {"noise_above": UNTOLD * n}
            continue
        out[name] = {"noise": rows[name]["variance"] / mean.square}
        if whole.told:
            ratio = (mean.square / whole.square) ** 0.5
            out[name] |= {"norm_ratio": ratio, "cosine": mean.inner / whole.inner / ratio}
    return out


class Mean(NamedTuple):
    """A mean gradient, without the noise of its squared norm.

    Attributes:
        square: Its squared norm.
        inner: Its product with the whole gradient.
        told: Whether the noise of the mean is small beside it.
    """

    square: float
    inner: float
    told: bool


def _mean(row: dict[str, Any], n: int) -> Mean:
    noise = row["variance"] / n
    square = row["norm"] ** 2 - noise
    inner = row["cosine"] * row["norm"] * row["reference_norm"]
    return Mean(square, inner, noise <= UNTOLD * square)


EXPERIMENT = Experiment(
    name="reward_mixture",
    about="Reward gradients on a mixture: who keeps the modes, at equal network evaluations.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator", "place"),
    run=run,
    draw=figure.draw,
    show=figure.show,
    claims=figure.claims,
    would_change=(
        "On a two-dimensional or image model whose tilted law is known, five seeds each, a method "
        "that maximises the mean reward ends closer to the tilted law than adjoint matching."
    ),
)
