"""``population_speed``: a perturbed population against plain batched inference (EGGROLL)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

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
    """How much does it cost that every member of a batch has its own weights?

    An MLP computes a batch of inputs for each member of a population. "inference" gives all members
    the same weights, which is one product per layer for the whole population. "factors given" adds
    rank-one noise whose factors are drawn before, and "factors drawn" draws them, too; "dense
    given" and "dense drawn" do the same with Gaussian noise that is added to the weights. The speed
    is the time of inference over theirs in the same turn; the median of the turns is one seed's.
    """

    width: int = 512
    """Inputs, hidden units and outputs of the MLP."""
    layers: int = 3
    """Matrices of the MLP."""
    num_pairs: int = 256
    """Antithetic pairs: half the population."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Inputs of each member."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of weights and inputs."""
    num_repeats: int = 11
    """Runs of each kind with factors, in turn with inference."""
    num_dense_repeats: int = 1
    """Runs of each kind with dense noise, in turn with inference; 0: none."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        width=16,
        layers=2,
        num_pairs=4,
        batch_sizes=(1, 2),
        num_repeats=1,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        width=8192,
        layers=1,
        num_pairs=512,
        batch_sizes=(1,),
        dtype="bfloat16",
        num_repeats=51,
        num_dense_repeats=0,
    ),
}

FACTORS = ("factors given", "factors drawn")
DENSE = ("dense given", "dense drawn")

SIGMA = 0.01

SOURCE = "Sarkar et al. 2025"

Member = Callable[[Theta, jax.Array], jax.Array]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the seconds and the speed of every kind, by batch size."""
    for i, batch_size in enumerate(settings.batch_sizes):
        programs = _programs(settings.without_run(), batch_size)
        key = jax.random.fold_in(jax.random.key(seed), i)
        begun = i / len(settings.batch_sizes)
        for kinds, repeats in (
            (FACTORS, settings.num_repeats),
            (DENSE, settings.num_dense_repeats),
        ):
            progress(f"{batch_size} inputs, {kinds[0]}", begun)
            if repeats:
                found = _timed(
                    {kind: programs[kind] for kind in ("inference", *kinds)}, key, repeats
                )
                for kind, numbers in found.items():
                    if kind != "inference" or kinds == FACTORS:
                        write({"batch_size": str(batch_size), "kind": kind, **numbers})


def _timed(
    programs: Mapping[str, Callable[[Key], Callable[[], Any]]], key: Key, repeats: int
) -> dict[str, dict[str, float]]:
    """Medians over turns: the seconds of each kind, and inference's over them."""
    ready = {kind: prepare(key) for kind, prepare in programs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in ready}
    for _, seconds in timing.in_turn(ready, repeats):
        for kind, value in seconds.items():
            times[kind].append(value)
    return {
        kind: {
            "seconds": float(np.median(values)),
            "speed": float(np.median(np.divide(times["inference"], values))),
        }
        for kind, values in times.items()
    }


@functools.lru_cache(maxsize=4)
def _programs(settings: Settings, batch_size: int) -> dict[str, Callable[[Key], Callable[[], Any]]]:
    """For each kind ``prepare(key) -> run``: what is given is made by ``prepare``."""
    law, pairs = ug.noise.low_rank(), settings.num_pairs

    def factors(key, theta):
        return law.sample(key, law.init(theta), theta, pairs)

    def by_factors(theta, drawn, x):
        return _population(lambda f, scale: law.perturb(theta, f, scale), drawn, x)

    def dense(key, theta):
        gaussian = ug.noise.gaussian()
        unit = gaussian.sample(key, gaussian.init(theta), theta, pairs)
        both = jax.tree.map(lambda u: jnp.concatenate([u, -u]), unit)
        return jax.vmap(lambda e: gaussian.perturb(theta, e, SIGMA))(both)

    same, each = jax.jit(jax.vmap(_mlp, (None, 0))), jax.jit(jax.vmap(_mlp))
    given, drawn = jax.jit(by_factors), jax.jit(lambda k, t, x: by_factors(t, factors(k, t), x))
    densely = jax.jit(lambda k, t, x: jax.vmap(_mlp)(dense(k, t), x))
    prepare_factors, prepare_dense = jax.jit(factors), jax.jit(dense)
    inputs = functools.partial(_inputs, settings, batch_size)

    def inference(key):
        return functools.partial(same, *inputs(key))

    def factors_given(key):
        theta, x = inputs(key)
        return functools.partial(given, theta, prepare_factors(key, theta), x)

    def dense_given(key):
        theta, x = inputs(key)
        return functools.partial(each, prepare_dense(key, theta), x)

    return {
        "inference": inference,
        "factors given": factors_given,
        "factors drawn": lambda key: functools.partial(drawn, key, *inputs(key)),
        "dense given": dense_given,
        "dense drawn": lambda key: functools.partial(densely, key, *inputs(key)),
    }


