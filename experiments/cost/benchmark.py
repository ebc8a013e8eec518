"""``benchmark``: time and memory of every estimator over its bare unrolls, on this machine."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments._framework.experiment import Experiment, Progress, Write
from experiments._framework.settings import CommonSettings
from experiments.cost import floors, hypergradient_cost, peers, timing
from experiments.cost.benchmark_figure import claims, draw, show
from experiments.cost.workloads import NAMES, Workload, leaky_sum, workloads
from unrollgrad.estimators import REGISTRY

USUAL = tuple(n for n in REGISTRY if n not in ("forward_mode", "pes_analytic_replacement"))


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Time, memory and compile time of estimators, compared with a floor: the bare unrolls.

    The floor is one jitted vmap and scan of the same particles and inner steps (including a pass
    with theta itself), with given perturbed thetas; for bptt and tbptt it is the bare
    value_and_grad of the same windows. Estimator and floor run whole episodes in turn; medians and
    quartiles of the ratios are reported, and so are episodes that run out of memory. Memory counts
    a worker's state twice, as argument and as result, where fit overwrites it. "tiny" is influence
    balancing, "medium" the schedule of a 784-100-10 MLP at batch 100, "learned optimizer" all
    weights of a small optimizer, "meta-training" all weights of a larger one on new tasks in every
    episode, "large" the schedule of a transformer; "K=1" marks windows of one step. Then sweeps
    follow: workers, devices, truncation and horizon (compile time), theta's size (memory), and
    implicit hypergradients over bare Hessian products, with jaxopt's where it is installed. With
    --peers whole outer loops run beside a hand-written one and, where it is installed, evosax's.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings, and the size of "large"."""
    workloads: tuple[Literal[NAMES], ...] = NAMES  # type: ignore[valid-type]
    """The inner loops to unroll."""
    estimators: tuple[Literal[tuple(REGISTRY)], ...] = USUAL  # type: ignore[valid-type]
    """Estimators by name. Default: all but forward_mode, whose cost grows with dim(theta), and
    pes_analytic_replacement, whose program is the same as pes_analytic's."""
    particles: int | None = None
    """Trajectories side by side, counting both signs of all pairs. Default: the workload's; at
    --scale paper 4096 for all but "large"."""
    num_pairs: int = 1
    """Antithetic pairs per worker."""
    workers: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of workers with one pair, on "learned optimizer". Each sweep may be empty."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices for 512 workers on "tiny"; CPU devices are created as needed."""
    truncations: tuple[int, ...] = (10, 100, 1000)
    """Truncations on "tiny"; the horizons of the sweep are ten times as long."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Sizes of theta and of the state, for a step of negligible cost."""
    terms: tuple[int, ...] = (10, 40)
    """Products with the Hessian per implicit hypergradient."""
    peers: bool = False
    """Compare outer loops of persistent evolution strategies on two tiny problems: by hand, by
    evosax, by `fit`, and by an update a call."""
    num_repeats: int = 11
    """Runs of each program."""
    num_compilations: int = 3
    """Compilations of each program, after a first one that is not counted."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        workloads=("medium",),
        estimators=("es_single", "tbptt"),
        particles=4,
        workers=(1, 8),
        truncations=(2,),
        sizes=(10, 100),
        terms=(2,),
        num_repeats=1,
        num_compilations=1,
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", workers=(8, 64, 512, 4096)),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes seconds and ratio of every repeat, and their medians."""
    parts = {
        "estimators": _estimators,
        "workers": _workers,
        "devices": _devices,
        "truncation": _truncations,
        "horizon": _horizons,
        "size": _sizes,
        "products": _products,
        "peers": _peers,
    }
    for i, (part, cells) in enumerate(parts.items()):
        for labels, measure in cells(settings, jax.random.key(seed)):
            labels = {"part": part, **labels}
            text = " ".join(map(str, labels.values()))

            def at(fraction: float, text: str = text, i: int = i) -> None:
                progress(text, (i + fraction) / len(parts))

            at(0.0)
            for numbers in measure(at):
                write({**labels, **numbers})


Labels = dict[str, str | int]
Numbers = dict[str, Any]
Cell = tuple[Labels, Callable[[Callable[[float], None]], Iterator[Numbers]]]
"""The labels of one measurement, and the measurement, which takes a progress callback."""


