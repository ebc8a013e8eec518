"""``learned_optimizer``: meta-trains an optimizer with each estimator, at equal inner steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, resuming
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary, read_json
from experiments._framework.settings import ResumableSettings
from experiments.learned import tasks
from experiments.learned.mixture import mean_of
from unrollgrad.learned_optimizers import ARCHITECTURES
from unrollgrad.learned_optimizers.schedules import KNOTS
from unrollgrad.running import need, positive_int
from unrollgrad.types import GradientEstimator, Key, Theta

Estimator = Literal["es_single", "pes", "truncated_es", "tbptt"]


@dataclasses.dataclass(frozen=True)
class Settings(ResumableSettings):
    """Meta-train an optimizer: which estimator reaches the lowest meta-loss in equal inner steps?

    Every episode draws a task of a family (MLPs on images, conv nets, LSTMs on text) and a length,
    log-uniform between `--shortest` and `--horizon`. The meta-loss is the training loss averaged
    over the steps; a uniform prediction has loss 1. Every `--steps-per-point` inner steps,
    meta-validation trains a fixed set of held-out tasks for `--horizon` steps. Every run writes its
    optimizer into the results' folder; ug.learned_optimizers.load loads it, and
    `evaluate_optimizer` tests it. Ctrl-C and SIGTERM save first; `--resume FOLDER` continues a
    run, also after a kill and with more `--budget` or `--seeds`.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: the published MLP and horizons, for an
    accelerator."""
    estimators: tuple[Estimator, ...] = ("es_single", "pes", "truncated_es", "tbptt")
    """Estimators, run one after another."""
    architecture: Literal[tuple(ARCHITECTURES)] = "mlp"  # type: ignore[valid-type]
    """The learned part: a schedule of SGD or Adam, or a network that updates every weight."""
    families: tuple[Literal[tuple(tasks.FAMILIES)], ...] = ("mlp",)  # type: ignore[valid-type]
    """Families of tasks; each has its own workers and the same weight."""
    horizon: int = 200
    """Inner steps of the longest episodes and of meta-validation."""
    shortest: int = 50
    """Inner steps of the shortest episodes."""
    truncation: int = 10
    """Inner steps per window (K)."""
    num_workers: int = 16
    """Workers per family, with one antithetic pair each; tbptt has twice as many."""
    stagger: Literal["lockstep", "breakstep", "burn_in"] = "burn_in"
    """Where the workers begin: all at the start of an episode, or spread over it."""
    sigma: float | None = None
    """Standard deviation of the perturbation. Default: 0.1 for schedules, 0.03 for networks (at
    --scale paper 0.01 for both)."""
    learning_rate: float | None = None
    """Adam's learning rate. Default: 0.03 for schedules, 0.01 for networks (at --scale paper
    0.0003 for both)."""
    clip: float = 1.0
    """Largest norm of the meta-gradient; larger ones are scaled down."""
    budget: int = 600_000
    """Inner steps per estimator, including the steps before a --resume."""
    steps_per_point: int = 30_000
    """Inner steps between points of a curve; theta is validated and saved at each point."""
    num_tasks: int = 16
    """Held-out tasks of each family."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("es_single", "truncated_es"),
        architecture="scheduled_adam",
        horizon=8,
        shortest=4,
        truncation=2,
        num_workers=2,
        budget=96,
        steps_per_point=48,
        num_tasks=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        families=("mlp", "conv", "lstm"),
        horizon=2000,
        shortest=100,
        truncation=50,
        num_workers=64,
        learning_rate=3e-4,
        sigma=0.01,
        budget=2_000_000_000,
        steps_per_point=20_000_000,
        num_tasks=128,
    ),
}

SMALL = {
    "decays": (0.5, 0.9, 0.99),
    "times": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "hidden": (16, 16),
    "step": 0.01,
    "magnitude": 0.1,
}
"""Settings of the networks at all scales but "paper": they run and learn faster."""

MAY_CHANGE = ("budget", "seeds", "out", "resume")
"""Settings that a resumed run may change."""

_VALIDATION = 2**20  # a seed that no run uses


def filled(settings: Settings) -> Settings:
    """The settings with the architecture's defaults in place of None.

    Raises:
        ValueError: If a number is not positive, the horizons are inconsistent, or the settings
            differ from the resumed run's; the message lists the differences.
    """
    for name in ("num_workers", "budget", "steps_per_point", "num_tasks", "truncation"):
        positive_int(f"--{name.replace('_', '-')}", getattr(settings, name))
    if not 1 <= settings.shortest <= settings.horizon:
        raise ValueError(
            f"`--shortest` must lie between 1 and --horizon={settings.horizon}; got "
            f"{settings.shortest}."
        )
    sigma, rate = (0.1, 0.03) if _is_schedule(settings) else (0.03, 0.01)
    settings = dataclasses.replace(
        settings,
        sigma=sigma if settings.sigma is None else settings.sigma,
        learning_rate=rate if settings.learning_rate is None else settings.learning_rate,
    )
    if settings.resume is not None:
        before = read_json(settings.resume / "config.json")
        resuming.check_same(settings, before, MAY_CHANGE, "budget")
    return settings


