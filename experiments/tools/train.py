"""``train``: the outer loop on any problem with any estimator, in long runs that can be resumed."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, resuming
from experiments._framework.experiment import Claim, Experiment
from experiments._framework.results import Record, Summary, read_json
from experiments._framework.settings import ResumableSettings
from experiments.problems import PROBLEMS, with_defaults
from unrollgrad.running import need, positive_int


@dataclasses.dataclass(frozen=True)
class Settings(ResumableSettings):
    """Train theta of one problem by Adam on one estimator's gradient.

    The objective, the mean loss per inner step, is measured between dispatches, always in the same
    episodes. Ctrl-C and SIGTERM save before the run ends. `--resume FOLDER` continues it in the
    same folder, also after a kill, and with more `--num-steps` or `--seeds`. Theta is left in
    `theta-SEED.npz`; `ug.FitResult.load(path, like=theta).theta` reads it.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. smoke: seconds. cpu: a minute or less for most
    problems. paper: long, with many workers, for an accelerator."""
    problem: Literal[tuple(PROBLEMS)] = "digits"  # type: ignore[valid-type]
    """What is unrolled. digits: theta is the learning-rate and momentum schedule of an MLP."""
    estimator: Literal[tuple(ug.REGISTRY)] = "pes"  # type: ignore[valid-type]
    """The gradient estimator."""
    num_steps: int = 500
    """Outer updates, including those before a --resume."""
    learning_rate: float | None = None
    """Adam's learning rate. Default: half of the problem's own, which suits exact gradients."""
    num_workers: int = 16
    """Workers of one antithetic pair each; rounded up to a multiple of the devices."""
    stagger: Literal["lockstep", "breakstep", "burn_in"] = "lockstep"
    """Where in their episodes the workers begin. lockstep: at the start; the others: spread out."""
    sigma: float | None = None
    """Standard deviation of the perturbation, in theta's units. Default: the problem's."""
    truncation: int | None = None
    """Inner steps per window (K). Default: the problem's."""
    noise_period: int | None = None
    """Inner steps between two draws of gpes's noise. Default: two windows."""
    horizon: int | None = None
    """Inner steps per episode (T). Default: the problem's."""
    num_episodes: int = 32
    """Episodes whose mean loss is the objective."""
    steps_per_dispatch: int = 25
    """Updates in one dispatch (a call of a compiled program); curves have a point after each."""
    checkpoint_every: int | None = None
    """Updates between checkpoints. Default: ten dispatches."""
    devices: int | None = None
    """Number of devices that share the workers, in all processes together. Default: all devices. A
    CPU is one device unless you ask for more."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole run."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        horizon=8,
        truncation=4,
        num_workers=2,
        num_steps=4,
        num_episodes=2,
        steps_per_dispatch=2,
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        num_steps=10_000,
        num_workers=512,
        num_episodes=256,
        steps_per_dispatch=100,
        seeds=(0, 1, 2),
    ),
}

MAY_CHANGE = ("scale", "num_steps", "devices", "seeds", "out", "resume")
"""Settings that may differ in a resumed run."""

SHOWN = 16
"""Largest number of entries of theta with which each entry is recorded."""


def filled(settings: Settings) -> Settings:
    """The settings with None replaced by the problem's defaults.

    Raises:
        ValueError: If a number is not positive, or the settings do not fit the run to resume; the
            message lists the differences.
    """
    for name in ("num_steps", "num_workers", "num_episodes", "steps_per_dispatch"):
        positive_int(f"--{name.replace('_', '-')}", getattr(settings, name))
    if settings.checkpoint_every is not None:
        positive_int("--checkpoint-every", settings.checkpoint_every)
    filled: Any = with_defaults(
        settings, learning_rate=PROBLEMS[settings.problem].learning_rate / 2
    )
    if settings.resume is None:
        workers = -(-filled.num_workers // filled.devices) * filled.devices
        return dataclasses.replace(filled, num_workers=workers)
    before = read_json(settings.resume / "config.json")
    resuming.check_same(filled, before, MAY_CHANGE, "num_steps")
    if settings.devices is None:
        most = next(d for d in range(filled.devices, 0, -1) if filled.num_workers % d == 0)
        filled = dataclasses.replace(filled, devices=most)
    elif filled.num_workers % filled.devices:
        raise ValueError(
            f"`--devices` must divide the run's {filled.num_workers} workers; got {filled.devices}."
        )
    return filled


def run(
    settings: Any,
    seed: int,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    progress: Callable[[str, float], None],
) -> None:
    """Writes the objective and the last update's numbers after every dispatch.

    Raises:
        KeyboardInterrupt: If a signal ended the run early; everything is saved by then.
    """
    workers, theta, optimizer, evaluate = _prepare(settings)
    key = jax.random.key(seed)

    def callback(step: int, theta: Any, found: dict[str, Any]) -> None:
        write({"step": step, **{k: float(x) for k, x in found.items()}})
        progress(f"objective {float(found['objective']):.4g}", step / settings.num_steps)

    write({"step": 0, **{k: float(x) for k, x in evaluate(key, theta).items()}})
    result = ug.fit(
        workers,
        theta,
        optimizer,
        num_steps=settings.num_steps,
        key=key,
        steps_per_dispatch=settings.steps_per_dispatch,
        evaluate=evaluate,
        callback=callback,
        checkpoint_dir=folder / "checkpoints" / f"seed-{seed}",
        checkpoint_every=settings.checkpoint_every,
        config=resuming.fixed(settings, MAY_CHANGE),
    )
    if jax.process_index() == 0:
        result._replace(opt_state=(), worker_state=()).save(folder / f"theta-{seed}.npz")
    if len(result.history["loss"]) < settings.num_steps:
        raise KeyboardInterrupt


@functools.lru_cache(maxsize=1)
def _prepare(settings: Any) -> tuple[Any, Any, optax.GradientTransformation, Any]:
    """Workers, theta, optimizer and evaluation, cached so that seeds share compiled programs."""
    problem, theta, *_ = PROBLEMS[settings.problem].make(settings.horizon)
    estimator = ug.REGISTRY[settings.estimator].build(
        problem,
        truncation=settings.truncation,
        sigma=settings.sigma,
        noise_period=settings.noise_period,
    )
    mesh = ug.make_worker_mesh(settings.devices) if settings.devices > 1 else None
    workers = ug.average(estimator, settings.num_workers, mesh=mesh, stagger=settings.stagger)
    keys = jax.random.split(jax.random.key(0), settings.num_episodes)

    @jax.jit
    def evaluate(key: jax.Array, theta: Any) -> dict[str, jax.Array]:
        losses = jax.vmap(lambda key: ug.episode_loss(problem, key, theta))(keys)
        return {"objective": jnp.mean(losses), **_numbers(theta)}

    return workers, theta, optax.adam(settings.learning_rate), evaluate


def _numbers(theta: Any) -> dict[str, jax.Array]:
    """Every entry of a small theta by its place; the root mean square of a large theta."""
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    size = sum(x.size for _, x in leaves)
    if size > SHOWN:
        squares = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for _, x in leaves)
        return {"theta_rms": jnp.sqrt(squares / size)}
    return {
        f"theta{jax.tree_util.keystr(path)}{list(map(int, i)) if i else ''}": x[i]
        for path, x in leaves
        for i in np.ndindex(x.shape)
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws objective, gradient norm and theta against updates: means over seeds, SEs as bands."""
    metrics = dict.fromkeys(r.metric for r in records)
    thetas = [m for m in metrics if m.startswith("theta")]
    panels = {"objective": ["objective"], "gradient norm": ["grad_norm"], "theta": thetas}
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(4.5 * len(panels), 4), layout="constrained"
    )
    for axis, (name, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for metric in shown:
            steps, mean, se = _curve(records, metric)
            label = metric.removeprefix("theta") or "theta"
            axis.plot(steps, mean, label=label if len(shown) > 1 else None)
            axis.fill_between(steps, mean - se, mean + se, alpha=0.25)
        axis.set(xlabel="outer updates", title=name)
        axis.grid(alpha=0.3)
        if len(shown) > 1:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside lower right", ncols=4)
        elif shown and shown[0] == "theta_rms":
            axis.set_title("root mean square of theta")
    figure.suptitle(
        f"{config['problem']}, {config['estimator']}, {config['num_workers']} workers: "
        + curves.seeds_of(records)
    )
    return figure


def _curve(records: list[Record], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds have, the mean over seeds and its standard error (0 for one seed)."""
    runs: dict[int, dict[int, float]] = {}
    for r in records:
        if r.metric == metric and r.step is not None:
            runs.setdefault(r.seed, {})[r.step] = r.value
    steps = sorted(set.intersection(*(set(values) for values in runs.values()))) if runs else []
    values = np.array([[values[s] for s in steps] for values in runs.values()])
    if not steps:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    mean, n = values.mean(0), len(values)
    se = values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros_like(mean)
    return np.array(steps), mean, se


def show(records: list[Record]) -> None:
    """Prints every seed's objective and theta at the start and at the end."""
    for seed in dict.fromkeys(r.seed for r in records):
        mine = [r for r in records if r.seed == seed]
        last = max(r.step or 0 for r in mine)
        for step in dict.fromkeys((0, last)):
            here = {r.metric: r.value for r in mine if r.step == step}
            thetas = [f"{v:.3g}" for m, v in here.items() if m.startswith("theta")]
            print(
                f"seed {seed}, {step:>6} updates: objective {here['objective']:.5g}, "
                f"{'theta rms' if 'theta_rms' in here else 'theta'} {' '.join(thetas)}"
            )


def claims(summary: Summary) -> list[Claim]:
    """No claims: no paper says what a user's own run should give."""
    return []


EXPERIMENT = Experiment(
    name="train",
    about="The outer loop on any problem with any estimator; --resume continues a run.",
    settings=Settings,
    scales=SCALES,
    labels=(),
    fill=filled,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "It makes no claim; a resumed run that ends elsewhere than an uninterrupted one, on "
        "the same device, would show a fault."
    ),
    title=lambda settings: f"train-{settings.problem}-{settings.estimator}",
)
