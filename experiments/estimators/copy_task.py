"""``copy_task``: an LSTM repeats strings that grow as it learns (Mujika et al. 2018)."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unrollgrad as ug
from experiments._framework import curves
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems.text_lstm import LSTM, zero_carry
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train an LSTM to repeat binary strings: how long do they get with each estimator?

    The string grows by one symbol when the average of the cross-entropy is below 0.15 nats, so that
    a run attempts one symbol more than it has mastered. All methods spend the same number of inner
    steps; truncated methods see no further than a window. At scale cpu the strings stay so short
    that methods without memory are hardly behind, so that only scale paper has a claim.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the published network, windows, batch size
    and particles."""
    estimators: tuple[Literal["es_single", "pes", "truncated_es", "tbptt"], ...] = (
        "es_single",
        "pes",
        "truncated_es",
        "tbptt",
    )
    """The estimators to run."""
    hidden: int = 8
    """Units of the LSTM."""
    batch_size: int = 8
    """Strings in an episode."""
    longest: int = 20
    """Symbols of the longest string; a run that can repeat it stays at this length."""
    num_pairs: int = 32
    """Antithetic pairs; tbptt has two workers for each pair."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    truncation: int = 2
    """Inner steps in a window of the persistent estimators."""
    short: int = 4
    """Inner steps in a window of the truncated estimators."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Learning rates of Adam; each method uses the one that gets furthest on a run of its own."""
    num_checks: int = 80
    """Number of checks. A check updates the average cross-entropy, and the string may grow."""
    steps_per_check: int = 12_800
    """Inner steps between checks, summed over all pairs and both signs."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("es_single", "truncated_es"),
        hidden=4,
        longest=4,
        num_pairs=8,
        learning_rates=(0.03,),
        num_checks=20,
        steps_per_check=800,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        hidden=100,
        batch_size=32,
        longest=200,
        num_pairs=500,
        truncation=1,
        short=25,
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        num_checks=5000,
        steps_per_check=200_000,
    ),
}

POINTS = 20
"""Number of points of each curve."""

ENOUGH = 0.15
"""The average cross-entropy, in nats, below which the string grows."""

TESTED = 128
"""Number of strings in each check; their steps are not counted as inner steps."""

TUNING = 1_000_000
"""The seed of a key that no run uses."""


class Growing(NamedTuple):
    """The state of a run.

    Attributes:
        theta: All weights of the LSTM.
        state: The estimator's state.
        opt_state: Adam's state.
        length: Number of symbols in the strings of new episodes, which the run attempts.
        average: The exponential moving average, with weight 1/2, of the cross-entropy at this
            length.
        inner_steps: The inner steps so far, as ``info`` counts them.
        checks: Checks made so far.
    """

    theta: Theta
    state: Any
    opt_state: Any
    length: jax.Array
    average: jax.Array
    inner_steps: jax.Array
    checks: jax.Array


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes length and cross-entropy along each estimator's run."""
    settings = settings.without_run()
    for i, name in enumerate(settings.estimators):
        progress(name, i / len(settings.estimators))
        rate = best_rate(settings, name)
        for check, run in stages(settings, name, rate, jax.random.key(seed)):
            numbers = {"length": run.length, "average": run.average, "inner_steps": run.inner_steps}
            write({"estimator": name, "step": check, **numbers, "rate": rate})
            progress(name, (i + check / settings.num_checks) / len(settings.estimators))


@functools.lru_cache(maxsize=8)
def best_rate(settings: Settings, name: str) -> float:
    """The rate with the longest string on a run of its own; the lower average breaks ties."""
    key = jax.random.key(TUNING)

    def score(rate):
        *_, (_, run) = stages(settings, name, rate, key)
        return int(run.length), -float(run.average)

    return max(settings.learning_rates, key=score)


def stages(settings: Settings, name: str, rate: float, key: Key) -> Iterator[tuple[int, Growing]]:
    """Yields the number of checks and the state of a run, at its beginning and at each point."""
    count = min(POINTS, settings.num_checks)
    ends = [settings.num_checks * (i + 1) // count for i in range(count)]
    run = begin(settings, name, rate, key)
    yield 0, run
    for first, end in zip([0, *ends], ends, strict=False):
        run = train(settings, name, end - first, rate, key, run)
        yield end, run


def growing_problem(settings: Settings, length: jax.Array) -> ug.UnrolledProblem:
    """The copy task at a length that may be traced; arrays have the size of the longest string.

    An LSTM sees ``length`` random bits, then a delimiter, while it must repeat them. The step loss
    is the cross-entropy of the bit in nats, and 0 while bits are shown. The length of an episode
    does not change.
    """
    graph = _graph(settings.hidden)

    def init(key, theta):
        bits = jax.random.randint(key, (settings.longest, settings.batch_size), 0, 2)
        return bits, length, zero_carry(theta, settings.batch_size, settings.hidden)

    def step(key, theta, state, t):
        bits, length, carry = state
        carry, losses = _read(graph, theta, bits, length, carry, t)
        return (bits, length, carry), losses.mean()

    return ug.UnrolledProblem(init, step, lambda key: 2 * length)


def _read(graph: Any, theta: Theta, bits: Any, length: Any, carry: Any, t: Any) -> tuple[Any, Any]:
    """Makes one step of the LSTM; also returns each string's loss."""
    delimiter = 2
    carry, logits = nnx.merge(graph, theta)(carry, jnp.where(t < length, bits[t], delimiter))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, bits[t - length])
    return carry, jnp.where((t >= length) & (t < 2 * length), losses, 0.0)


