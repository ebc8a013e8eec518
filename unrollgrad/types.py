"""The contracts: what an inner loop is, what an estimator is, what an estimate is.

Everything here is a ``NamedTuple``: a pytree (or a bundle of pure functions) that passes through
``jit``, ``vmap`` and ``scan`` unchanged. No class inherits from another, and none hides state.
"""

import dataclasses
import html
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax

if TYPE_CHECKING:
    from chex import ArrayDType, ArrayTree, Numeric, PRNGKey
else:  # importing chex takes as long as half of unrollgrad
    ArrayDType = ArrayTree = Numeric = PRNGKey = Any

__all__ = [
    "ArrayDType",
    "ArrayTree",
    "AverageInfo",
    "Episode",
    "Estimate",
    "EstimateFn",
    "GradientEstimator",
    "Info",
    "Key",
    "MadeBy",
    "Numeric",
    "PRNGKey",
    "Segment",
    "Sigma",
    "State",
    "Theta",
    "UnrolledProblem",
    "Worker",
    "WorkerState",
]

Key = PRNGKey
"""A typed PRNG key (``jax.random.key``); public functions accept raw ``uint32`` keys too."""

Theta = ArrayTree
"""Outer parameters: any pytree of floating leaves."""

State = ArrayTree
"""Inner state: any pytree of arrays; ints, bools and typed keys may be among the leaves."""

Sigma = Numeric | ArrayTree | Iterable[Numeric]
"""Standard deviations of perturbations: a number, or a pytree prefix of theta with numbers."""

WorkerState = Any
"""A worker's state between calls: a ``Worker``, or a NamedTuple with a field ``episode``."""


