"""Windows and episodes that grow during training: one estimator after another, compiled once."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad.types import Episode, Estimate, GradientEstimator, Key, MadeBy, Theta, WorkerState

_TAG = 0x63757272  # the keys of a stage's first state are those of no worker


class CurriculumState(NamedTuple):
    """The state of a ``curriculum``.

    Attributes:
        episode: Where the workers of the present stage stand.
        calls: int32, calls so far.
        carried: What else the present stage's state holds, as a list of leaves: the stages differ
            in what their states say of themselves.
        made_by: The stages and their boundaries.
    """

    episode: Episode
    calls: jax.Array
    carried: list[jax.Array]
    made_by: MadeBy


def curriculum(
    estimators: Sequence[GradientEstimator], boundaries: Sequence[int]
) -> GradientEstimator:
    """One estimator after another: longer windows or episodes as training goes on.

    The first call, and all calls before ``boundaries[0]``, go to ``estimators[0]``; those from
    ``boundaries[i - 1]`` on to ``estimators[i]``. A new stage begins with a fresh state of its own,
    so with new episodes for all workers. Each call is that of the stage's estimator: within a stage
    the estimate has its bias and variance. An episode that a change of stage cuts short leaves its
    later windows out; let a stage last a multiple of T/K calls where that matters.

    The stages may differ in truncation, horizon, sigma, noise period, the whole problem; not in
    theta, in the shapes of the worker states (number of workers and pairs, inner state), or in the
    kind of estimate. To grow the horizon alone, a sampler does it in one program: see
    ``UnrolledProblem.horizon``.

    Time per call and memory: those of the present stage. Everything is compiled in the first call,
    one program for all stages, which takes as long as compiling each of them. Average inside:
    ``curriculum([average(pes(...), 64), ...], ...)``. The average of a curriculum gives the same
    numbers, but in its ``vmap`` every stage runs in every call.

    Args:
        estimators: The stages: workers or, better, averages of them.
        boundaries: The calls, counted from 0, at which the second, third, ... stage begins.

    Returns:
        An estimator; its ``truncation`` is that of the stages if they agree, else None.

    Raises:
        TypeError: If a stage is no GradientEstimator or a boundary no whole number.
        ValueError: Without stages, for boundaries that do not increase or are not one fewer than
            the stages, for stages that do not fit together and, when estimating, for ``data``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> stages = [ug.average(ug.tbptt(problem, truncation=k), 4) for k in (1, 10)]
        >>> growing, key = ug.curriculum(stages, boundaries=[2]), jax.random.key(0)
        >>> state = growing.init(key, theta)
        >>> for _ in range(3):
        ...     estimate, state = growing.estimate(key, theta, state)
        >>> int(state.calls), state.episode.t.tolist()
        (3, [10, 10, 10, 10])
    """
    estimators, boundaries = _checked(estimators, boundaries)

    def shapes(key: Key, theta: Theta) -> list[WorkerState]:
        return [jax.eval_shape(e.init, key, theta) for e in estimators]

    def init(key: Key, theta: Theta) -> CurriculumState:
        key = arguments.typed_key(key)
        stages = shapes(key, theta)
        _check_same_shapes(stages)
        state = estimators[0].init(key, theta)
        calls = mesh_axes.over(mesh_axes.axes(state.episode.t), jnp.zeros((), jnp.int32))
        return CurriculumState(state.episode, calls, _carried(state), _made_by(stages, boundaries))

    def estimate(key: Key, theta: Theta, state: CurriculumState, *, data: Any = None):
        if data is not None:
            raise ValueError(
                "a curriculum takes no `data`: its stages may need different lengths of it. Sample "
                "batches in `step` (training_problem's `sample_batch`)."
            )
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        arguments.check_worker_state(state, jax.eval_shape(init, key, theta))
        names = mesh_axes.axes((key, theta, state))
        key, theta, state = mesh_axes.over(names, (key, theta, state))
        begins = jnp.asarray(boundaries, jnp.int32)

        def stage(number: int, like: WorkerState) -> Callable[..., Any]:
            def run(key, theta, state):
                def carry_on():
                    return _restored(like, state)

                def begin():
                    fresh = estimators[number].init(jax.random.fold_in(key, _TAG), theta)
                    return mesh_axes.over(names, fresh)

                own = carry_on()
                if number > 0:
                    own = jax.lax.cond(state.calls == boundaries[number - 1], begin, carry_on)
                out, own = estimators[number].estimate(key, theta, own)
                return mesh_axes.over(names, (out, own.episode, _carried(own)))

            return run

        branches = [stage(i, like) for i, like in enumerate(shapes(key, theta))]
        _check_same_estimates([jax.eval_shape(run, key, theta, state)[0] for run in branches])
        number = jnp.sum(state.calls >= begins, dtype=jnp.int32)
        out, episode, carried = jax.lax.switch(number, branches, key, theta, state)
        return out, state._replace(episode=episode, calls=state.calls + 1, carried=carried)

    truncations = {e.truncation for e in estimators}
    return GradientEstimator(
        init, jax.jit(estimate), truncations.pop() if len(truncations) == 1 else None
    )


def _checked(
    estimators: Sequence[GradientEstimator], boundaries: Sequence[int]
) -> tuple[list[GradientEstimator], list[int]]:
    estimators = list(estimators)
    if not estimators:
        raise ValueError("`estimators` is empty; pass the stages, such as [pes_10, pes_100].")
    for i, estimator in enumerate(estimators):
        if not isinstance(estimator, GradientEstimator):
            raise TypeError(
                f"`estimators[{i}]` must be a GradientEstimator such as ug.average(ug.pes(problem, "
                f"...), 64); got a {type(estimator).__name__}."
            )
    boundaries = [arguments.positive_int(f"boundaries[{i}]", b) for i, b in enumerate(boundaries)]
    if len(boundaries) != len(estimators) - 1:
        raise ValueError(
            "`boundaries` must be one fewer than the stages, the calls at which the second, third, "
            f"... begins; got {len(boundaries)} boundaries {boundaries} for {len(estimators)} "
            "estimators."
        )
    if any(b <= a for a, b in itertools.pairwise(boundaries)):
        raise ValueError(
            f"`boundaries` must increase; got {boundaries}. Each stage needs at least one call."
        )
    return estimators, boundaries


def _made_by(stages: list[WorkerState], boundaries: list[int]) -> MadeBy:
    names = ", ".join(str(getattr(s, "made_by", type(s).__name__)) for s in stages)
    return MadeBy("curriculum", (("estimators", f"[{names}]"), ("boundaries", tuple(boundaries))))


def _carried(state: WorkerState) -> list[jax.Array]:
    return jax.tree.leaves(state._replace(episode=None))


def _restored(like: WorkerState, state: CurriculumState) -> WorkerState:
    """The state of the stage whose states are like ``like``."""
    structure = jax.tree.structure(like._replace(episode=None))
    return structure.unflatten(state.carried)._replace(episode=state.episode)


def _check_same_shapes(stages: list[WorkerState]) -> None:
    for i, other in enumerate(stages[1:], start=1):
        if lines := arguments.leaf_differences(stages[0], other):
            raise ValueError(
                "the stages of a curriculum must have worker states of the same shapes, since one "
                f"state serves them all; `estimators[{i}]` differs from `estimators[0]`:\n"
                + "\n".join(lines)
                + "\nUse the same kind of estimator, num_pairs and num_workers in all stages."
            )


def _check_same_estimates(estimates: list[Estimate]) -> None:
    for i, other in enumerate(estimates[1:], start=1):
        if lines := arguments.leaf_differences(estimates[0], other, "estimate"):
            raise ValueError(
                "the stages of a curriculum must return the same kind of estimate; "
                f"`estimators[{i}]` differs from `estimators[0]`:\n"
                + "\n".join(lines)
                + "\nUse `average` in all stages or in none, and losses of one dtype."
            )
