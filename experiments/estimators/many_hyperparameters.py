"""``many_hyperparameters``: evolution strategies and random search tune 29 hyperparameters."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments._framework import curves, training, tuning
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import data
from unrollgrad.running import need
from unrollgrad.types import Key


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Tune a learning rate and a momentum for every tensor, and a width for every hidden layer.

    An MLP of five hidden layers learns digits; theta is 12 log learning rates, 12 logits of momenta
    and 5 logits of the share of units that are used. J is the mean validation loss along training,
    on fresh trainings, which are not counted. Random search draws thetas and chooses its best by
    one training of each, which is counted. Every method chooses its own setting on runs that are
    not reported: an estimator Adam's learning rate, random search the range of its learning rates.
    All estimators begin at a theta from the published distribution, whose rates are low here: a
    training of 200 steps, a fifth of the published number, learns next to nothing there.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the published widths, windows, pairs and
    steps."""
    estimators: tuple[Literal["es_single", "pes", "truncated_es"], ...] = (
        "es_single",
        "pes",
        "truncated_es",
    )
    """The estimators to run beside random search."""
    width: int = 16
    """Units of each hidden layer; theta decides which share of them is used."""
    batch_size: int = 16
    """Images in a training batch, and in a validation batch."""
    horizon: int = 200
    """Training steps in an episode."""
    truncation: int = 10
    """Training steps in a window."""
    num_pairs: int = 5
    """Antithetic pairs: half the papers' number of particles."""
    sigma: float = 0.3
    """Standard deviation of the perturbation, as published."""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Learning rates of Adam, of which each estimator uses the best."""
    search_ranges: tuple[tuple[float, float], ...] = ((1e-4, 1e-2), (1e-3, 1e-1), (1e-2, 1.0))
    """Ranges of the MLP's learning rates, of which random search uses the best. The first is the
    published one."""
    tuning_runs: int = 3
    """Runs of each setting that choose the best one, each from its own theta; by the geometric mean
    of J along them."""
    budget: int = 150_000
    """Training steps of each run."""
    num_episodes: int = 10
    """Fresh trainings whose mean loss is J, as published."""
    seeds: tuple[int, ...] = (3, 5, 7, 11, 13)
    """Each seed is a whole run, from its own theta."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("es_single",),
        width=4,
        batch_size=4,
        horizon=20,
        learning_rates=(0.1,),
        search_ranges=((1e-2, 1.0),),
        tuning_runs=1,
        budget=4_000,
        num_episodes=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        width=100,
        batch_size=100,
        horizon=1000,
        learning_rates=(0.003, 0.01, 0.03),
        budget=3_000_000,
        seeds=(3, 5, 7, 11),
    ),
}

LAYERS = 5
"""Number of hidden layers."""

POINTS = 20
"""Number of points of each curve."""

TUNING, HELD_OUT = 1_000_000, 1_000_001
"""Seeds of keys that no run uses."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J along each method's run, and the setting that each method chose."""
    progress("choosing settings", 0.0)
    prepared = _prepare(settings.without_run())
    for name, chosen in prepared.chosen.items():
        write({"estimator": name, **chosen})
    key, key_theta, key_search = jax.random.split(jax.random.key(seed), 3)
    theta = draw_theta(key_theta)
    training.side_by_side(prepared.plan, key, theta, write, progress)
    for tried, theta in prepared.search(key_search):
        steps = {"step": tried, "inner_steps": tried * settings.horizon}
        write({"estimator": "random_search", **steps, **prepared.plan.evaluate(theta)})