def _is_schedule(settings: Settings) -> bool:
    return settings.architecture.startswith("scheduled")


def run(settings: Any, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes meta-validation losses along each estimator's run, and saves its optimizer.

    Raises:
        KeyboardInterrupt: If a signal ended the run early, after everything was saved.
    """
    for i, name in enumerate(settings.estimators):

        def report(text: str, done: float, i: int = i) -> None:
            progress(text, (i + done) / len(settings.estimators))

        report(name, 0.0)
        _meta_train(settings, name, seed, folder, write, report)


def _meta_train(
    settings: Any, name: str, seed: int, folder: Path, write: Write, progress: Progress
) -> None:
    """Meta-trains with one estimator, from its checkpoint if there is one."""
    arguments = arguments_of(settings)
    about = {**resuming.fixed(settings, MAY_CHANGE), "arguments": arguments}
    evaluate = validation(
        settings.families,
        settings.architecture,
        tuple(arguments.items()),
        settings.horizon,
        settings.num_tasks,
    )
    key = jax.random.key(seed)
    begin = ARCHITECTURES[settings.architecture](**arguments).init(key)
    estimator, cost = workers(settings, name)
    num_steps = max(1, settings.budget // cost)
    steps_per_dispatch = max(1, settings.steps_per_point // cost)

    def written(step, found):
        kept = {k: float(x) for k, x in found.items() if k != "inner_steps"}
        write({"estimator": name, "step": step, "inner_steps": step * cost, **kept})

    def callback(step, theta, found):
        written(step, found)
        progress(f"{name}, meta-loss {float(found['meta_loss']):.4g}", step / num_steps)

    written(0, evaluate(key, begin))
    result = ug.fit(
        estimator,
        begin,
        outer_optimizer(settings.learning_rate, settings.clip),
        num_steps=num_steps,
        key=key,
        steps_per_dispatch=steps_per_dispatch,
        evaluate=evaluate,
        callback=callback,
        checkpoint_dir=folder / "checkpoints" / f"{name}-seed-{seed}",
        checkpoint_every=1,
        config=about,
    )
    if len(result.history["loss"]) < num_steps:
        raise KeyboardInterrupt
    for step in (*range(steps_per_dispatch, num_steps, steps_per_dispatch), num_steps):
        so_far = {k: result.history[k][:step] for k in ("grad_norm", "grad_variance")}
        write({"estimator": name, "step": step, "snr": signal_to_noise(so_far)})
    ug.learned_optimizers.save(
        folder / f"{settings.architecture}-{name}-seed-{seed}.npz",
        result.theta,
        architecture=settings.architecture,
        settings=arguments,
        notes=about | {"seed": seed, "estimator": name, "inner_steps": num_steps * cost},
    )


def signal_to_noise(history: Mapping[str, np.ndarray]) -> float:
    """The squared norm of an update's expected gradient over the variance, averaged over the run.

    An estimate's expected squared norm is the sum of both; the variance is that of the mean over
    workers, from their spread. Without a signal the number is 0 up to its own noise.
    """
    noise = float(np.mean(history["grad_variance"]))
    return float(np.mean(np.square(history["grad_norm"]))) / noise - 1


def arguments_of(settings: Settings) -> dict[str, Any]:
    """Arguments of the architecture. Schedules get no untrained knots beyond the horizon."""
    if _is_schedule(settings):
        before = tuple(knot for knot in KNOTS if knot < settings.horizon)
        return {"knots": (*before, settings.horizon)}
    return {} if settings.scale == "paper" else SMALL


@functools.lru_cache(maxsize=1)
def outer_optimizer(rate: float, clip: float) -> optax.GradientTransformation:
    """Adam after clipping the gradient's norm."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


class _Training(NamedTuple):
    """Settings that fix the compiled programs; ``arguments`` are the architecture's."""

    families: tuple[str, ...]
    architecture: str
    arguments: tuple[tuple[str, Any], ...]
    shortest: int
    horizon: int
    truncation: int
    num_workers: int
    stagger: Literal["lockstep", "breakstep", "burn_in"]
    sigma: float


@functools.lru_cache(maxsize=8)
def _workers(name: str, training: _Training) -> GradientEstimator:
    rule = ARCHITECTURES[training.architecture](**dict(training.arguments))
    shortest, longest = training.shortest, training.horizon

    def length(key):
        log = jnp.log(jnp.asarray((shortest, longest), jnp.float32))
        drawn = jnp.exp(jax.random.uniform(key, minval=log[0], maxval=log[1]))
        return jnp.round(drawn).astype(jnp.int32)

    horizon = longest if shortest == longest else length
    count = 2 * training.num_workers if name == "tbptt" else training.num_workers
    row = ug.REGISTRY[name]
    return mean_of(
        [
            ug.average(
                row.build(
                    tasks.problem(tasks.FAMILIES[family](), rule, horizon),
                    truncation=training.truncation,
                    sigma=training.sigma,
                ),
                count,
                stagger=training.stagger,
            )
            for family in training.families
        ]
    )


def workers(settings: Any, name: str) -> tuple[GradientEstimator, int]:
    """The estimator (cached, one for all seeds) and the inner steps of one call."""
    shared = {k: getattr(settings, k) for k in _Training._fields if k != "arguments"}
    arguments = tuple(arguments_of(settings).items())
    estimator = _workers(name, _Training(arguments=arguments, **shared))
    passes = 2 if name == "tbptt" else ug.REGISTRY[name].passes(1)
    each = passes * settings.num_workers * settings.truncation
    return estimator, each * len(settings.families)


@functools.lru_cache(maxsize=4)
def validation(
    families: tuple[str, ...],
    architecture: str,
    arguments: tuple[tuple[str, Any], ...],
    horizon: int,
    count: int,
) -> Callable[[Key, Theta], dict[str, jax.Array]]:
    """``evaluate(key, theta)`` trains a fixed set of held-out tasks for the horizon.

    ``meta_loss`` is the step loss averaged over steps, tasks and families; ``final_loss`` is the
    mean loss on all data of a task at the end.
    """
    rule = ARCHITECTURES[architecture](**dict(arguments))
    keys = jax.random.split(jax.random.key(_VALIDATION), count)
    held_out = [tasks.FAMILIES[family](part="validation") for family in families]

    def trained(family: tasks.Family, theta: Theta, key: Key) -> tuple[jax.Array, jax.Array]:
        problem = tasks.problem(family, rule, horizon)
        key_init, key_steps = jax.random.split(key)
        state = problem.init(key_init, theta)
        end, loss = tasks.train(problem, key_steps, theta, state, 0, horizon)
        return loss, family.whole(end.params, end.task)

    @jax.jit
    def evaluate(key, theta):
        found = [jax.vmap(functools.partial(trained, f, theta))(keys) for f in held_out]
        meta, final = (jnp.mean(jnp.stack(x)) for x in zip(*found, strict=True))
        return {"meta_loss": meta, "final_loss": final}

    return evaluate


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Meta-loss and final loss against inner steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4.5), layout="constrained")
    titles = {
        "meta_loss": f"mean training loss over {config['horizon']} steps",
        "final_loss": f"training loss after {config['horizon']} steps",
    }
    axes = figure.subplots(1, 2)
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        curves.plot(axis, records, metric, x="inner_steps")
        axis.set(yscale="log", title=title, ylabel="a guess has 1")
        axis.locator_params(axis="x", nbins=5)
    axes[0].legend(title=curves.seeds_of(records))
    families = ", ".join(config["families"])
    figure.suptitle(f"{config['architecture']}, meta-trained on {families}: held-out tasks")
    return figure


