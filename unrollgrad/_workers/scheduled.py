"""A setting of an estimator that changes over a run, such as a sigma that is annealed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.descriptions import About, about
from unrollgrad._workers.curriculum import CurriculumState
from unrollgrad.types import (
    ArrayTree,
    Estimate,
    GradientEstimator,
    Key,
    MadeBy,
    Numeric,
    Theta,
    Worker,
    WorkerState,
)


class Carried(NamedTuple):
    """What a worker of ``scheduled`` carries.

    Attributes:
        calls: int32, the number of this worker's calls so far.
        value: The setting in the present episode.
        worker: The estimator's own state, whose episode is in the worker.
    """

    calls: jax.Array
    value: Any
    worker: WorkerState


def scheduled(
    make: Callable[[Any], GradientEstimator], schedule: Callable[[Numeric], Any]
) -> GradientEstimator:
    """One worker whose setting follows a schedule, such as an annealed sigma.

    A worker that begins an episode in its call number c, counted from 0, runs it as
    ``make(schedule(c))``, and keeps this value until the episode ends. In ``fit``, c is the outer
    step. Within an episode the estimates are therefore those of ``make(value)``, with its bias and
    variance, wherever the other workers stand.

    A sigma that changed inside an episode would bias ``gpes``, ``pes`` and ``es_single``. Let
    sigma_w be its value in window w of an episode and g[w, v] the influence of window v on the loss
    of window w, so that the gradient is the mean over w of sum_v g[w, v]. For quadratic losses the
    estimates have the mean sum_v (sigma_v / sigma_w) g[w, v] in place of it: the accumulated noise
    has unit variance and is divided by the present sigma alone, so that a falling sigma counts
    earlier influence too much. (Dividing each window's noise by its own sigma would mend ``pes``,
    but not ``es_single``, whose one noise is multiplied by all of them.)

    Time and memory are the estimator's, plus one value per worker. Nothing compiles again when the
    value changes, and ``fit(checkpoint_dir=)`` resumes where the schedule was.

    Args:
        make: ``make(value) -> GradientEstimator``, a single worker. The value is a traced array, so
            it can be a sigma, but not a truncation or a number of pairs: see ``curriculum``.
        schedule: ``schedule(c) -> value``, such as a schedule of optax. It gets a traced int32; the
            value is a number or a tree of them, of the same shapes for every c. A sigma has to stay
            positive: with 0 the gradient is NaN, and ``fit`` stops.

    Returns:
        An estimator. Put it into ``average(scheduled(...), 64)``, not the other way round. The
        calls that ``stagger="burn_in"`` makes in ``init`` count. If a call is a whole episode, or
        an algorithm of ``bilevel``, which never ends, the value is new in every call.

    Raises:
        TypeError: If ``make`` or ``schedule`` is not a function, or ``make`` returns something
            else than a GradientEstimator.
        ValueError: If the estimator is an average or a curriculum, or refuses ``schedule(0)``.

    Example:
        >>> import jax, optax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> sigma = optax.exponential_decay(0.3, transition_steps=100, decay_rate=0.5)
        >>> worker = ug.scheduled(lambda s: ug.pes(problem, truncation=10, sigma=s), sigma)
        >>> workers, key = ug.average(worker, 16), jax.random.key(0)
        >>> result = ug.fit(workers, theta, optax.sgd(1e-4), num_steps=201, key=key)
        >>> round(float(result.worker_state.carried.value[0]), 3)  # 0.3, halved twice
        0.075
    """
    example = _example(make, schedule)

    @own_transfers()
    def init(key: Key, theta: Theta) -> Worker:
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        value = _at(schedule, 0)
        worker = make(value).init(key, theta)
        _check_single(worker)
        names = mesh_axes.axes((key, theta))
        calls, value = mesh_axes.over(names, (jnp.zeros((), jnp.int32), value))
        carried = Carried(calls, value, worker._replace(episode=None))
        return Worker(worker.episode, carried, _made_by(worker))

    def estimate(
        key: Key, theta: Theta, state: Worker, *, data: ArrayTree | None = None
    ) -> tuple[Estimate, Worker]:
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        arguments.check_worker_state(state, jax.eval_shape(init, key, theta))
        names = mesh_axes.axes((key, theta, state, data))
        key, theta, state = mesh_axes.over(names, (key, theta, state))
        calls, value, worker = state.carried
        # Without windows every call begins an episode, or is a step of an algorithm without them.
        begins = (state.episode.t == 0) | (example.truncation is None)
        value = unroll.select(begins, _at(schedule, calls), value)
        own = worker._replace(episode=state.episode)
        out, own = make(value).estimate(key, theta, own, data=data)
        carried = Carried(calls + 1, value, own._replace(episode=None))
        return out, Worker(own.episode, carried, state.made_by)

    text = f"scheduled({about(example).text}, ...)"
    init.about = About(text, about(example).problem)  # type: ignore[attr-defined]
    return GradientEstimator(init, jax.jit(estimate), example.truncation)


def _at(schedule: Callable[[Numeric], Any], calls: Numeric) -> Any:
    """The schedule's value, as strongly typed arrays."""
    return jax.tree.map(arguments.strong, schedule(jnp.asarray(calls, jnp.int32)))


def _example(
    make: Callable[[Any], GradientEstimator], schedule: Callable[[Numeric], Any]
) -> GradientEstimator:
    """The estimator of the first call, whose settings and text hold for all."""
    if not callable(make) or isinstance(make, GradientEstimator):
        raise TypeError(
            "`make` must be a function of the setting, such as `lambda sigma: ug.pes(problem, "
            f"truncation=10, sigma=sigma)`; got a {type(make).__name__}."
        )
    if not callable(schedule):
        raise TypeError(
            "`schedule` must be a function of the call's number, such as "
            f"optax.cosine_decay_schedule(0.3, 1000); got {arguments.describe(schedule)}."
        )
    with own_transfers():
        example = make(jax.tree.map(_readable, _at(schedule, 0)))
    if not isinstance(example, GradientEstimator):
        raise TypeError(
            "`make` must return a GradientEstimator such as ug.pes(problem, ...); got a "
            f"{type(example).__name__}."
        )
    return example


def _readable(x: jax.Array) -> Any:
    """A number with few digits, for the estimator's text; traced and larger arrays as they are."""
    return x if isinstance(x, jax.core.Tracer) or x.ndim else float(f"{np.asarray(x):.4g}")


def _check_single(worker: WorkerState) -> None:
    if isinstance(worker, CurriculumState):
        raise ValueError(
            "`make` must not return a curriculum, whose stages may change inside an episode of the "
            "schedule. Schedule the stages: ug.curriculum([ug.scheduled(...), ...], boundaries)."
        )
    if jnp.ndim(worker.episode.t):
        raise ValueError(
            "`make` must return a single worker; got an average, whose workers may stand at "
            "different places of their episodes. Average the schedule: "
            "ug.average(ug.scheduled(...), num_workers)."
        )


def _made_by(worker: WorkerState) -> MadeBy:
    made = getattr(worker, "made_by", MadeBy(type(worker).__name__, ()))
    return MadeBy("scheduled", (("estimator", made.estimator), *made.settings))
