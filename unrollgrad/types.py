"""The contracts: what an inner loop is, what an estimator is, what an estimate is.

Everything here is a ``NamedTuple``: a pytree (or a bundle of pure functions) that passes
through ``jit``, ``vmap`` and ``scan`` unchanged. Nothing inherits and nothing hides state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax

Key = chex.PRNGKey
"""A typed PRNG key (``jax.random.key``). Raw ``uint32`` keys are accepted at the door."""

Theta = chex.ArrayTree
"""Outer parameters: any pytree of floating leaves."""

State = chex.ArrayTree
"""Inner state: any pytree of arrays; ints, bools and typed keys may be among the leaves."""

WorkerState = Any
"""What one worker carries between calls: a ``Worker``, or a NamedTuple with a field ``episode``."""


class UnrolledProblem(NamedTuple):
    """An inner loop as pure functions.

    The objective is J(theta) = E[mean loss per inner step], plus E[``evaluate`` of the final
    state] where ``evaluate`` is given. With a sampled horizon J = E[sum of losses] / E[T].

    Attributes:
        init: ``init(key, theta) -> state``. A fresh inner state; it may depend on theta (the
            gradient goes through it) and may draw a task.
        step: ``step(key, theta, state, t) -> (state, loss)``. One inner step. ``t`` is an int32
            scalar, the step's number in its episode; ``loss`` is a scalar, minimised. With
            streaming data it is called ``step(key, theta, state, t, batch)``.
        horizon: Inner steps in an episode (T), or a sampler ``horizon(key) -> int`` of them. The
            sampler may return a traced number: ``horizon=lambda key: length``, with problem and
            estimator made inside the jitted update of which ``length`` is an argument, lets
            episodes grow during training without compiling again. An episode keeps the length it
            began with, rounded up to a multiple of the truncation.
        evaluate: Optional ``evaluate(key, theta, state) -> loss`` of the state at the end of the
            episode. It needs a static horizon.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, chex.Numeric]]
    horizon: int | Callable[[Key], chex.Numeric]
    evaluate: Callable[..., chex.Numeric] | None = None


class Info(NamedTuple):
    """What one call of one worker cost.

    Attributes:
        inner_steps: int32, forward inner steps spent: both signs of a pair and the mean pass
            count, backward steps do not.
    """

    inner_steps: jax.Array


class AverageInfo(NamedTuple):
    """What one call of ``average`` cost and how far its workers agree.

    Attributes:
        inner_steps: int32, summed over workers.
        num_nonfinite: int32, workers whose loss or gradient was not finite.
        grad_variance: The trace of the covariance of the mean gradient, estimated from the
            spread over workers; +inf below two contributing workers.
    """

    inner_steps: jax.Array
    num_nonfinite: jax.Array
    grad_variance: jax.Array


class Estimate(NamedTuple):
    """An estimate of the outer gradient.

    Averaged over the T/K windows of an episode, ``grad`` estimates the gradient of J and
    ``loss`` estimates J (of the sigma-smoothed J for the evolution-strategies family).

    Attributes:
        grad: A pytree with theta's structure, shapes and dtypes.
        loss: A scalar, at least float32.
        info: ``Info``, or ``AverageInfo`` from ``average``.
    """

    grad: Any
    loss: jax.Array
    info: Info | AverageInfo


class Episode(NamedTuple):
    """Where a worker stands: a step is a pure function of (episode, t).

    Attributes:
        key: The key the episode began from; init, steps, noise and horizon are drawn from it.
        t: int32, inner steps done. ``t == 0`` means the next call begins an episode.
        horizon: int32, the episode's length.
    """

    key: Key
    t: jax.Array
    horizon: jax.Array


class Segment(NamedTuple):
    """The stretch of an episode that one call runs.

    Attributes:
        problem: The inner loop.
        episode: Where the stretch begins.
        num_steps: Its inner steps.
        data: Streamed data with leading axis ``num_steps``, or None.
    """

    problem: UnrolledProblem
    episode: Episode
    num_steps: int
    data: chex.ArrayTree | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeBy:
    """The maker of a worker state: a part of the state's structure, not a leaf of it.

    Attributes:
        estimator: The estimator's name.
        settings: Those without which the state would mean something else, as (name, value). Sigma
            is not among them: it may change between calls.
    """

    estimator: str
    settings: tuple[tuple[str, object], ...]

    def __str__(self):
        return f"{self.estimator}({', '.join(f'{k}={v}' for k, v in self.settings)})"


class Worker(NamedTuple):
    """What one worker carries between calls, whatever the estimator.

    Attributes:
        episode: Where the worker stands.
        carried: What its estimator carries; None where every call is a whole episode.
        made_by: The estimator that owns this state.
    """

    episode: Episode
    carried: Any
    made_by: MadeBy


class EstimateFn(Protocol):
    """The call of an estimator: ``estimate(key, theta, state, *, data=None)``."""

    def __call__(
        self, key: Key, theta: Theta, state: WorkerState, *, data: chex.ArrayTree | None = None
    ) -> tuple[Estimate, WorkerState]:
        """Estimates from one window and moves the worker on."""
        ...


class GradientEstimator(NamedTuple):
    """One worker that estimates the gradient of J, window by window.

    Attributes:
        init: ``init(key, theta) -> state``. Works under ``jax.eval_shape``.
        estimate: ``estimate(key, theta, state, *, data=None) -> (Estimate, state)``. A call that
            finds ``state.episode.t == 0`` begins an episode from its key. The state that comes
            out has the structure, shapes, dtypes and weak types of the one that went in.
        truncation: Inner steps per call (K); None where a call is a whole episode.
    """

    init: Callable[[Key, Theta], WorkerState]
    estimate: EstimateFn
    truncation: int | None = None
