"""One step of a sampler, and what all samplers have in common.

Every step is linear in the latent x, the network's output and fresh noise z:
x' = keep x + move output + noise z. So is the network's prediction of the sample. The numbers are
all that differs between samplers, and all that their estimators need besides the network.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, unroll
from unrollgrad.types import Key, Numeric, Segment, Theta, UnrolledProblem


class SamplerState(NamedTuple):
    """The inner state of a sampler.

    Attributes:
        x: The latent, shape ``sample_shape``; after the last step the sample.
        condition: What the network is conditioned on; constant during an episode.
    """

    x: jax.Array
    condition: Any


class Coefficients(NamedTuple):
    """The numbers of one step, all scalars of x's dtype.

    Attributes:
        time: The time that the network is told, in [0, 1].
        keep: The factor of x in the new x.
        move: The factor of the network's output in the new x.
        noise: The standard deviation of the noise in the new x; None if no step adds any.
        data_keep: The factor of x in the prediction of the sample.
        data_move: The factor of the network's output in the prediction of the sample.
        alpha: The share of data in x: x = alpha data + sigma noise.
        sigma: The share of noise in x.
    """

    time: jax.Array
    keep: jax.Array
    move: jax.Array
    noise: jax.Array | None
    data_keep: jax.Array
    data_move: jax.Array
    alpha: jax.Array
    sigma: jax.Array


class SamplerStep(NamedTuple):
    """The ``step`` of a sampler's problem: a function of (key, theta, state, t), and its parts.

    Attributes:
        network: ``network(theta, x, time, condition) -> output`` of x's shape.
        coefficients: ``coefficients(t, dtype) -> Coefficients`` of step t = 0, ..., num_steps - 1.
        num_steps: The steps for which the coefficients are made.
    """

    network: Callable[..., Any]
    coefficients: Callable[[Numeric, Any], Coefficients]
    num_steps: int

    def __call__(
        self, key: Key, theta: Theta, state: SamplerState, t: jax.Array
    ) -> tuple[SamplerState, jax.Array]:
        """Takes one step; its loss is zero, since the reward is that of the sample."""
        c = self.coefficients(t, state.x.dtype)
        x = c.keep * state.x + c.move * self.output(theta, state, c)
        if c.noise is not None:
            x = x + c.noise * jax.random.normal(key, x.shape, x.dtype)
        return state._replace(x=x), jnp.zeros((), jnp.float32)

    def output(self, theta: Theta, state: SamplerState, c: Coefficients) -> jax.Array:
        """The network's output, in x's dtype; raises ValueError if it has another shape."""
        given = {"x": state.x, "t": c.time, "condition": state.condition}
        with explained("the network of a sampler", _CONDITION, **given):
            out = self.network(theta, state.x, c.time, state.condition)
        if np.shape(out) != state.x.shape:
            raise ValueError(
                f"the network must return the shape of x, {state.x.shape}; it returned "
                f"{arguments.describe(out)}. `sample_shape` is the shape of one sample, with a "
                "batch axis only if the network and the reward take one."
            )
        return jnp.asarray(out, state.x.dtype)

    def predicted(self, theta: Theta, state: SamplerState, c: Coefficients) -> SamplerState:
        """The state with the network's prediction of the sample in place of x."""
        return state._replace(x=c.data_keep * state.x + c.data_move * self.output(theta, state, c))


