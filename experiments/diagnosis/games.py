"""Small dynamics with two outcomes: a double well, and gradient learners of repeated games."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.types import Key

State = Any
Values = tuple[jax.Array, jax.Array]
"""The mean rewards of the two players."""


class Dynamics(NamedTuple):
    """A map with two outcomes.

    Attributes:
        about: One line.
        step: One step of the map.
        start: ``start(key)``, a random start as one would take it.
        outcome: ``outcome(state)`` after ``run_steps``: 0 or 1; -1 for neither.
        run_steps: Steps of a run.
        climb_steps: Steps over which the exponent is measured.
        learning_rate: The rate of the climb, by Adam.
        distance: Half the distance between the branches.
    """

    about: str
    step: Callable[[State], State]
    start: Callable[[Key], State]
    outcome: Callable[[State], jax.Array]
    run_steps: int
    climb_steps: int
    learning_rate: float
    distance: float


RATE = 0.1
"""The step size of gradient descent into the wells."""


def well(x: jax.Array) -> jax.Array:
    """A potential with wells at -1 and 1 and a barrier at 0, where its curvature is -1."""
    return (x**2 - 1) ** 2 / 4


def discounted(first: Any, second: Any, discount: float) -> Values:
    """Mean rewards in the repeated prisoner's dilemma, in closed form.

    A player cooperates in the first round with the first probability, and later with the second
    after the other cooperated, with the third after the other defected. Mutual cooperation gives
    -1, mutual defection -2, defecting alone 0, cooperating alone -3. So the reward is
    -2 - mine + 2 · the other's frequency of cooperation, discounted; these frequencies solve two
    linear equations.
    """
    (a, p, s), (b, q, z) = first, second
    mine = (1 - discount) * a + discount * s
    others = (1 - discount) * b + discount * z
    one, two = discount * (p - s), discount * (q - z)
    x = (mine + one * others) / (1 - one * two)
    y = (others + two * mine) / (1 - one * two)
    return -2 - x + 2 * y, -2 - y + 2 * x


def iterated(x: jax.Array, y: jax.Array) -> Values:
    """The iterated prisoner's dilemma: each player has three logits, of policies that react."""
    return discounted(jax.nn.sigmoid(x), jax.nn.sigmoid(y), 0.96)


def mixture(x: jax.Array, y: jax.Array) -> Values:
    """A tenth matching pennies, whose learners circle, the rest a prisoner's dilemma.

    Each player has one logit, between always defecting and tit for tat.
    """
    p, q = jax.nn.sigmoid(x), jax.nn.sigmoid(y)
    one, two = discounted((p, p, 0.0), (q, q, 0.0), 0.6)
    match = (2 * p - 1) * (2 * q - 1)
    return 0.9 * one + 0.1 * match, 0.9 * two - 0.1 * match


def learners(values: Callable[[jax.Array, jax.Array], Values], rate: float) -> Callable:
    """Both players climb their own reward at once: no function is minimised."""

    def step(players):
        x, y = players
        mine = jax.grad(lambda t: values(t, y)[0])(x)
        others = jax.grad(lambda t: values(x, t)[1])(y)
        return x + rate * mine, y + rate * others

    return step


def _outcome(low: jax.Array, high: jax.Array) -> jax.Array:
    return jnp.where(high, 1, jnp.where(low, 0, -1))


def _cooperate(players: State) -> jax.Array:
    """Whether both cooperate (1) or defect (0) in the end, by the mean of both rewards."""
    one, two = iterated(*players)
    reward = (one + two) / 2
    return _outcome(reward < -1.7, reward > -1.4)


def _logits(scale: float, shape: tuple[int, ...]) -> Callable[[Key], State]:
    def start(key):
        x, y = scale * jax.random.normal(key, (2, *shape))
        return x, y

    return start


DYNAMICS = {
    "double well": Dynamics(
        "gradient descent into one of two wells",
        step=lambda x: x - RATE * jax.grad(well)(x),
        start=lambda key: jax.random.uniform(key, minval=-1.5, maxval=1.5),
        outcome=lambda x: _outcome(jnp.abs(x + 1) < 0.1, jnp.abs(x - 1) < 0.1),
        run_steps=200,
        climb_steps=20,
        learning_rate=0.05,
        distance=0.01,
    ),
    "mixed game": Dynamics(
        "a tenth is matching pennies",
        step=learners(mixture, 1.0),
        start=_logits(2.0, ()),
        outcome=lambda s: _outcome(jnp.maximum(*s) < -0.8, jnp.minimum(*s) > 0.8),
        run_steps=300,
        climb_steps=100,
        learning_rate=0.1,
        distance=1.0,
    ),
    "iterated dilemma": Dynamics(
        "players react to the other's last move",
        step=learners(iterated, 5.0),
        start=_logits(1.0, (3,)),
        outcome=_cooperate,
        run_steps=300,
        climb_steps=40,
        learning_rate=0.3,
        distance=1.5,
    ),
}
"""Steps, rates and distances of the climbs were chosen on starts that are not reported."""
