"""``reward_memory``: memory and time of reward gradients through fifty denoising steps."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from unrollgrad import samplers
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Temporary memory and time of a reward gradient by `bptt(last=K, remat=...)`.

    The denoiser is an MLP on a batch of latents. Memory is the temporaries that XLA plans; time is
    the median of runs in turn. A step's activations are the outputs of all layers for the batch.
    `by hand` is a bare `lax.scan` of the same steps, checkpointed as `remat="step"` does: what it
    takes less is what `samplers.ddim` and `bptt` cost.
    """

    horizon: int = 50
    """Denoising steps (T)."""
    last: tuple[int, ...] = (1, 10, 50)
    """Differentiated last steps (K)."""
    batch_size: int = 256
    """Latents."""
    width: int = 64
    """Numbers in a latent, and units in each layer."""
    layers: int = 6
    """Layers of the denoiser."""
    num_repeats: int = 15
    """Runs of each kind, after one that does not count."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke", horizon=8, last=(1, 4, 8), batch_size=64, width=32, layers=4, num_repeats=1
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", batch_size=1024, width=1024, layers=12),
}


BARE = "by hand"


def sampler(settings: Settings, eta: float) -> tuple[ug.UnrolledProblem, Theta]:
    """A sampler of a batch of latents, and the weights of its denoiser."""
    schedule, width = samplers.vp(), settings.width

    def denoiser(theta, x, t):
        for w in theta:
            x = jnp.tanh(x @ w + t)
        return x

    problem = samplers.ddim(
        denoiser,
        schedule,
        num_steps=settings.horizon,
        reward=lambda x: -jnp.mean((x - 1) ** 2),
        sample_shape=(settings.batch_size, width),
        eta=eta,
    )
    keys = jax.random.split(jax.random.key(0), settings.layers)
    return problem, [jax.random.normal(key, (width, width)) / width**0.5 for key in keys]


def by_hand(settings: Settings) -> Callable[[Key, Theta], tuple[jax.Array, Theta]]:
    """The loss and its gradient as one writes DDIM without the library, for the same latents."""
    schedule, num_steps = samplers.vp(), settings.horizon

    def loss(theta, key):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(x, k):
            (alpha, sigma), (alpha_next, sigma_next) = (
                schedule(k / num_steps),
                schedule((k - 1) / num_steps),
            )
            noise = x
            for w in theta:
                noise = jnp.tanh(noise @ w + k / num_steps)
            return alpha_next * (x - sigma * noise) / alpha + sigma_next * noise, None

        # The first latent is the one that a call of an estimator with this key begins with.
        for_x, _ = jax.random.split(jax.random.fold_in(key, 0))
        alpha, sigma = schedule(1.0)
        x = jax.random.normal(for_x, (settings.batch_size, settings.width))
        x = jnp.sqrt(alpha**2 + sigma**2) * x
        x, _ = jax.lax.scan(step, x, jnp.arange(num_steps, 0.0, -1.0))
        return jnp.mean((x - 1) ** 2)

    return lambda key, theta: jax.value_and_grad(loss)(theta, key)


def estimators(settings: Settings, last: int) -> dict[str, GradientEstimator]:
    """The kinds of backpropagation by name; adjoint matching goes through all steps."""
    problem, theta = sampler(settings, eta=0.0)
    out = {
        "none": ug.bptt(problem, last=last),
        "step": ug.bptt(problem, last=last, remat="step"),
        "log": ug.bptt(problem, last=last, remat="log"),
        "reverse": ug.bptt(problem, last=last, remat="reverse", inverse=samplers.inverse(problem)),
    }
    if last == 1:
        del out["log"]  # there is nothing to halve
    if last == settings.horizon:
        noisy, _ = sampler(settings, eta=1.0)
        out["adjoint matching"] = samplers.adjoint_matching(noisy, theta, 1.0)
    return out


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes MiB, seconds and the error of every kind, for every number of last steps."""
    key = jax.random.key(seed)
    _, theta = sampler(settings, eta=0.0)
    latent = 4 * settings.batch_size * settings.width
    programs: dict[tuple[str, int], Callable[[], Any]] = {}
    for i, last in enumerate(settings.last):
        exact = None
        kinds: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            name: (estimator.estimate, (key, theta, estimator.init(key, theta)))
            for name, estimator in estimators(settings, last).items()
        }
        if last == settings.horizon:
            kinds[BARE] = by_hand(settings), (key, theta)
        for name, (function, args) in kinds.items():
            progress(f"compiling {name}, {last}", 0.5 * i / len(settings.last))
            compiled = timing.compiled(function, *args)
            programs[name, last] = functools.partial(compiled.call, *args)
            first, second = programs[name, last]()
            grad = second if name == BARE else first.grad
            grad = jnp.concatenate([x.ravel() for x in grad])
            exact = grad if exact is None else exact
            numbers = {
                "mebibytes": compiled.temporaries / 2**20,
                "bound": (last * latent + 2 * settings.layers * latent) / 2**20,
            }
            if name != "adjoint matching":  # it estimates something else
                error = jnp.linalg.norm(grad - exact) / jnp.linalg.norm(exact)
                numbers["error"] = float(error)
            write({"remat": name, "last": str(last), **numbers})
    times: dict[tuple[str, int], list[float]] = {which: [] for which in programs}
    turns = timing.in_turn(
        programs, settings.num_repeats, lambda f: progress("running", 0.5 + 0.5 * f)
    )
    bare, whole, ratios = (BARE, settings.horizon), ("step", settings.horizon), []
    for turn, seconds in turns:
        for which, value in seconds.items():
            times[which].append(value)
        ratios.append(seconds[whole] / seconds[bare])
        write({"remat": BARE, "last": str(settings.horizon), "step": turn, "ratio": ratios[-1]})
    for (name, last), values in times.items():
        write({"remat": name, "last": str(last), "seconds": float(np.median(values))})
    median = float(np.median(ratios))
    write({"remat": BARE, "last": str(settings.horizon), "median_ratio": median})


