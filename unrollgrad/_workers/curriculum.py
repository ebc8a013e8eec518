"""Windows and episodes that grow during training: one estimator after another, compiled once."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.descriptions import described
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Estimate,
    GradientEstimator,
    Key,
    MadeBy,
    Theta,
    WorkerState,
)

_TAG = 0x63757272  # folded into the key of a stage's first state; larger than a worker's index


class CurriculumState(NamedTuple):
    """The state of a ``curriculum``.

    Attributes:
        episode: The place of the present stage's workers in their episodes.
        calls: int32, the number of calls so far.
        carried: The other leaves of the present stage's state, as a list, because the structures
            of the stages' states name their estimators and therefore differ.
        made_by: The stages and their boundaries.
    """

    episode: Episode
    calls: jax.Array
    carried: list[jax.Array]
    made_by: MadeBy


@described
def curriculum(
    estimators: Sequence[GradientEstimator], boundaries: Sequence[int]
) -> GradientEstimator:
    """One estimator after another: longer windows or episodes as training goes on.

    Calls before ``boundaries[0]``, counted from 0, run ``estimators[0]``; calls from
    ``boundaries[i - 1]`` on run ``estimators[i]``. A new stage begins with a fresh state, so all
    workers begin new episodes. Within a stage the estimate has the bias and variance of the stage's
    estimator. A change of stage cuts episodes short and leaves their later windows out; let a stage
    last a multiple of T/K calls if that matters.

    The stages may differ in truncation, horizon, sigma, noise period or the whole problem, but not
    in theta, in the shapes of the worker states (number of workers and pairs, inner state), or in
    the kind of estimate. To grow the horizon alone, a sampler does it in one program: see
    ``UnrolledProblem.horizon``.

    A call takes the time and memory of the present stage. The first call compiles one program for
    all stages, which takes as long as compiling each of them. Average inside:
    ``curriculum([average(pes(...), 64), ...], ...)``. The average of a curriculum gives the same
    numbers, but in its ``vmap`` every stage runs in every call.

    Args:
        estimators: The stages: averages of workers, or single workers.
        boundaries: The calls, counted from 0, at which the second, third, ... stage begins.

    Returns:
        An estimator; its ``truncation`` is the stages' common truncation, or None.

    Raises:
        TypeError: If a stage is not a GradientEstimator or a boundary is not a whole number.
        ValueError: If there are no stages, if the boundaries do not increase or are not one fewer
            than the stages, if the stages do not fit together, or if ``data`` is passed.

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

    @own_transfers()
    def init(key: Key, theta: Theta) -> CurriculumState:
        key = arguments.typed_key(key)
        stages = shapes(key, theta)
        _check_alike(stages, "state", *_SAME_STATES)
        state = estimators[0].init(key, theta)
        calls = mesh_axes.over(mesh_axes.axes(state.episode.t), jnp.zeros((), jnp.int32))
        return CurriculumState(state.episode, calls, _carried(state), _made_by(stages, boundaries))

    def estimate(
        key: Key, theta: Theta, state: CurriculumState, *, data: ArrayTree | None = None
    ) -> tuple[Estimate, CurriculumState]:
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

        def stage(number: int, like: WorkerState) -> Callable:
            def run(key, theta, state):
                def begin():
                    fresh = estimators[number].init(jax.random.fold_in(key, _TAG), theta)
                    return mesh_axes.over(names, fresh)

                own = _restored(like, state)
                if number > 0:
                    is_first = state.calls == boundaries[number - 1]
                    own = jax.lax.cond(is_first, begin, lambda: _restored(like, state))
                out, own = estimators[number].estimate(key, theta, own)
                return mesh_axes.over(names, (out, own.episode, _carried(own)))

            return run

        branches = [stage(i, like) for i, like in enumerate(shapes(key, theta))]
        estimates = [jax.eval_shape(run, key, theta, state)[0] for run in branches]
        _check_alike(estimates, "estimate", *_SAME_ESTIMATES)
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
    """Returns the state of the present stage, with the structure of ``like``."""
    structure = jax.tree.structure(like._replace(episode=None))
    return structure.unflatten(state.carried)._replace(episode=state.episode)


_SAME_STATES = (
    "have worker states of the same shapes, since one state serves them all",
    "Use the same kind of estimator, num_pairs and num_workers in all stages.",
)
_SAME_ESTIMATES = (
    "return the same kind of estimate",
    "Use `average` in all stages or in none, and losses of one dtype.",
)


def _check_alike(trees: list, name: str, must: str, advice: str) -> None:
    for i, other in enumerate(trees[1:], start=1):
        if lines := arguments.leaf_differences(trees[0], other, name):
            raise ValueError(
                f"the stages of a curriculum must {must}; `estimators[{i}]` differs from "
                "`estimators[0]`:\n" + "\n".join([*lines, advice])
            )