def show(records: list[Record]) -> None:
    """Prints the last meta-loss of every run."""
    curves.show_last(records, "meta_loss", "meta-loss at the end")


def claims(summary: Summary) -> list[Claim]:
    """Persistent estimators end below truncated ones, for all pairs that ran."""
    ran = {r["estimator"] for r in summary.results}
    source = "Vicol et al. 2021 and 2023, learned optimizers"
    out = []
    for other in ("truncated_es", "tbptt"):
        for name in ("es_single", "pes"):
            if not {name, other} <= ran:
                continue
            says = f"{name} ends at a lower meta-loss than {other} at equal inner steps"
            claim = curves.compare(
                summary, curves.Comparison("meta_loss", name, "<", other, says, source)
            )
            signals = [
                f"{evidence.number(found)} ({one})"
                for one in (name, other)
                if (found := summary.find("snr", estimator=one)) is not None
            ]
            snr = "; an update's signal to noise is " + " and ".join(signals) if signals else ""
            out.append(claim._replace(ours=claim.ours + snr))
    return out


EXPERIMENT = Experiment(
    name="learned_optimizer",
    about="Meta-trains an optimizer with each estimator; --resume continues a run.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    fill=filled,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With 512 workers and ten seeds, so that the gradient's signal exceeds its noise, the "
        "order of truncated and persistent estimators is another one at the end (p < 0.05)."
    ),
    title=lambda settings: f"learned_optimizer-{settings.architecture}",
)