def _estimators(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    known = workloads(settings.scale)
    for name in settings.workloads:
        workload = known[name]
        particles = settings.particles or workload.particles
        for estimator in settings.estimators:
            make = functools.partial(
                floors.case,
                workload,
                estimator,
                key,
                particles=particles,
                num_pairs=settings.num_pairs,
            )
            labels = {"workload": name, "estimator": estimator, "number": particles}
            yield labels, functools.partial(_beside, settings, labels, make)


def _workers(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    name = "tiny" if settings.scale == "smoke" else "learned optimizer"
    workload = workloads(settings.scale)[name]
    for estimator in ("es_single", "pes"):
        for number in settings.workers:
            make = functools.partial(floors.case, workload, estimator, key, particles=2 * number)
            labels = {"workload": name, "estimator": estimator, "number": number}
            yield labels, functools.partial(_beside, settings, labels, make)


def _devices(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    workload = workloads(settings.scale)["tiny"]
    for number in settings.devices:
        make = functools.partial(
            floors.case, workload, "es_single", key, particles=1024, devices=number
        )
        labels = {"workload": "tiny", "estimator": "es_single", "number": number}
        yield labels, functools.partial(_beside, settings, labels, make)


def _truncations(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    tiny = workloads(settings.scale)["tiny"]
    for estimator in ("es_single", "pes", "tbptt"):
        for number in settings.truncations:
            workload = tiny._replace(truncation=number, windows=2)
            make = functools.partial(floors.case, workload, estimator, key, particles=16)
            labels = {"workload": "tiny", "estimator": estimator, "number": number}
            yield labels, functools.partial(_beside, settings, labels, make)


def _horizons(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    tiny = workloads(settings.scale)["tiny"]
    for number in settings.truncations:
        workload = tiny._replace(windows=10 * number // tiny.truncation)
        make = functools.partial(floors.case, workload, "pes", key, particles=16)
        labels = {"workload": "tiny", "estimator": "pes", "number": 10 * number}
        yield labels, functools.partial(_beside, settings, labels, make)


def _sizes(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    for estimator in ("es_single", "pes"):
        for number in settings.sizes:
            measure = functools.partial(_memory, settings, estimator, key, number)
            yield {"workload": "leaky sum", "estimator": estimator, "number": number}, measure


def _products(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    width = 4 if settings.scale == "smoke" else 512
    problem = hypergradient_cost.problem(key, width, width // 2, 100)
    for number in settings.terms:
        kinds = hypergradient_cost.kinds(problem, number)
        for name in (kind for kind in kinds if kind != "floor"):
            programs: dict[str, Callable[[], object]] = {
                kind: functools.partial(jax.jit(kinds[kind]), problem.params, problem.theta)
                for kind in (name, "floor")
            }
            labels = {"workload": "implicit", "estimator": name, "number": number}
            yield labels, functools.partial(_ratios, programs, settings.num_repeats)


def _peers(settings: Settings, key: jax.Array) -> Iterator[Cell]:
    num_steps = 100 if settings.scale == "smoke" else 2000
    for name, task in peers.TASKS.items() if settings.peers else ():
        labels = {"workload": name, "estimator": "pes", "number": task.num_pairs}
        yield labels, functools.partial(_outer_loops, task, num_steps, settings.num_repeats)


def _outer_loops(
    task: peers.Task, num_steps: int, num_repeats: int, progress: Callable[[float], None]
) -> Iterator[Numbers]:
    """Measures all outer loops in turn; the yardstick is the one written by hand."""
    found: dict[str, list[float]] = {}
    for _, seconds in timing.in_turn(peers.programs(task, num_steps), num_repeats, progress):
        for name, value in seconds.items():
            found.setdefault(name, []).append(value / num_steps)
    floor = np.array(found["by hand"])
    for name, values in found.items():
        yield {
            "estimator": name,
            "microseconds_per_update": 1e6 * float(np.median(values)),
            "median_ratio": float(np.median(np.array(values) / floor)),
        }


_COMPILED: dict[tuple[object, ...], dict[str, timing.Compiled]] = {}


def _beside(
    settings: Settings,
    labels: Labels,
    make: functools.partial[floors.Case],
    progress: Callable[[float], None],
) -> Iterator[Numbers]:
    """Measures an episode of the estimator and of its floor in turn, or reports out of memory."""
    try:
        yield from _episodes(settings, labels, make, progress)
    except jax.errors.JaxRuntimeError as error:
        if not _out_of_memory(error):
            raise
        yield {"out_of_memory": 1.0, "floor_fits": float(_fits(make))}


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return "resource_exhausted" in text and ("memory" in text or "allocat" in text)


def _fits(make: functools.partial[floors.Case]) -> bool:
    """Whether the floor alone fits into memory."""
    case = make()
    try:
        jax.block_until_ready(timing.compiled(case.floor, *case.floor_args).call(*case.floor_args))
    except jax.errors.JaxRuntimeError as error:
        if not _out_of_memory(error):
            raise
        return False
    return True


def _episodes(
    settings: Settings,
    labels: Labels,
    make: functools.partial[floors.Case],
    progress: Callable[[float], None],
) -> Iterator[Numbers]:
    case = make()
    workload: Workload = make.args[0]
    what = *labels.values(), workload.truncation, workload.windows
    name = settings.scale, settings.num_compilations, *what, *sorted(make.keywords.items())
    if name not in _COMPILED:  # programs are shared by all seeds, which only enter the arguments
        _COMPILED[name] = timing.compiled_in_turn(
            {"estimator": (case.episode, case.args), "floor": (case.floor, case.floor_args)},
            settings.num_compilations,
        )
        for kind, program in _COMPILED[name].items():
            yield {
                f"{kind}_compile_seconds": program.seconds,
                f"{kind}_mebibytes": program.mebibytes,
            }
    programs: dict[str, Callable[[], object]] = {
        "estimator": functools.partial(_COMPILED[name]["estimator"].call, *case.args),
        "floor": functools.partial(_COMPILED[name]["floor"].call, *case.floor_args),
    }
    for numbers in _ratios(programs, settings.num_repeats, progress):
        if "median_seconds" in numbers:
            seconds = numbers["median_seconds"] / case.num_calls
            numbers["estimates_per_second"] = case.num_workers / seconds
            numbers["microseconds_per_step"] = 1e6 * seconds / case.num_steps
        yield numbers


def _ratios(
    programs: dict[str, Callable[[], object]], num_repeats: int, progress: Callable[[float], None]
) -> Iterator[Numbers]:
    """Measures the other program against the floor: every repeat, then medians and quartiles."""
    (name,) = set(programs) - {"floor"}
    times = []
    for repeat, seconds in timing.in_turn(programs, num_repeats, progress):
        times.append((seconds[name], seconds[name] / seconds["floor"]))
        yield {"step": repeat, "seconds": times[-1][0], "ratio": times[-1][1]}
    seconds, ratios = np.array(times).T
    low, median, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    yield {
        "median_ratio": median,
        "lower_ratio": low,
        "upper_ratio": high,
        "median_seconds": float(np.median(seconds)),
    }


def _memory(
    settings: Settings, name: str, key: jax.Array, size: int, progress: Callable[[float], None]
) -> Iterator[Numbers]:
    """The peak memory of one call with donated state, per pair, in copies of theta."""
    num_pairs = 16
    problem, theta = leaky_sum(20, size)
    estimator = REGISTRY[name].build(problem, truncation=10, sigma=0.1, num_pairs=num_pairs)
    state = jax.tree.map(jnp.copy, estimator.init(key, theta))  # to be donated
    args = key, theta, state
    program = timing.compiled(estimator.estimate, *args, donate=(2,))
    theta_bytes = sum(x.nbytes for x in jax.tree.leaves(theta))
    yield {"copies_per_pair": program.mebibytes * 2**20 / (theta_bytes * num_pairs)}

    carried = [state]

    def call():
        out, carried[0] = program.call(key, theta, carried[0])
        return out

    times = [s["call"] for _, s in timing.in_turn({"call": call}, settings.num_repeats, progress)]
    yield {"median_seconds": float(np.median(times))}


def _fill(settings: Settings) -> Settings:
    """Checks all numbers before anything is measured."""
    numbers = {
        "--particles": [] if settings.particles is None else [settings.particles],
        "--num-pairs": [settings.num_pairs],
        "--num-repeats": [settings.num_repeats],
        "--num-compilations": [settings.num_compilations],
        "--workers": settings.workers,
        "--devices": settings.devices,
        "--truncations": settings.truncations,
        "--sizes": settings.sizes,
        "--terms": settings.terms,
    }
    for flag, values in numbers.items():
        for value in values:
            if value < 1:
                raise ValueError(f"`{flag}` must be at least 1; got {value}.")
    for devices in settings.devices:
        if 512 % devices:
            raise ValueError(
                f"`--devices` must divide the 512 workers; got {devices}. Use a power of two."
            )
    return settings


EXPERIMENT = Experiment(
    name="benchmark",
    about="Time and memory of every estimator over its bare unrolls, on this machine.",
    settings=Settings,
    scales=SCALES,
    labels=("part", "workload", "estimator", "number"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On an idle machine of another kind, such as a TPU or eight GPUs, the median ratio of "
        "30 episodes is on the other side of its target, with quartiles that exclude it."
    ),
    fill=_fill,
)
