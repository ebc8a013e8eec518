"""``variance_lstm``: variance against the number of unrolls on three texts (Vicol et al. 2021)."""

import argparse
import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import unrollgrad as ug
from experiments._framework.experiment import Experiment, Progress, Write
from experiments._framework.settings import CommonSettings
from experiments.estimators.variance_lstm_figure import OTHER_SIGMA, claims, draw, show
from experiments.estimators.window_influence import window_influence
from experiments.problems.text_lstm import LSTM, VOCABULARY, encode, zero_carry
from unrollgrad.diagnostics import statistics
from unrollgrad.problems import theory


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Does the variance grow with the number of unrolls? An LSTM reads three texts at frozen theta.

    A sample is the mean of one antithetic pair's estimates over the windows (unrolls) of one
    episode, which always begins at the same place of the same text. Its variance, the trace of the
    covariance, is divided by the squared norm of the gradient. It is compared with the closed form
    for losses that are quadratic in theta, evaluated on exact window gradients by reverse mode.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the published settings."""
    corpus: Path | None = None
    """The file whose text is called real. Default: source code, the standard library's argparse."""
    estimators: tuple[Literal["pes", "gpes", "es_single"], ...] = ("pes", "gpes", "es_single")
    """The estimators to run."""
    horizon: int = 200
    """Characters in an episode."""
    num_windows: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200)
    """Windows per episode, divisors of the horizon."""
    exact_windows: int = 100
    """The closed form is evaluated for the numbers of windows that divide this one. It takes this
    many backward passes, and memory for its square times the number of weights."""
    num_samples: int = 500
    """Antithetic pairs, each through a whole episode."""
    sigma: float = 1e-3
    """Standard deviation of the perturbation."""
    num_noise_periods: int = 5
    """Draws of gpes's noise per episode; gpes is measured where each draw begins a window."""
    embed: int = 5
    """Size of the embedding."""
    hidden: int = 5
    """Units of the LSTM."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws new weights, another place of the corpus, other characters and noise."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("pes", "es_single"),
        horizon=20,
        num_windows=(1, 20),
        exact_windows=20,
        num_samples=300,
        num_noise_periods=2,
        embed=2,
        hidden=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        horizon=1000,
        num_windows=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        num_samples=25_000,
    ),
}

BATCH = 50
"""Number of pairs that run at the same time."""


class _Measurement(NamedTuple):
    """What decides the compiled program: the estimator, the sizes, the windows, and the draws."""

    estimator: str
    num_windows: int
    horizon: int
    embed: int
    hidden: int
    num_samples: int
    num_noise_periods: int


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the variance and its closed form for each text, estimator and number of unrolls.

    Raises:
        ValueError: If a number of windows does not divide the horizon, or the corpus is too short.
    """
    wrong = [n for n in (*settings.num_windows, settings.num_noise_periods) if settings.horizon % n]
    if wrong:
        raise ValueError(f"`horizon` is {settings.horizon}, which {wrong} do not divide.")
    corpus = inspect.getsource(argparse) if settings.corpus is None else _read(settings.corpus)
    theta = initial_theta(settings.embed, settings.hidden, seed)
    symbols = texts(corpus, settings.horizon, seed)
    for i, (text, characters) in enumerate(symbols.items()):
        progress(text, i / len(symbols))
        data = jnp.asarray(characters[:-1]), jnp.asarray(characters[1:])
        influence = window_influence(
            reader(settings.horizon, settings.embed, settings.hidden),
            jax.random.key(0),  # nothing is drawn
            theta,
            settings.exact_windows,
            data,
        )
        square = float(np.sum(theory.gradient(influence) ** 2))
        for part, name in enumerate(settings.estimators):
            found = {}
            for j, unrolls in enumerate(_unrolls(settings, name)):
                key = jax.random.fold_in(jax.random.key(seed), i * settings.horizon + unrolls)
                measured = _measurement(settings, name, unrolls)
                samples = functools.partial(_samples, measured, key, theta, data)
                squares = statistics.squares(_flat(samples(settings.sigma))) / square
                found[unrolls] = numbers = {
                    "variance": float(np.mean(squares)),
                    "variance_se": statistics.standard_error(squares),
                }
                if settings.exact_windows % unrolls == 0:
                    numbers |= _exact(settings, name, influence, unrolls, square)
                    numbers["ratio"] = numbers["variance"] / numbers["exact"]
                if name == "pes" and unrolls == max(settings.num_windows):
                    other = _flat(samples(OTHER_SIGMA * settings.sigma))
                    numbers["other_sigma"] = statistics.total_variance(other) / square
                write({"text": text, "estimator": name, "unrolls": unrolls, **numbers})
                done = part + (j + 1) / len(settings.num_windows)
                progress(f"{text}: {name}", (i + done / len(settings.estimators)) / len(symbols))
            if len(found) > 1:
                slope = _slope({n: x["variance"] for n, x in found.items()})
                write({"text": text, "estimator": name, "unrolls": "all", "slope": slope})