class Prepared(NamedTuple):
    """What all seeds share.

    Attributes:
        plan: The estimators, and J on fresh trainings.
        search: A function from a key to pairs (number of thetas tried, the best of them) along a
            random search.
        chosen: The setting of each method, by metric.
    """

    plan: training.Plan
    search: Callable[[Key], list[tuple[int, dict[str, jax.Array]]]]
    chosen: dict[str, dict[str, float]]


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> Prepared:
    problem = make_problem(settings)
    fresh = jax.random.split(jax.random.key(HELD_OUT), settings.num_episodes)

    @jax.jit
    def loss(theta):
        return jnp.mean(jax.vmap(lambda key: ug.episode_loss(problem, key, theta))(fresh))

    common = {"sigma": settings.sigma, "num_pairs": settings.num_pairs}
    methods, chosen = {}, {}
    names: tuple[str, ...] = settings.estimators
    for name in names:
        row = ug.REGISTRY[name]
        estimator = row.build(problem, truncation=settings.truncation, **common)
        num_steps = settings.budget // (row.passes(settings.num_pairs) * settings.truncation)
        every = num_steps // POINTS
        trial = tuning.Trial(estimator, optax.adam, POINTS * every, every, loss)
        rate = _best_rate(settings, trial)
        methods[name] = training.Method(estimator, optax.adam(rate), num_steps)
        chosen[name] = {"adam_rate": rate}
    count = settings.budget // settings.horizon
    low, high = _best_range(settings, problem, count, loss)
    return Prepared(
        training.Plan(methods, jax.jit(lambda theta: {"loss": loss(theta)}), POINTS),
        functools.partial(random_search, problem, count, (low, high)),
        {**chosen, "random_search": {"lowest_rate": low, "highest_rate": high}},
    )


def _tuning_keys(settings: Settings) -> Iterator[tuple[Key, Key]]:
    """The keys of the runs that choose settings: of theta, and of the run."""
    for key in jax.random.split(jax.random.key(TUNING), settings.tuning_runs):
        key_run, key_theta = jax.random.split(key)
        yield key_theta, key_run


def _best_rate(settings: Settings, trial: tuning.Trial) -> float:
    rates = settings.learning_rates
    if len(rates) == 1:
        return rates[0]
    scores = [
        tuning.scores(trial, rates, key_run[None], draw_theta(key_theta))
        for key_theta, key_run in _tuning_keys(settings)
    ]
    return rates[int(jnp.argmin(jnp.mean(jnp.stack(scores), axis=0)))]


def _best_range(
    settings: Settings, problem: ug.UnrolledProblem, count: int, loss: Callable[..., jax.Array]
) -> tuple[float, float]:
    """The range of rates with which random searches have the lowest geometric mean of J."""
    ranges = settings.search_ranges
    if len(ranges) == 1:
        return ranges[0]

    def total(rates):
        searches = [random_search(problem, count, rates, key) for _, key in _tuning_keys(settings)]
        losses = [[loss(theta) for _, theta in search] for search in searches]
        return float(jnp.mean(tuning.score(jnp.array(losses))))

    return min(ranges, key=total)