def _population(perturb: Callable[..., Theta], drawn: Any, x: jax.Array) -> jax.Array:
    """The losses of both signs of every pair; all of them share theta's own arrays."""

    def member(scale, factors, x):
        return _mlp(perturb(factors, scale), x)

    both = jax.vmap(jax.vmap(member, (None, 0, 0)), (0, None, 0))
    scales = jnp.array([SIGMA, -SIGMA])
    return both(scales, drawn, x.reshape(2, -1, *x.shape[1:])).ravel()


def _mlp(theta: Any, x: jax.Array) -> jax.Array:
    """One member's loss; ``matmul`` takes a matrix with or without factors."""
    for layer in theta:
        x = jnp.tanh(ug.noise.matmul(x, layer["w"]) + layer["b"])
    return jnp.mean(jnp.square(x).astype(jnp.float32))


def _inputs(settings: Settings, batch_size: int, key: Key) -> tuple[Theta, jax.Array]:
    width, dtype = settings.width, settings.dtype
    first, *keys = jax.random.split(key, settings.layers + 1)
    weights = [jax.random.normal(k, (width, width), dtype) / width**0.5 for k in keys]
    theta = [{"w": w.astype(dtype), "b": jnp.zeros(width, dtype)} for w in weights]
    return theta, jax.random.normal(first, (2 * settings.num_pairs, batch_size, width), dtype)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Bars: the speed of every kind relative to inference, by batch size."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    sizes = config["batch_sizes"]
    kinds = [kind for kind in (*FACTORS, *DENSE) if any(r.labels["kind"] == kind for r in records)]
    for i, (kind, style) in enumerate(curves.styles(kinds).items()):
        for j, size in enumerate(sizes):
            values = [r.value for r in records if _is(r, kind, size, "speed")]
            if not values:
                continue
            se = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            at = j + 0.8 * (i - (len(kinds) - 1) / 2) / len(kinds)
            label = kind if j == 0 else None
            mean = float(np.mean(values))
            axis.bar(at, mean, 0.7 / len(kinds), yerr=se, color=style.color, label=label, capsize=3)
            axis.annotate(f"{mean:.2g}", (at, mean + se), ha="center", va="bottom", fontsize=8)
    axis.axhline(1.0, color="black", ls="--", lw=0.8, label="inference, all weights equal")
    axis.set(
        xticks=range(len(sizes)),
        xticklabels=[f"{size} input{'s' if size > 1 else ''} per member" for size in sizes],
        ylabel="speed over inference's",
        title=f"{config['layers']} layers of {config['width']}, population "
        f"{2 * config['num_pairs']}, {curves.seeds_of(records)}",
    )
    curves.from_zero(axis)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    return figure


def _is(record: Record, kind: str, size: int, metric: str) -> bool:
    labels = record.labels
    return (labels["kind"], labels["batch_size"], record.metric) == (kind, str(size), metric)


def show(records: list[Record]) -> None:
    """Prints the seconds and the speeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in records:
        line = found.setdefault((r.labels["batch_size"], r.labels["kind"]), {})
        line.setdefault(r.metric, []).append(r.value)
    for (size, kind), line in found.items():
        milliseconds = 1e3 * np.mean(line["seconds"])
        print(f"{size:>3} inputs  {kind:>13}: {milliseconds:9.2f} ms, {np.mean(line['speed']):.3g}")


def claims(summary: Summary) -> list[Claim]:
    """Rank-one noise costs a tenth of inference, or a quarter with its draws; dense noise more."""
    sizes = summary.about["config"]["batch_sizes"]
    out = []
    for kind, bound, theirs in (("factors given", 0.9, "0.91"), ("factors drawn", 0.75, "0.69")):
        found = [summary.find("speed", batch_size=str(n), kind=kind) for n in sizes]
        tests = [evidence.above(x, bound) for x in found]
        says = f"{kind}: at least {bound} of inference's speed ({theirs} there, on a GH200)"
        out.append(Claim(says, SOURCE, _by_size(sizes, tests), evidence.both(*tests)))
    speeds = [
        [summary.find("speed", batch_size=str(n), kind=kind) for n in sizes]
        for kind in ("dense drawn", "factors drawn")
    ]
    tests = [evidence.less(*pair, factor=0.1) for pair in zip(*speeds, strict=True)]
    says = "dense noise, drawn, has less than a tenth of the speed of factors, drawn"
    return [*out, Claim(says, SOURCE, _by_size(sizes, tests), evidence.both(*tests))]


def _by_size(sizes: list[int], tests: list[evidence.Finding]) -> str:
    return ", ".join(
        f"{test.text} with {n} input{'s' if n > 1 else ''}"
        for n, test in zip(sizes, tests, strict=True)
    )


EXPERIMENT = Experiment(
    name="population_speed",
    about="Inference of a population with rank-one noise against inference with equal weights.",
    settings=Settings,
    scales=SCALES,
    labels=("batch_size", "kind"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a GPU, with a linear layer of 8192 in bfloat16 and a population of 1024, the speed "
        "with factors drawn is below 0.69 of inference's in five seeds (p < 0.05)."
    ),
)