def _table(records: list[Record], metric: str) -> dict[str, dict[int, float]]:
    """The mean over seeds, by kind and number of last steps."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric:
            kind = found.setdefault(r.labels["remat"], {})
            kind.setdefault(int(r.labels["last"]), []).append(r.value)
    return {k: {n: float(np.mean(x)) for n, x in row.items()} for k, row in found.items()}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Memory by the number of last steps, and memory by time for all of them."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, seconds = _table(records, "mebibytes"), _table(records, "seconds")
    for i, (name, row) in enumerate(sizes.items()):
        left.loglog(list(row), list(row.values()), "os^vDP"[i % 6] + "-", label=name)
    bound = dict(sorted(_table(records, "bound").get("step", {}).items()))
    label = "K latents and two steps' activations"
    left.loglog(list(bound), list(bound.values()), ":", color="black", label=label)
    left.set_xticks(list(bound), [str(last) for last in bound], minor=False)
    left.minorticks_off()
    left.set(xlabel="differentiated last steps K", ylabel="MiB of temporaries")
    left.set_title(f"{config['horizon']} denoising steps")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    noted = set()  # one number for markers of the same height
    for i, (name, row) in enumerate(sizes.items()):
        if name in seconds:
            at = [1e3 * seconds[name][last] for last in row]
            right.semilogy(at, list(row.values()), "os^vDP"[i % 6], label=name)
            for place, (last, size) in zip(at, row.items(), strict=True):
                note = {"textcoords": "offset points", "xytext": (5, 3), "fontsize": 8}
                if (last, round(size, 2)) not in noted:
                    right.annotate(str(last), (place, size), **note)
                noted.add((last, round(size, 2)))
    right.set(xlabel="milliseconds", ylabel="MiB of temporaries", title="numbers: K")
    right.margins(x=0.12)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def show(records: list[Record]) -> None:
    """Prints memory, time and error for every kind and number of last steps."""
    sizes, seconds, errors, bounds = (
        _table(records, metric) for metric in ("mebibytes", "seconds", "error", "bound")
    )
    for name, row in sizes.items():
        for last, size in row.items():
            error = errors.get(name, {}).get(last)
            print(
                f"remat {name:>16}, last {last:>3}: {size:7.2f} MiB "
                f"({size / bounds[name][last]:.2f} of K latents and two steps' activations), "
                f"{1e3 * seconds[name][last]:7.1f} ms"
                + ("" if error is None else f", error {error:.1e}")
            )
    ratios = [r.value for r in records if r.metric == "ratio"]
    if ratios:
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(
            f'remat "step" takes {median:.3f} times as long as the loop by hand, as the median of '
            f"{len(ratios)} turns (quartiles {low:.3f} to {high:.3f})"
        )


def claims(summary: Summary) -> list[Claim]:
    """Memory of remat="step" and "reverse", which XLA plans; time over that of a bare loop."""
    rows = {
        metric: {
            (r["remat"], int(r["last"])): r["mean"]
            for r in summary.results
            if r["metric"] == metric
        }
        for metric in ("mebibytes", "bound")
    }
    sizes, bounds = rows["mebibytes"], rows["bound"]
    lasts = sorted({last for _, last in sizes})
    out = []
    for last in lasts:
        size, bound = (found.get(("step", last), np.nan) for found in (sizes, bounds))
        out.append(
            Claim(
                f'remat="step", last={last}: at most {last} latents and two steps\' activations',
                "our target",
                f"{evidence.shown(size)} against {evidence.shown(bound)} MiB",
                evidence.told(size <= bound, size, bound),
            )
        )
    # One step is a program without a loop, so that it says nothing about a loop's length.
    loops = [last for last in lasts if last > 1]
    few, many = (sizes.get(("reverse", last), np.nan) for last in (loops[0], loops[-1]))
    out.append(
        Claim(
            f'the memory of remat="reverse" is the same for {loops[0]} and {loops[-1]} steps, '
            "within 10 %",
            "Pan et al. 2024: memory independent of the number of steps",
            f"{evidence.shown(few)} and {evidence.shown(many)} MiB",
            evidence.told(abs(many / few - 1) <= 0.1, few, many),
        )
    )
    none, step = (sizes.get((name, lasts[-1]), np.nan) for name in ("none", "step"))
    out.append(
        Claim(
            f'through all {lasts[-1]} steps remat="step" takes less than half of the memory',
            "our target",
            f"{evidence.shown(step)} against {evidence.shown(none)} MiB",
            evidence.told(step < none / 2, step, none),
        )
    )
    ratio = summary.find("median_ratio", remat=BARE, last=str(lasts[-1]))
    if ratio is not None:
        out.append(
            Claim(
                "the gradient through samplers.ddim takes at most 1.03 times as long as the loop "
                "by hand",
                "our target",
                f"{evidence.shown(ratio['mean'], '.3f')} times",
                evidence.told(ratio["mean"] <= 1.03, ratio["mean"]),
            )
        )
    return out


EXPERIMENT = Experiment(
    name="reward_memory",
    about="Memory and time of reward gradients through fifty denoising steps.",
    settings=Settings,
    scales=SCALES,
    labels=("remat", "last"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        'With a U-Net or transformer on a GPU, `"step"` with last=K plans more than K latents and '
        'two steps\' activations, or the memory of `"reverse"` grows with the steps.'
    ),
)