def random_search(
    problem: ug.UnrolledProblem, count: int, rates: tuple[float, float], key: Key
) -> list[tuple[int, dict[str, jax.Array]]]:
    """Tries ``count`` thetas with one episode each.

    Args:
        problem: The problem.
        count: Number of thetas.
        rates: The least and the largest learning rate of a theta.
        key: The key of the thetas and their episodes.

    Returns:
        The number of thetas tried and the best of them, after each of POINTS equal parts.
    """
    thetas, losses = _tried(problem, count, rates, key)
    ends = [count * (i + 1) // POINTS for i in range(POINTS)]
    best = [int(jnp.argmin(losses[:end])) for end in ends]
    return [
        (end, jax.tree.map(lambda x, i=i: x[i], thetas)) for end, i in zip(ends, best, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tried(
    problem: ug.UnrolledProblem, count: int, rates: tuple[float, float], key: Key
) -> tuple[dict[str, jax.Array], jax.Array]:
    def one(i):
        key_theta, key_episode = jax.random.split(jax.random.fold_in(key, i))
        theta = draw_theta(key_theta, rates)
        return theta, ug.episode_loss(problem, key_episode, theta)

    return jax.lax.map(one, jnp.arange(count), batch_size=50)


PUBLISHED = (1e-4, 1e-2)
"""The range of the learning rates of an initial theta."""


def draw_theta(key: Key, rates: tuple[float, float] = PUBLISHED) -> dict[str, jax.Array]:
    """Draws a theta as published: log-uniform rates, uniform momenta and shares, unconstrained."""
    keys = jax.random.split(key, 3)
    tensors = 2 * (LAYERS + 1)
    low, high = (jnp.log(rate) for rate in rates)
    log_rates = jax.random.uniform(keys[0], (tensors,), minval=low, maxval=high)
    momenta = jax.random.uniform(keys[1], (tensors,), minval=0.01, maxval=0.9)
    shares = jax.random.uniform(keys[2], (LAYERS,), minval=0.2, maxval=0.8)
    return {
        "log_rate": log_rates,
        "momentum_logit": jax.scipy.special.logit(momenta),
        "share_logit": jax.scipy.special.logit(shares),
    }


def sgd_by_tensor(log_rate: jax.Array, momentum_logit: jax.Array) -> optax.GradientTransformation:
    """SGD with momentum; each tensor has its own rate and momentum, in the order of the leaves."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        treedef = jax.tree.structure(updates)
        rates = treedef.unflatten(list(jnp.exp(log_rate)))
        momenta = treedef.unflatten(list(jax.nn.sigmoid(momentum_logit)))
        state = jax.tree.map(lambda m, v, g: m * v + g, momenta, state, updates)
        return jax.tree.map(lambda rate, v: -rate * v, rates, state), state

    return optax.GradientTransformation(init, update)


def logits(params: list[dict[str, jax.Array]], share_logit: jax.Array, x: jax.Array) -> jax.Array:
    """The logits of an MLP; each hidden layer's units from floor(share x width) on are masked."""
    *hidden, out = params
    for layer, share in zip(hidden, jax.nn.sigmoid(share_logit), strict=True):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        width = x.shape[-1]
        x = jnp.where(jnp.arange(width) < jnp.floor(share * width), x, 0.0)
    return x @ out["kernel"] + out["bias"]


def make_problem(settings: Settings) -> ug.UnrolledProblem:
    """Training on digits; a validation loss that is NaN or above 1.5 ln 10 counts as 1.5 ln 10."""
    images = data.load("digits")
    sizes = [64, *LAYERS * [settings.width], 10]

    def init_params(key):
        counts = [n * m for n, m in itertools.pairwise(sizes)]
        normal = jax.random.normal(key, (sum(counts),))  # one draw compiles faster than six
        parts = jnp.split(normal, list(itertools.accumulate(counts[:-1])))
        return [
            {"kernel": jnp.sqrt(2 / n) * part.reshape(n, m), "bias": jnp.zeros(m)}
            for (n, m), part in zip(itertools.pairwise(sizes), parts, strict=True)
        ]

    def draw(split, key):
        rows = jax.random.randint(key, (settings.batch_size,), 0, len(split.labels))
        return jnp.asarray(split.images)[rows], jnp.asarray(split.labels)[rows]

    def cross_entropy(theta, params, batch, key):
        found = logits(params, theta["share_logit"], batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch[1]).mean()

    def meta_loss(theta, params, key):
        loss = cross_entropy(theta, params, draw(images.validation, key), key)
        most = 1.5 * jnp.log(10.0)
        return jnp.where(loss < most, loss, most)

    return ug.training_problem(
        loss=cross_entropy,
        init_params=init_params,
        optimizer=lambda theta, t: sgd_by_tensor(theta["log_rate"], theta["momentum_logit"]),
        sample_batch=functools.partial(draw, images.train),
        meta_loss=meta_loss,
        horizon=settings.horizon,
    )


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws J against training steps, with the loss of a guess."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    curves.plot(axis, records, "loss", x="inner_steps")
    axis.axhline(math.log(10), color="black", ls=":", label="a guess, ln 10")
    axis.set(
        xlabel="training steps",
        ylabel="J of the present theta, the mean validation loss",
        title=f"{4 * (LAYERS + 1) + LAYERS} hyperparameters of an MLP on digits",
    )
    axis.legend(title=curves.seeds_of(records))
    return figure


def show(records: list[Record]) -> None:
    """Prints J at the end of every run."""
    curves.show_last(records, "loss", "J at the end")


def claims(summary: Summary) -> list[Claim]:
    """Persistent estimators beat random search and truncation at equal training steps."""
    pairs = (
        ("es_single", "random_search", "Vicol et al. 2023"),
        ("pes", "random_search", "Vicol et al. 2021"),
        ("pes", "truncated_es", "Vicol et al. 2021"),
        ("es_single", "pes", "Vicol et al. 2023"),
    )
    return [
        curves.compare(
            summary,
            curves.Comparison(
                "loss",
                name,
                "<",
                other,
                f"{name} ends at a lower J than {other} at equal training steps",
                source,
                "J ",
            ),
        )
        for name, other, source in pairs
    ]


EXPERIMENT = Experiment(
    name="many_hyperparameters",
    about="29 hyperparameters of an MLP: evolution strategies against random search.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
