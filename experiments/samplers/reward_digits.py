"""``reward_digits``: a diffusion model of digits learns to please a classifier, and cheats it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework.experiment import Experiment, Progress, Write
from experiments._framework.settings import CommonSettings
from experiments.samplers import digit_model as digits
from experiments.samplers import reward_digits_figure as figure
from unrollgrad import samplers
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Fine-tuning of a diffusion model of scikit-learn's 8 x 8 digits for three rewards.

    The rewards are the log probability of an eight under a classifier (the judge, an MLP), minus
    the total variation, and minus the bytes after zlib, which have no gradient. A classifier of
    another kind, a kernel density of other images, is never rewarded. Theta is a low-rank update of
    the denoiser's weights. All runs have the same number of network evaluations (one without a
    gradient counts 1, a backward pass 2 more) and the same rate of Adam: the claims are about where
    they lead, not about speed.
    """

    hidden: int = 128
    """Units in each of the denoiser's three hidden layers."""
    training_steps: int = 6000
    """Steps that train the denoiser, once for all seeds."""
    horizon: int = 20
    """Denoising steps (T), of DDIM with eta = 1."""
    budget: int = 18_000
    """Network evaluations of a run, for each of the workers."""
    num_workers: int = 32
    """Samples in an update (antithetic pairs of them for ES)."""
    rank: int = 4
    """The rank of the update of every matrix."""
    learning_rate: float = 5e-3
    """The rate of Adam, which falls to zero linearly."""
    sigma: float = 0.03
    """The perturbation's standard deviation for ES."""
    num_samples: int = 256
    """Samples that measure each point of a curve."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws theta's start, the episodes and the samples."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        hidden=16,
        training_steps=100,
        horizon=4,
        budget=60,
        num_workers=4,
        num_samples=16,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper", hidden=512, training_steps=60_000, horizon=50, budget=450_000, num_workers=64
    ),
}

POINTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of the budget at which a run is measured."""
SHOWN = 8
"""Images of each run that the picture shows."""


class Run(NamedTuple):
    """A way to fine-tune the model.

    Attributes:
        reward: The reward's name.
        estimator: From the sampler and the untrained theta to the estimator of one worker.
        evaluations: Network evaluations of one call, from the number of denoising steps.
    """

    reward: str
    estimator: Callable[[ug.UnrolledProblem, Theta], GradientEstimator]
    evaluations: Callable[[int], int]