@contextlib.contextmanager
def explained(called: str, advice: str, **given: Any) -> Iterator[None]:
    """Adds to an error what a user's function was called with, and what may be changed.

    The last thing given is the condition. An error that is not about it is left as it is: one
    without a condition, one about the values of traced numbers, and one that is explained already.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        *_, condition = given.values()
        explained_already = any(_CALLED in note for note in getattr(error, "__notes__", ()))
        without = condition is None and "None" not in str(error)
        if without or explained_already or isinstance(error, jax.errors.JAXTypeError):
            raise
        shown = [
            f"{name}{jax.tree_util.keystr(path)}={arguments.describe(leaf)}"
            for name, tree in given.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
        ]
        error.add_note(f"{called} {_CALLED} {', '.join(shown)}. {advice}")
        raise


_CALLED = "was called with"
_CONDITION = (
    "If it cannot take that, pass another `condition` to the sampler: the condition of one "
    "episode, with a batch axis only if `sample_shape` has it."
)


def all_coefficients(step: SamplerStep) -> Coefficients:
    """The numbers of all steps, arrays of float32; tracers if they depend on what is traced."""
    rule = jax.vmap(lambda t: step.coefficients(t, jnp.float32))
    found = eager.known(rule, np.arange(step.num_steps, dtype=np.int32))
    return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), found)


class Target(NamedTuple):
    """What a sampler samples, and what it is rewarded for: the arguments of all factories."""

    num_steps: int
    reward: Callable[..., Any]
    sample_shape: tuple[int, ...]
    condition: Any


def target(num_steps: int, reward: Callable, sample_shape: Any, condition: Any) -> Target:
    """Checks the arguments that all samplers have.

    Raises:
        TypeError: If ``reward`` cannot be called with a sample and a condition, or the shape is not
            a tuple of whole numbers.
        ValueError: If a number is below one.
    """
    if not isinstance(sample_shape, tuple | list):
        raise TypeError(
            f"`sample_shape` must be a tuple such as (8, 8); got {sample_shape!r} "
            f"({type(sample_shape).__name__}). Use () for a scalar and (n,) for a vector."
        )
    shape = tuple(arguments.positive_int("sample_shape", n) for n in sample_shape)
    steps = arguments.positive_int("num_steps", num_steps)
    if callable(condition):
        inner_loop.check_call("condition", condition, key=None)
    reward = conditional("reward", reward, condition, ("x0",))
    return Target(steps, reward, shape, condition)


def conditional(
    name: str, function: Callable, condition: Any, before: tuple[str, ...]
) -> Callable[..., Any]:
    """The function with the condition as its last argument, which it may leave out if it is None.

    Raises:
        TypeError: If it takes neither.
    """
    if condition is None and not inner_loop.takes(function, *before, None):
        if inner_loop.takes(function, *before):
            return lambda *args: function(*args[:-1])
    inner_loop.check_call(name, function, **{x: None for x in (*before, "condition")})
    return function


def sampler(step: SamplerStep, goal: Target, scale: Callable[[Any], Numeric]) -> UnrolledProblem:
    """The problem of a sampler: ``scale(dtype)`` is the standard deviation of the first latent."""

    def init(key, theta):
        for_x, for_condition = jax.random.split(key)
        x = jax.random.normal(for_x, goal.sample_shape)
        drawn = goal.condition
        if callable(drawn):
            drawn = drawn(for_condition)
        return SamplerState(jnp.asarray(scale(x.dtype) * x), drawn)

    def evaluate(key, theta, state):
        given = {"x0": state.x, "condition": state.condition}
        with explained("`reward` of a sampler", _CONDITION, **given):
            reward = goal.reward(state.x, state.condition)
        if np.shape(reward) != ():
            raise ValueError(
                f"`reward` must return a scalar; got {arguments.describe(reward)}. With a batch "
                "axis in `sample_shape`, return the mean over the batch."
            )
        return -reward

    return UnrolledProblem(init, step, goal.num_steps, evaluate)


def step_of(name: str, problem: UnrolledProblem) -> SamplerStep:
    """The step of a sampler's problem.

    Raises:
        TypeError: If the problem was not made by a sampler.
        ValueError: If its horizon is no longer the sampler's number of steps.
    """
    inner_loop.check_problem(problem)
    if not isinstance(problem.step, SamplerStep) or problem.evaluate is None:
        raise TypeError(
            f"`{name}` needs the problem of a sampler, made by samplers.ddim or samplers.flow; got "
            f"a problem with step={problem.step!r} and evaluate={problem.evaluate!r}. For another "
            "reward use problem._replace(evaluate=...), which keeps the sampler."
        )
    if problem.horizon != problem.step.num_steps:
        raise ValueError(
            f"problem.horizon={problem.horizon}, but the sampler was made for "
            f"{problem.step.num_steps} steps, and would stop with noise in x. Make it again with "
            "another `num_steps`."
        )
    return problem.step


def begin(segment: Segment, theta: Theta) -> SamplerState:
    """The state before an episode's first step."""
    state: Any = unroll.initial_state(segment.problem, segment.episode, theta)
    return state


def finish(segment: Segment, theta: Theta, state: SamplerState) -> SamplerState:
    """The state after the segment's steps, of which there may be none."""
    after: Any = unroll.unroll(segment, theta, state)[0] if segment.num_steps else state
    return after


def trajectory(segment: Segment, theta: Theta) -> tuple[SamplerState, jax.Array]:
    """Runs a whole episode: the last state, and the latents before each step."""

    def step(state, key, t, batch):
        after, _ = unroll.one_step(segment.problem, key, theta, state, t, batch)
        return after, state.x

    return unroll.scan(segment, step, begin(segment, theta))