def _read(corpus: Path) -> str:
    text = corpus.read_text(errors="replace")
    if len(text) < 2:
        raise ValueError(f"`corpus` must have at least 2 characters; {corpus} has {len(text)}.")
    return text


def texts(corpus: str, horizon: int, seed: int) -> dict[str, np.ndarray]:
    """The three texts as horizon + 1 symbols each; the last symbol is only predicted."""
    draws = np.random.default_rng(seed)
    place = draws.integers(len(corpus))
    real = encode(corpus)[(place + np.arange(horizon + 1)) % len(corpus)]
    random = draws.integers(VOCABULARY, size=horizon + 1, dtype=np.int32)
    return {"real": real, "random": random, "repeated": np.full_like(real, real[0])}


def initial_theta(embed: int, hidden: int, seed: int) -> jax.Array:
    """The LSTM's weights as flax draws them, as one vector."""
    return _vector(_lstm(embed, hidden, seed))[0]


@functools.cache
def reader(horizon: int, embed: int, hidden: int) -> ug.UnrolledProblem:
    """The LSTM of ``text_lstm`` on a text that comes as data: (symbols, following symbols)."""
    model = _lstm(embed, hidden, seed=0)
    graph, unravel = nnx.graphdef(model), _vector(model)[1]

    def step(key, theta, carry, t, batch):
        symbol, following = batch
        carry, logits = nnx.merge(graph, unravel(theta))(carry, symbol[None])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, following[None])
        return carry, losses.mean()

    return ug.UnrolledProblem(lambda key, theta: zero_carry(theta, 1, hidden), step, horizon)


def _lstm(embed: int, hidden: int, seed: int) -> LSTM:
    return LSTM(VOCABULARY, embed, hidden, VOCABULARY, rngs=nnx.Rngs(seed))


def _vector(model: LSTM) -> tuple[jax.Array, Any]:
    """The weights as one vector: one leaf's noise compiles many times faster than fourteen's."""
    return ravel_pytree(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _unrolls(settings: Settings, name: str) -> list[int]:
    """The numbers of unrolls at which the estimator is measured."""
    return [
        n for n in settings.num_windows if name != "gpes" or n % settings.num_noise_periods == 0
    ]


def _measurement(settings: Settings, name: str, num_windows: int) -> _Measurement:
    sizes = settings.horizon, settings.embed, settings.hidden, settings.num_samples
    return _Measurement(name, num_windows, *sizes, settings.num_noise_periods)


@functools.partial(jax.jit, static_argnums=0)
def _samples(
    measured: _Measurement, key: jax.Array, theta: jax.Array, data: Any, sigma: float
) -> jax.Array:
    """Every sample's mean estimate over the windows of its episode, stacked."""
    unrolls, horizon = measured.num_windows, measured.horizon
    truncation = horizon // unrolls
    estimator = ug.REGISTRY[measured.estimator].build(
        reader(horizon, measured.embed, measured.hidden),
        truncation=truncation,
        sigma=sigma,
        noise_period=horizon // measured.num_noise_periods,
        num_pairs=1,
    )
    windows = jax.tree.map(lambda x: x.reshape(unrolls, truncation, *x.shape[1:]), data)

    def sample(key):
        def call(carry, inputs):
            state, total = carry
            i, window = inputs
            estimate, state = estimator.estimate(
                jax.random.fold_in(key, i), theta, state, data=window
            )
            return (state, jax.tree.map(jnp.add, total, estimate.grad)), None

        begin = estimator.init(key, theta), jax.tree.map(jnp.zeros_like, theta)
        (_, total), _ = jax.lax.scan(call, begin, (jnp.arange(unrolls), windows))
        return jax.tree.map(lambda x: x / unrolls, total)

    return jax.lax.map(sample, jax.random.split(key, measured.num_samples), batch_size=BATCH)


def _flat(tree: Any) -> np.ndarray:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def _exact(
    settings: Settings, name: str, influence: np.ndarray, unrolls: int, square: float
) -> dict[str, float]:
    """The closed form, divided by the squared norm of the gradient."""
    truncation = settings.exact_windows // unrolls
    period = {
        "pes": truncation,
        "gpes": settings.exact_windows // settings.num_noise_periods,
        "es_single": None,
    }[name]
    return {"exact": theory.episode_variance(influence, truncation, period) / square}


def _slope(variances: dict[int, float]) -> float:
    """The slope of log variance against log unrolls, by least squares."""
    return float(np.polyfit(np.log(list(variances)), np.log(list(variances.values())), 1)[0])


EXPERIMENT = Experiment(
    name="variance_lstm",
    about="Variance against the number of unrolls: an LSTM on three texts, and the closed form.",
    settings=Settings,
    scales=SCALES,
    labels=("text", "estimator", "unrolls"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With an LSTM of a million weights and up to 1000 unrolls, the slope of ES-Single's "
        "variance is over 0.1, or PES's variance over 15 % off its closed form, with standard "
        "errors of a third of that."
    ),
)