def matching(scale: float) -> Callable[[ug.UnrolledProblem, Theta], GradientEstimator]:
    """Adjoint matching at a quarter of the steps."""

    def make(problem, base):
        some = -(-problem.horizon // 4)
        return samplers.adjoint_matching(problem, base, scale, regression_steps=some)

    return make


def runs(sigma: float) -> dict[str, Run]:
    """The runs by name."""

    def es(problem, base):
        return ug.full_es(problem, sigma=sigma)

    def matched(steps):
        return 4 * steps + 3 * -(-steps // 4)

    return {
        "DRaFT": Run("class", lambda p, base: ug.bptt(p), lambda steps: 3 * steps),
        "DRaFT-1": Run("class", lambda p, base: ug.bptt(p, last=1), lambda steps: steps + 2),
        "ES": Run("class", es, lambda steps: 2 * steps),
        "adjoint matching, scale 1": Run("class", matching(1.0), matched),
        "adjoint matching, scale 5": Run("class", matching(5.0), matched),
        "DRaFT, smooth": Run("smooth", lambda p, base: ug.bptt(p), lambda steps: 3 * steps),
        "ES, zlib": Run("zlib", es, lambda steps: 2 * steps),
    }


def rewards(model: digits.Model) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """The rewards by name."""
    return {
        "class": lambda x: digits.class_scores(model.judge, digits.visible(x))[digits.WANTED],
        "smooth": lambda x: -10 * digits.total_variation(digits.visible(x)),
        "zlib": lambda x: -0.1 * digits.zlib_bytes(digits.visible(x)),
    }


class Programs(NamedTuple):
    """What all seeds share.

    Attributes:
        model: The trained networks and the images.
        trainers: By run: its number of updates, and ``train(theta, key, begin, until)``.
        draw: ``draw(key, theta)``, samples.
        start: ``start(key)``, an untrained theta.
    """

    model: digits.Model
    trainers: dict[str, "Trainer"]
    draw: Callable[[Key, Theta], jax.Array]
    measure: Callable[[jax.Array], dict[str, jax.Array]]


class Trainer(NamedTuple):
    """The compiled updates of a run.

    Attributes:
        num_steps: Updates that the budget allows.
        evaluations: Network evaluations of an update, for each worker.
        begin: ``begin(theta)``, the carry before the first update.
        run: ``run(carry, key, until)``, the carry after update number ``until``.
    """

    num_steps: int
    evaluations: int
    begin: Callable
    run: Callable


def trainer(settings: Settings, one: Run, problem: ug.UnrolledProblem, base: Theta) -> Trainer:
    """The training of one run."""
    evaluations = one.evaluations(settings.horizon)
    num_steps = max(settings.budget // evaluations, 1)
    estimator = ug.average(one.estimator(problem, base), settings.num_workers)
    adam = optax.adam(optax.linear_schedule(settings.learning_rate, 0.0, num_steps))

    @jax.jit
    def begin(theta):
        return theta, estimator.init(jax.random.key(0), theta), adam.init(theta), jnp.int32(0)

    @jax.jit
    def run(carry, key, until):
        def update(carry):
            theta, worker, state, step = carry
            estimate, worker = estimator.estimate(jax.random.fold_in(key, step), theta, worker)
            updates, state = adam.update(estimate.grad, state, theta)
            return optax.apply_updates(theta, updates), worker, state, step + 1

        return jax.lax.while_loop(lambda carry: carry[-1] < until, update, carry)

    return Trainer(num_steps, evaluations, begin, run)


@functools.lru_cache(maxsize=2)
def programs(settings: Settings) -> tuple[Programs, Callable[[Key], Theta]]:
    """The functions that all seeds share, and the start's; ``settings`` is ``without_run``."""
    model = digits.model(settings.hidden, settings.training_steps)
    base, merge = samplers.lora(model.weights, settings.rank, jax.random.key(0))
    table = runs(settings.sigma)
    problems = {
        name: samplers.ddim(
            lambda theta, x, t: digits.denoiser(merge(theta), x, t),
            digits.SCHEDULE,
            num_steps=settings.horizon,
            reward=reward,
            sample_shape=(digits.PIXELS,),
            eta=1.0,
        )
        for name, reward in rewards(model).items()
    }

    @jax.jit
    def draw(key, theta):
        keys = jax.random.split(key, settings.num_samples)
        return jax.vmap(lambda key: samplers.sample(problems["class"], key, theta))(keys)

    trainers = {
        name: trainer(settings, one, problems[one.reward], base) for name, one in table.items()
    }

    def start(key):
        return samplers.lora(model.weights, settings.rank, key)[0]

    measure = jax.jit(functools.partial(digits.measures, model))
    return Programs(model, trainers, draw, measure), start


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the curves of all runs, the references, and images of the first seed."""
    progress("the diffusion model", 0.0)
    tools, start = programs(settings.without_run())
    for_theta, for_runs, for_samples = jax.random.split(jax.random.key(seed), 3)
    first, theta = seed == settings.seeds[0], start(for_theta)
    reals = {
        "data": tools.model.images[: settings.num_samples],
        "data, eights": tools.model.images[tools.model.labels == digits.WANTED],
    }
    for name, x in {**reals, "untrained": tools.draw(for_samples, theta)}.items():
        write({"estimator": name, "image": "", **numbers(tools, x)})
        if first:
            images(name, x, write)
    for i, (name, train) in enumerate(tools.trainers.items()):
        progress(name, (1 + i) / (1 + len(tools.trainers)))
        carry = train.begin(theta)
        for share in POINTS:
            until = round(share * train.num_steps)
            carry = train.run(carry, for_runs, until)
            x = tools.draw(for_samples, carry[0])
            at = {"step": until, "evaluations": until * train.evaluations}
            write({"estimator": name, "image": "", **at, **numbers(tools, x)})
        if first:
            images(name, x, write)


def numbers(tools: Programs, x: jax.Array) -> dict[str, float]:
    """The measures of samples, and their mean size after zlib."""
    found = {name: float(value) for name, value in tools.measure(x).items()}
    return found | {"bytes": float(np.mean(digits.sizes(x)))}


def images(name: str, x: jax.Array, write: Write) -> None:
    """Writes some images, pixel by pixel."""
    for i, image in enumerate(np.asarray(x)[:SHOWN]):
        for place, pixel in enumerate(image):
            write({"estimator": name, "image": str(i), "step": place, "pixel": float(pixel)})


EXPERIMENT = Experiment(
    name="reward_digits",
    about="A diffusion model of digits fine-tuned for rewards: hacking, and what keeps variety.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator", "image"),
    run=run,
    draw=figure.draw,
    show=figure.show,
    claims=figure.claims,
    would_change=(
        "With a pretrained text-to-image model and five seeds, a long run of DRaFT keeps the "
        "variety of the samples, or a held-out reward model rises as much as the trained one."
    ),
)
