"""Problems for experiments by name, each with settings that suit it."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import unrollgrad as ug


class Choice(NamedTuple):
    """A problem that can be chosen on the command line.

    Attributes:
        make: ``make(horizon)`` returns a problem and a theta; further outputs are ignored.
        about: One line that says what theta is and what is unrolled.
        horizon: The default horizon.
        truncation: The default truncation.
        sigma: The default sigma, in theta's units.
        reference: The estimator whose mean is the default true gradient: bptt, or full_es (the
            gradient of the episode-smoothed J) if backpropagation explodes.
        learning_rate: Adam's learning rate for training theta with exact gradients.
        num_workers: The default number of workers of ``variance``: more where a step is cheap.
    """

    make: Callable[[int], Any]
    about: str
    horizon: int
    truncation: int
    sigma: float
    reference: str = "bptt"
    learning_rate: float = 0.05
    num_workers: int = 6


def _later(name: str) -> Callable[[int], Any]:
    """Defers the import of ``name.name``, because flax and scikit-learn take seconds to import."""

    def make(horizon: int) -> Any:
        return getattr(importlib.import_module(f"experiments.problems.{name}"), name)(horizon)

    return make


PROBLEMS = {
    "digits": Choice(
        _later("digits"),
        about="The learning-rate and momentum schedule with which an MLP learns digits.",
        horizon=100,
        truncation=10,
        sigma=0.1,
    ),
    "influence_balancing": Choice(
        ug.problems.influence_balancing,
        about="The drive of a linear system; its short-term effect has the wrong sign.",
        horizon=100,
        truncation=10,
        sigma=0.1,
    ),
    "toy_regression": Choice(
        ug.problems.toy_regression,
        about="The learning rates of gradient descent on a wiggly function of two variables.",
        horizon=100,
        truncation=10,
        sigma=0.3,
    ),
    "linear_recurrence": Choice(
        lambda horizon: ug.problems.linear_recurrence(5, horizon, memory=0.8),
        about="The input of a linear recurrence: all variances are known in closed form.",
        horizon=20,
        truncation=5,
        sigma=0.1,
    ),
    "chaotic_map": Choice(
        ug.problems.chaotic_map,
        about="The rate of the logistic map, at which it is chaotic.",
        horizon=100,
        truncation=10,
        sigma=0.01,
        reference="full_es",
    ),
    "lorenz": Choice(
        ug.problems.lorenz,
        about="Two constants of the chaotic Lorenz system, to be found from a trajectory.",
        horizon=2000,
        truncation=20,
        sigma=0.04,
        reference="full_es",
        num_workers=300,
    ),
    "control": Choice(
        ug.problems.control,
        about="A linear policy that balances a pole on a cart.",
        horizon=200,
        truncation=20,
        sigma=0.3,
    ),
    "text_lstm": Choice(
        _later("text_lstm"),
        about="All weights of an LSTM that predicts the next character of a text.",
        horizon=100,
        truncation=10,
        sigma=0.1,
        learning_rate=0.01,
    ),
    "copy_task": Choice(
        _later("copy_task"),
        about="All weights of an LSTM that must remember symbols, then repeat them.",
        horizon=16,
        truncation=4,
        sigma=0.05,
        learning_rate=0.01,
    ),
    "learned_optimizer": Choice(
        _later("learned_optimizer"),
        about="All weights of a small network that trains an MLP on digits.",
        horizon=100,
        truncation=10,
        sigma=0.01,
        learning_rate=0.01,
    ),
}


def with_defaults(settings: Any, **others: Any) -> Any:
    """The settings with None replaced by the problem's defaults, all devices, and ``others``."""
    choice = PROBLEMS[settings.problem]
    truncation = choice.truncation if settings.truncation is None else settings.truncation
    defaults = {
        "horizon": choice.horizon,
        "truncation": truncation,
        "sigma": choice.sigma,
        "noise_period": 2 * truncation,
        "devices": jax.device_count(),
        **others,
    }
    missing = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    return dataclasses.replace(settings, **missing)