def _model(hidden: int, seed: Any) -> LSTM:
    return LSTM(3, 4, hidden, 2, rngs=nnx.Rngs(seed))


@functools.lru_cache(maxsize=8)
def _graph(hidden: int) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: _model(hidden, 0)))


def cross_entropy(settings: Settings, key: Key, theta: Theta, length: jax.Array) -> jax.Array:
    """The cross-entropy of each symbol that must be repeated, in nats, on fresh strings."""
    graph = _graph(settings.hidden)
    bits = jax.random.randint(key, (settings.longest, TESTED), 0, 2)

    def step(t, carry):
        memory, total = carry
        memory, losses = _read(graph, theta, bits, length, memory, t)
        return memory, total + losses.mean()

    start = zero_carry(theta, TESTED, settings.hidden), jnp.zeros(())
    return jax.lax.fori_loop(0, 2 * length, step, start)[1] / length


def _estimator(settings: Settings, name: str, problem: ug.UnrolledProblem) -> GradientEstimator:
    pairs = settings.num_pairs
    if name == "tbptt":
        return ug.average(ug.tbptt(problem, truncation=settings.short), 2 * pairs)
    truncation = settings.short if name == "truncated_es" else settings.truncation
    return ug.REGISTRY[name].build(
        problem, truncation=truncation, sigma=settings.sigma, num_pairs=pairs
    )


def _cost(settings: Settings, name: str) -> int:
    """The number of inner steps of one update."""
    if name == "tbptt":
        return 2 * settings.num_pairs * settings.short
    truncation = settings.short if name == "truncated_es" else settings.truncation
    return ug.REGISTRY[name].passes(settings.num_pairs) * truncation


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(settings: Settings, name: str, rate: Any, key: Key) -> Growing:
    """The initial state: fresh weights, and strings of one symbol."""
    theta = nnx.to_pure_dict(nnx.state(_model(settings.hidden, key), nnx.Param))
    length = jnp.ones((), jnp.int32)
    estimator = _estimator(settings, name, growing_problem(settings, length))
    state, opt_state = estimator.init(key, theta), optax.adam(rate).init(theta)
    average, zero = jnp.log(jnp.float32(2)), jnp.zeros((), jnp.int32)
    return Growing(theta, state, opt_state, length, average, zero, zero)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(settings: Settings, name: str, checks: int, rate: Any, key: Key, run: Growing) -> Growing:
    """Makes, ``checks`` times, as many updates as ``steps_per_check`` pays for, and a check.

    The length is an argument of the compiled program: strings grow without compiling again.
    """
    updates = max(1, settings.steps_per_check // _cost(settings, name))

    def between(run, _):
        estimator = _estimator(settings, name, growing_problem(settings, run.length))

        def update(carry, i):
            theta, state, opt_state, steps = carry
            estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
            change, opt_state = optax.adam(rate).update(estimate.grad, opt_state, theta)
            theta = optax.apply_updates(theta, change)
            return (theta, state, opt_state, steps + estimate.info.inner_steps), None

        carry = run.theta, run.state, run.opt_state, run.inner_steps
        numbers = 2 * (run.checks * updates + jnp.arange(updates))
        (theta, state, opt_state, steps), _ = jax.lax.scan(update, carry, numbers)
        check_key = jax.random.fold_in(key, 2 * run.checks + 1)
        found = cross_entropy(settings, check_key, theta, run.length)
        average = (run.average + found) / 2
        grows = (average < ENOUGH) & (run.length < settings.longest)
        average = jnp.where(grows, jnp.log(2.0), average)
        length, done = run.length + grows, run.checks + 1
        return Growing(theta, state, opt_state, length, average, steps, done), None

    return jax.lax.scan(between, run, length=checks)[0]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the length against inner steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    curves.plot(axis, records, "length", x="inner_steps")
    axis.set(
        ylabel="symbols attempted (one more than mastered)",
        title=f"copy task, LSTM of {config['hidden']} units; truncated windows of "
        f"{config['short']} steps",
    )
    axis.legend(title=curves.seeds_of(records))
    return figure


def show(records: list[Record]) -> None:
    """Prints the last length of every run."""
    curves.show_last(records, "length", "symbols attempted at the end")


def claims(summary: Summary) -> list[Claim]:
    """ES-Single repeats longer strings than the truncated estimators and than PES.

    The claim is made at scale paper alone, where strings can get long enough to tell.
    """
    if summary.about["config"]["scale"] != "paper":
        return []
    return [
        _longer(summary, "es_single", "truncated_es"),
        _longer(summary, "es_single", "tbptt"),
        _longer(summary, "pes", "truncated_es"),
        _longer(summary, "es_single", "pes"),
    ]


def _longer(summary: Summary, name: str, other: str) -> Claim:
    says = f"{name} reaches longer strings than {other} at equal inner steps"
    source = "Vicol et al. 2023, copy task"
    longer = curves.Comparison("length", name, ">", other, says, source, "length ")
    return curves.compare(summary, longer)


EXPERIMENT = Experiment(
    name="copy_task",
    about="An LSTM repeats strings that grow as it learns: how long with each estimator.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With room for strings of 20 symbols and ten seeds, truncated ES or TBPTT masters "
        "longer strings than ES-Single at equal inner steps (p < 0.05)."
    ),
)