class UnrolledProblem(NamedTuple):
    """An inner loop as pure functions.

    The objective is J(theta) = E[mean loss per inner step], plus E[``evaluate``(final state)] if
    ``evaluate`` is given. With a sampled horizon J = E[sum of losses] / E[T].

    Attributes:
        init: ``init(key, theta) -> state`` makes a fresh inner state; it may depend on theta (the
            gradient goes through it) and may draw a task.
        step: ``step(key, theta, state, t) -> (state, loss)`` takes one inner step. ``t`` is an
            int32 scalar, the step's number in its episode; ``loss`` is a scalar, minimised. With
            streaming data it is called ``step(key, theta, state, t, batch)``.
        horizon: Inner steps in an episode (T), or a function ``horizon(key) -> int`` that samples
            them. It may return a traced number: if a jitted update takes ``length`` as an argument
            and makes problem and estimator inside, ``horizon=lambda key: length`` lets episodes
            grow during training without compiling again. An episode keeps its first length,
            rounded up to a multiple of the truncation.
        evaluate: Optional ``evaluate(key, theta, state) -> loss``, called with the state at the
            end of the episode. It needs a static horizon.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Numeric]]
    horizon: int | Callable[[Key], Numeric]
    evaluate: Callable[..., Numeric] | None = None

    def __repr__(self):
        def name(function):
            return getattr(function, "__name__", type(function).__name__)

        horizon = name(self.horizon) if callable(self.horizon) else self.horizon
        end = "" if self.evaluate is None else f", evaluate={name(self.evaluate)}"
        functions = f"{name(self.init)}, {name(self.step)}"
        return f"UnrolledProblem({functions}, horizon={horizon}{end})"


class Info(NamedTuple):
    """The cost of one call of one worker.

    Attributes:
        inner_steps: int32, forward inner steps spent: both signs of a pair and the pass with theta
            itself count, backward steps do not. 2^31 - 1 stands for that many or more.
    """

    inner_steps: jax.Array


class AverageInfo(NamedTuple):
    """The cost of one call of ``average``, and how far its workers agree.

    Attributes:
        inner_steps: int32, summed over workers.
        num_nonfinite: int32, the number of workers whose loss or gradient was not finite.
        grad_variance: The trace of the mean gradient's covariance, estimated from the spread over
            workers; +inf if fewer than two workers contribute.
    """

    inner_steps: jax.Array
    num_nonfinite: jax.Array
    grad_variance: jax.Array


class BilevelInfo(NamedTuple):
    """The cost of one call of a stochastic bilevel algorithm, and whether its rates fit.

    Attributes:
        inner_steps: int32, the steps that the inner variable took.
        gradients: int32, the cost in gradients of one batch: a gradient 1, the products with H and
            B from one vjp 2, one of them alone 2.
        v_norm: The norm of v after the call, or of what stands for it.
        curvature: The Rayleigh quotient v^T H v / v^T v of this call's batch (times its weight, if
            the last batch is short).
        inner_rate: The length of the last step of params, over the length of its direction: the
            learning rate, if the optimizer is ``optax.sgd``.
        linear_rate: The same of v's last step, or the rate of a Neumann series; 0 where there is
            neither.
        outer_rate: The same of theta's last step.
    """

    inner_steps: jax.Array
    gradients: jax.Array
    v_norm: jax.Array
    curvature: jax.Array
    inner_rate: jax.Array
    linear_rate: jax.Array
    outer_rate: jax.Array


class StnInfo(NamedTuple):
    """The cost of one call of a self-tuning network, and its hyperparameters.

    Attributes:
        inner_steps: int32, the training steps taken.
        train_loss: The mean over these steps of the loss of the weights at theta itself
            (``delta_stn``), or of the response at perturbed hyperparameters (``stn``).
        perturbed_loss: The mean of the loss of the response at perturbed hyperparameters.
        theta: The hyperparameters of the call, unconstrained, as one vector in the order of
            theta's leaves; ``stn.schedule`` makes their values of it.
        sigma: The standard deviations of their perturbations, in the same order.
    """

    inner_steps: jax.Array
    train_loss: jax.Array
    perturbed_loss: jax.Array
    theta: jax.Array
    sigma: jax.Array


class Estimate(NamedTuple):
    """An estimate of the outer gradient.

    Averaged over the T/K windows of an episode, ``grad`` estimates the gradient of J and ``loss``
    estimates J. Evolution strategies estimate those of a smoothed J: the episode-smoothed J is
    E_u[J(theta + sigma u)] with one draw u per episode (``full_es``, ``es_single``); in the
    period-smoothed J each noise period has a draw of its own (``gpes``, ``pes``). Both are J for
    quadratic losses, and J + O(sigma^2) otherwise.

    Attributes:
        grad: A pytree with theta's structure, shapes and dtypes.
        loss: A scalar, at least float32.
        info: ``Info``; ``BilevelInfo`` from the algorithms of ``bilevel``, ``StnInfo`` from those
            of ``stn``, or ``AverageInfo`` from ``average``.
    """

    grad: Any
    loss: jax.Array
    info: Info | AverageInfo | BilevelInfo | StnInfo


class Episode(NamedTuple):
    """A worker's place in its episode: a step is a pure function of (episode, t).

    Attributes:
        key: The key from which init, steps, noise and horizon of the episode are drawn.
        t: int32, inner steps done. If ``t == 0``, the next call begins an episode.
        horizon: int32, the episode's length.
    """

    key: Key
    t: jax.Array
    horizon: jax.Array


class Segment(NamedTuple):
    """The stretch of an episode that one call runs: a window, or the whole episode.

    Attributes:
        problem: The inner loop.
        episode: The place in the episode at which the stretch begins.
        num_steps: The number of inner steps.
        data: Streamed data with leading axis ``num_steps``, or None.
    """

    problem: UnrolledProblem
    episode: Episode
    num_steps: int
    data: ArrayTree | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeBy:
    """The estimator and settings that made a worker state; static, not a leaf of the state.

    Attributes:
        estimator: The estimator's name.
        settings: Settings that fix the meaning of the state, as (name, value). Sigma is not
            included: it may change between episodes. Of a law of noise its name, whole numbers and
            words are.
    """

    estimator: str
    settings: tuple[tuple[str, object], ...]

    def __str__(self):
        return f"{self.estimator}({', '.join(f'{k}={v}' for k, v in self.settings)})"


class Worker(NamedTuple):
    """The state of one worker between calls; every estimator has it.

    Attributes:
        episode: The worker's place in its episode.
        carried: The estimator's own state; None if every call is a whole episode.
        made_by: The estimator that owns this state.
    """

    episode: Episode
    carried: Any
    made_by: MadeBy


class EstimateFn(Protocol):
    """The call of an estimator: ``estimate(key, theta, state, *, data=None)``."""

    def __call__(
        self, key: Key, theta: Theta, state: WorkerState, *, data: ArrayTree | None = None
    ) -> tuple[Estimate, WorkerState]:
        """Estimates the gradient from one window and moves the worker on."""
        ...


class GradientEstimator(NamedTuple):
    """One worker that estimates the gradient of J, window by window.

    Attributes:
        init: ``init(key, theta) -> state``. Works under ``jax.eval_shape``.
        estimate: ``estimate(key, theta, state, *, data=None) -> (Estimate, state)``. A call that
            finds ``state.episode.t == 0`` begins an episode from its key. The new state has the
            structure, shapes, dtypes and weak types of the old one.
        truncation: Inner steps per call (K); None if a call is a whole episode.
    """

    init: Callable[[Key, Theta], WorkerState]
    estimate: EstimateFn
    truncation: int | None = None

    def __repr__(self):
        made = getattr(self.init, "about", None)
        return f"GradientEstimator(truncation={self.truncation})" if made is None else made.text

    def _repr_html_(self):
        made = getattr(self.init, "about", None)
        text = f"<code>{html.escape(repr(self))}</code>"
        return text if made is None else made.html(self.truncation)
