"""``replay_cost``: the time of ``replay`` over the time of the steps that it runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad.running import need
from unrollgrad.types import Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Time of `replay` and of its count of forward and backward steps at the floor's speed.

    The floor of a forward step is a bare jitted scan over steps, that of a backward step a bare
    `value_and_grad` of such a scan, whose steps are computed again in the backward pass, less the
    two forward runs in it; both run as many steps as the episode has. `replay` and both floors run
    in turn; the first turn, which compiles, does not count. The inner loop is the training of an
    MLP by Adam.
    """

    width: int = 256
    """Units of each of five layers; with 512 rows a step takes over 5 ms on two CPU cores."""
    batch_size: int = 512
    """Rows of a batch."""
    horizon: int = 256
    """Inner steps of the episode. Each call of `replay` traces its programs, which counts."""
    arities: tuple[int, ...] = (2, 4)
    """Branches of the tree of checkpoints."""
    steps_per_dispatch: int = 16
    """Inner steps in one program, of `replay` and of the floors; a power of each arity."""
    num_repeats: int = 5
    """Turns."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        width=4,
        batch_size=8,
        horizon=16,
        arities=(2,),
        steps_per_dispatch=4,
        num_repeats=1,
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", width=2048, batch_size=4096, num_repeats=15),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the seconds of the steps and of replay, and the ratio, for every turn."""
    problem, theta, key = *training(settings), jax.random.key(seed)
    forward, backward = floors(problem, key, theta, settings.steps_per_dispatch)
    calls = -(-settings.horizon // settings.steps_per_dispatch)
    programs: dict[str, Callable[[], object]] = {
        "forward": lambda: [forward() for _ in range(calls)],
        "backward": lambda: [backward() for _ in range(calls)],
    }
    forwards, ratios = {}, {arity: [] for arity in settings.arities}
    for arity in settings.arities:

        def replayed(arity: int = arity) -> ug.Estimate:
            most = settings.steps_per_dispatch
            return ug.replay(problem, key, theta, arity=arity, steps_per_dispatch=most)

        programs[str(arity)] = replayed
        forwards[arity] = int(replayed().info.inner_steps)
    for turn, seconds in timing.in_turn(programs, settings.num_repeats, lambda f: progress("", f)):
        ahead = seconds["forward"] / (calls * settings.steps_per_dispatch)
        back = seconds["backward"] / (calls * settings.steps_per_dispatch) - 2 * ahead
        for arity, steps in forwards.items():
            floor = steps * ahead + settings.horizon * back
            numbers = {
                "forward_milliseconds": 1e3 * ahead,
                "backward_milliseconds": 1e3 * back,
                "forward_steps": steps,
                "seconds": seconds[str(arity)],
                "ratio": seconds[str(arity)] / floor,
            }
            write({"arity": str(arity), "step": turn, **numbers})
            ratios[arity].append(numbers["ratio"])
    for arity, found in ratios.items():
        write({"arity": str(arity), "median_ratio": float(np.median(found))})


def training(settings: Settings) -> tuple[ug.UnrolledProblem, jax.Array]:
    """Adam trains an MLP; theta is the logarithm of its learning rate."""
    width = settings.width
    shape = settings.batch_size, width
    rows = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def loss(theta, params, batch, key):
        for w in params:
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    def init_params(key):
        return [jax.random.normal(k, (width, width)) / width**0.5 for k in jax.random.split(key, 5)]

    problem = ug.training_problem(
        loss=loss,
        init_params=init_params,
        optimizer=lambda theta, t: optax.adam(jnp.exp(theta), eps_root=1e-8),
        sample_batch=lambda key: rows,
        meta_loss="before",
        horizon=settings.horizon,
    )
    return problem, jnp.float32(-5.0)


def floors(
    problem: ug.UnrolledProblem, key: Key, theta: Theta, num_steps: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Bare programs of so many steps: forwards, and with their derivative."""
    state = problem.init(key, theta)

    def scanned(theta, state, wrap):
        def step(state, t):
            return problem.step(jax.random.fold_in(key, t), theta, state, t)

        return jax.lax.scan(wrap(step), state, jnp.arange(num_steps))

    @jax.jit
    def forward(theta, state):
        return scanned(theta, state, lambda step: step)

    @jax.jit
    def backward(theta, state):
        def mean(theta, state):
            wrap = lambda step: jax.checkpoint(step, prevent_cse=False)  # noqa: E731
            return jnp.mean(scanned(theta, state, wrap)[1])

        return jax.value_and_grad(mean, (0, 1), allow_int=True)(theta, state)

    return lambda: forward(theta, state), lambda: backward(theta, state)


def _medians(records: list[Record], metric: str) -> dict[str, float]:
    """The median over turns and seeds, by arity."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.metric == metric:
            found.setdefault(r.labels["arity"], []).append(r.value)
    return {arity: float(np.median(values)) for arity, values in found.items()}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """The ratio of every turn."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for arity, median in _medians(records, "ratio").items():
        mine = [r for r in records if r.metric == "ratio" and r.labels["arity"] == arity]
        label = f"arity {arity}: median {median:.2f}"
        axis.plot([r.step for r in mine], [r.value for r in mine], "o", label=label)
    axis.axhline(1.1, color="k", linestyle=":", label="10 % more")
    axis.set(xlabel="turn", ylabel="time of replay / time of its steps")
    curves.from_zero(axis)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints the medians."""
    names = "forward_milliseconds", "backward_milliseconds", "forward_steps", "seconds", "ratio"
    found = {metric: _medians(records, metric) for metric in names}
    for arity in found["ratio"]:
        ahead, back, steps, seconds, ratio = (found[metric][arity] for metric in names)
        print(
            f"arity {arity:>2}: {steps:.0f} steps forwards of {ahead:.1f} ms, backwards "
            f"{back:.1f} ms; {seconds:.2f} s, ratio {ratio:.2f}"
        )


def claims(summary: Summary) -> list[Claim]:
    """Replay takes at most 1.1 times as long as its steps, if they take 5 ms or more."""
    out = []
    for arity in summary.about["config"]["arities"]:
        place = {"arity": str(arity)}
        ratio = summary.find("median_ratio", **place)
        if ratio is None:
            continue
        says = f"arity {arity}: replay takes at most 1.1 times as long as its steps"
        holds = evidence.told(ratio["mean"] <= 1.1, ratio["mean"])
        out.append(Claim(says, "theory", f"ratio {evidence.number(ratio)}", holds))
    return out


EXPERIMENT = Experiment(
    name="replay_cost",
    about="The time of replay over the time of the steps that it runs.",
    settings=Settings,
    scales=SCALES,
    labels=("arity",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a GPU or an idle CPU, with steps of 5 ms or more, `replay` takes over 1.1 times as "
        "long as its count of steps at the floor's speed, as the median of 15 turns."
    ),
)
