"""``python -m experiments variance``: gradient estimators side by side at equal inner steps."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import unrollgrad as ug
from experiments import results
from experiments.problems import PROBLEMS
from experiments.progress import bars
from unrollgrad.diagnostics.report import write_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare, and how long."""

    problem: Literal[tuple(PROBLEMS)] = "digits"  # type: ignore[valid-type]
    """What is unrolled. digits: theta is the learning-rate and momentum schedule of an MLP."""
    estimators: tuple[Literal[tuple(ug.REGISTRY)], ...] = tuple(ug.REGISTRY)  # type: ignore[valid-type]
    """Which estimators, in which order."""
    num_workers: int = 12
    """Workers of one antithetic pair each; the others get as many as cost the same. Rounded up so
    that they can (to a multiple of 3 with truncated_es)."""
    num_samples: int = 48
    """Independent samples per estimator."""
    sigma: float | None = None
    """Standard deviation of the perturbation, in theta's units. Default: the problem's."""
    truncation: int | None = None
    """Inner steps per window (K). Default: the problem's."""
    noise_period: int | None = None
    """Inner steps between the draws of gpes. Default: two windows."""
    horizon: int | None = None
    """Inner steps per episode (T). Default: the problem's."""
    reference: Literal["bptt", "full_es"] | None = None
    """Whose mean counts as the truth: bptt, the gradient of J itself, or full_es, that of the
    smoothed J. Default: the problem's (full_es where backpropagation explodes)."""
    seed: int = 0
    """Of everything."""
    out: Path = Path("results")
    """Results go to a new folder in here."""


def run(settings: Settings) -> tuple[ug.diagnostics.Comparison, dict[str, Any]]:
    """Compares the estimators at equal inner steps.

    Returns:
        The comparison, and the settings with the problem's defaults filled in.
    """
    choice = PROBLEMS[settings.problem]
    horizon = choice.horizon if settings.horizon is None else settings.horizon
    truncation = choice.truncation if settings.truncation is None else settings.truncation
    common = {
        "truncation": truncation,
        "sigma": choice.sigma if settings.sigma is None else settings.sigma,
        "noise_period": 2 * truncation if settings.noise_period is None else settings.noise_period,
    }
    problem, theta, *_ = choice.make(horizon)
    reference = choice.reference if settings.reference is None else settings.reference

    passes = {name: ug.REGISTRY[name].passes(1) for name in [*settings.estimators, reference]}
    equal = math.lcm(*passes.values())
    episodes = -(-2 * settings.num_workers // equal) * equal

    def workers(name):
        return ug.average(ug.REGISTRY[name].build(problem, **common), episodes // passes[name])

    estimators = {name: workers(name) for name in settings.estimators}
    with bars(total=len(estimators) + 1) as report:
        comparison = ug.diagnostics.compare(
            problem,
            theta,
            estimators,
            reference=estimators.get(reference) or workers(reference),
            num_samples=settings.num_samples,
            key=jax.random.key(settings.seed),
            batch_size=1,  # the workers are batch enough, and one sample compiles fastest
            progress=report,
        )
    used = {"horizon": horizon, "num_workers": episodes // 2, "reference": reference, **common}
    return comparison, {**dataclasses.asdict(settings), **used}


def main(settings: Annotated[Settings, tyro.conf.arg(name="")]) -> Path:
    """Compare gradient estimators on one problem: bias, variance and cost at equal inner steps.

    Every row of the table spends the same number of inner steps per sample, 2 x num-workers
    episodes; a sample is one episode of every worker, averaged. The reference is the mean of other
    samples of bptt, the exact gradient of each episode's loss: what evolution strategies add by
    smoothing, O(sigma^2), counts as bias. Prints the table; writes it with a picture to a new
    folder.
    """
    begun = time.perf_counter()
    folder = results.new_folder(settings.out, f"variance-{settings.problem}")
    try:
        comparison, config = run(settings)
    except BaseException:
        folder.rmdir()  # nothing is in it yet
        raise
    comparison.table()
    comparison.save(folder)
    write_json(folder / "config.json", {**config, "out": str(settings.out)})
    print(f"{time.perf_counter() - begun:.0f} s; table and picture are in {folder}")
    return folder
