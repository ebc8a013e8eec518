"""Grid search, random search and Bayesian optimisation of hyperparameters, by optuna."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import unrollgrad as ug
from unrollgrad.running import need

EDGE = 1e-3
"""How near a value comes to the ends of its range, as a share of it."""

GRID, RANDOM, BAYES = "grid", "random search", "Bayesian optimisation"


class Range(NamedTuple):
    """Where a search looks for a hyperparameter, in its own units.

    Attributes:
        low: The lowest value.
        high: The highest value.
        log: Whether values are spread evenly in their logarithm.
        tied: The name under which a grid varies several hyperparameters together.
        grid: The grid's values; one value is kept fixed.
    """

    low: float
    high: float
    log: bool
    tied: str
    grid: tuple[float, ...]

    def at(self, share: Any) -> Any:
        """The value a share of the way from the lowest to the highest."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share

    def share(self, value: Any) -> Any:
        """The share at which a value lies, moved inside (0, 1)."""
        if self.log:
            share = jnp.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return jnp.clip(share, EDGE, 1 - EDGE)

    def constraint(self) -> ug.constraints.Constraint:
        """From any real number to a value, by a sigmoid of the share."""
        return ug.constraints.Constraint(
            f"range({self.low:g}, {self.high:g})",
            f"{self.low:g} < value < {self.high:g}",
            lambda theta: self.at(jax.nn.sigmoid(theta)),
            lambda value: jax.scipy.special.logit(self.share(value)),
        )


def search(
    kind: str,
    ranges: Mapping[str, Range],
    trial: Callable[[dict[str, float]], float],
    num_trials: int,
    seed: int,
) -> None:
    """Calls ``trial(values) -> loss`` as often as said, with values that the search chooses.

    ``BAYES`` is the tree-structured Parzen estimator, whose first trials are random; ``GRID`` ties
    hyperparameters, since a grid over each of them would need more trials than there are.
    """
    optuna = need("optuna", "optuna", "experiments")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tied = {x.tied: x for x in ranges.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        samplers = {
            GRID: lambda: optuna.samplers.GridSampler({k: x.grid for k, x in tied.items()}, seed),
            RANDOM: lambda: optuna.samplers.RandomSampler(seed),
            BAYES: lambda: optuna.samplers.TPESampler(
                multivariate=True, n_startup_trials=max(2, num_trials // 4), seed=seed
            ),
        }
        study = optuna.create_study(sampler=samplers[kind]())

    def suggested(one: Any, names: Mapping[str, Range]) -> dict[str, float]:
        return {k: one.suggest_float(k, x.low, x.high, log=x.log) for k, x in names.items()}

    def objective(one: Any) -> float:
        if kind == GRID:
            chosen = suggested(one, tied)
            values = {name: chosen[x.tied] for name, x in ranges.items()}
        else:
            values = suggested(one, ranges)
        loss = trial(values)
        return loss if math.isfinite(loss) else 1e9

    study.optimize(objective, n_trials=num_trials)
