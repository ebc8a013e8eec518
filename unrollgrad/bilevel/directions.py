"""Estimators of the directions: how samples of a batch become what the variables follow.

Each is a pair of functions on a ``Field``, as a noise law is a pair of functions: ``sgd``,
``moving_average``, ``sarah``, ``page`` and ``storm`` here, ``saga`` in a file of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad.bilevel import _field, data
from unrollgrad.bilevel._field import Field, Sample
from unrollgrad.bilevel._losses import Places, Point, widened
from unrollgrad.implicit import trees
from unrollgrad.types import Key, Numeric

__all__ = [
    "Average",
    "Estimator",
    "Recursion",
    "check_finite",
    "moving_average",
    "page",
    "sarah",
    "sgd",
    "storm",
]

_COIN = 3  # folded into an episode's key

Rate = float | Callable[[jax.Array], Numeric]
"""A number, or a function of the number of steps done, such as an optax schedule."""


class Estimator(NamedTuple):
    """A law that turns samples into directions.

    Attributes:
        label: Its name and settings, which states carry.
        init: ``init(field, point) -> memory``.
        update: ``update(field, key, point, places, memory) -> (Sample, places, memory)`` with the
            episode's key.
    """

    label: str
    init: Callable[[Field, Point], Any]
    update: Callable[[Field, Key, Point, Places, Any], tuple[Sample, Places, Any]]


def sgd() -> Estimator:
    """The sample itself: no memory, and a noise floor that is proportional to the rates.

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.sgd().label
        'sgd()'
    """

    def update(field, key, point, places, memory):
        tokens, places = field.draw(key, places)
        return field.value(point, tokens), places, memory

    return Estimator("sgd()", lambda field, point: None, update)


class Average(NamedTuple):
    """The memory of ``moving_average``: int32, the steps done; and theta's averaged direction."""

    count: jax.Array
    theta: Any


def moving_average(beta: Rate) -> Estimator:
    """An exponential average of theta's direction alone; the other two are samples.

    d = (1 - beta) d + beta sample, which begins with the first sample. Cost as ``sgd``; memory: one
    theta. It lets theta use a rate that does not vanish against the noise of v (MA-SOBA).

    Args:
        beta: The weight of the new sample, in (0, 1], or a function of the number of steps done.

    Raises:
        ValueError: If a number is outside (0, 1].

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.moving_average(0.1).label
        'moving_average(0.1)'

    References:
        Chen, Xiao and Balasubramanian, Optimal algorithms for stochastic bilevel optimization under
        relaxed smoothness conditions, JMLR 2024, arXiv:2306.12067.
    """
    _check_rate("beta", beta, least=0.0, open_below=True)

    def init(field, point):
        return Average(jnp.zeros((), jnp.int32), widened(jax.tree.map(jnp.zeros_like, point.theta)))

    def update(field, key, point, places, memory):
        tokens, places = field.draw(key, places)
        found = field.value(point, tokens)
        weight = jnp.where(memory.count == 0, 1.0, _at(beta, memory.count))
        step = trees.add(found.directions.theta, memory.theta, -1)
        theta = trees.add(memory.theta, step, weight)
        directions = found.directions._replace(theta=theta)
        return found._replace(directions=directions), places, Average(memory.count + 1, theta)

    return Estimator(f"moving_average({_name(beta)})", init, update)


class Recursion(NamedTuple):
    """The memory of ``sarah``, ``page`` and ``storm``.

    Attributes:
        count: int32, the steps done.
        last: The point of the step before.
        directions: The directions of the step before.
    """

    count: jax.Array
    last: Point
    directions: Any


class _Refresh(NamedTuple):
    """When a recursion begins again, from how many draws, and what it forgets in between."""

    when: Callable[[Key, jax.Array], jax.Array]
    batches: int | None  # None: a pass over all data
    forget: Rate


def sarah(period: int, batches: int | None = None) -> Estimator:
    """SARAH: every ``period`` steps a pass over the data, in between differences on one batch.

    d = d + sample(now) - sample(a step ago), both on the same batch. On a finite sum with
    constant rates the noise vanishes with the steps' length, so that the error does too (SRBA).

    Cost per step: two samples, and a pass over all batches every ``period`` steps. Memory: the last
    point and its directions.

    Args:
        period: Steps between passes; about (n + m) / batch size.
        batches: In place of the pass, the mean over so many fresh draws. Endless data need it.

    Raises:
        ValueError: If a number is not positive; in ``init``, if ``batches`` is None and the data
            are endless.

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.sarah(16).label
        'sarah(period=16, batches=None)'

    References:
        Dagréou, Moreau, Vaiter and Ablin, A lower bound and a near-optimal algorithm for bilevel
        empirical risk minimization, AISTATS 2024, arXiv:2302.08766.
    """
    period = arguments.positive_int("period", period)
    refresh = _Refresh(lambda key, count: count % period == 0, batches, 0.0)
    return _recursive(f"sarah(period={period}, batches={batches})", refresh)


def page(probability: float, batches: int | None = None) -> Estimator:
    """PAGE: ``sarah`` with a coin in place of the period.

    With the given probability the directions begin again from a pass over all data (or ``batches``
    fresh draws), else d = d + sample(now) - sample(a step ago). The first step begins.

    Cost per step on average: two samples + probability times a pass. Memory as ``sarah``.

    Args:
        probability: The probability of a pass, in (0, 1]; about batch size / (n + m).
        batches: As in ``sarah``.

    Raises:
        ValueError: If the probability is outside (0, 1], or ``batches`` is not positive; in
            ``init``, if ``batches`` is None and the data are endless.

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.page(0.1).label
        'page(probability=0.1, batches=None)'

    References:
        Chu, Xu, Yao and Zhang, SPABA, ICML 2024, arXiv:2405.18777. Li et al., PAGE, ICML 2021.
    """
    _check_rate("probability", probability, least=0.0, open_below=True)

    def when(key, count):
        draw = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _COIN), count))
        return (count == 0) | (draw < probability)

    return _recursive(
        f"page(probability={probability}, batches={batches})", _Refresh(when, batches, 0.0)
    )


def storm(
    eta: Rate = lambda k: 0.5 / (k + 1.0) ** (2 / 3), *, batches: int | None = 1
) -> Estimator:
    """STORM: a recursion that forgets, and never begins again.

    d = sample(now) + (1 - eta) (d - sample(a step ago)), both on the same batch; it begins with the
    first sample. With eta = 1 it is ``sgd``. With 0 < eta < 1 fixed, the error has a floor. With
    eta = 0 it is a difference recursion whose errors stay forever, so begin with a pass
    (``batches=None``): on a finite sum it then has no floor if the differences have no noise, which
    takes batches of equal size with equal Hessians and mixed derivatives (``saga``, ``sarah`` and
    ``page`` do not need that).

    Cost per step: two samples. Memory: the last point and its directions.

    Args:
        eta: How much of the past is forgotten, in [0, 1], or a function of the number of steps k;
            0.5 / (k + 1)^(2/3) by default.
        batches: The number of draws in the first direction; None: a pass over all data.

    Raises:
        ValueError: If a number is outside [0, 1], or ``batches`` is not positive; in ``init``, if
            ``batches`` is None and the data are endless.

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.storm(0.1).label
        'storm(eta=0.1, batches=1)'

    References:
        Cutkosky and Orabona, NeurIPS 2019. Yang, Ji and Liang, Provably faster algorithms for
        bilevel optimization, NeurIPS 2021, arXiv:2106.04692.
    """
    _check_rate("eta", eta, least=0.0)
    refresh = _Refresh(lambda key, count: count == 0, batches, eta)
    return _recursive(f"storm(eta={_name(eta)}, batches={batches})", refresh)


def _recursive(label: str, refresh: _Refresh) -> Estimator:
    """A recursion of differences; ``refresh`` says when it begins again."""
    batches = refresh.batches
    if batches is not None:
        arguments.positive_int("batches", batches)

    def init(field, point):
        if batches is None:
            check_finite(field, label)
        return Recursion(jnp.zeros((), jnp.int32), point, field.zeros(point))

    def update(field, key, point, places, memory):
        again = refresh.when(key, memory.count)
        tokens, places = field.draw(key, places)
        new, old = field.value(point, tokens), field.value(memory.last, tokens)
        keep = 1 - _at(refresh.forget, memory.count)
        moved = trees.add(memory.directions, old.directions, -1)
        moved = trees.add(new.directions, moved, keep)
        extra, begun = jnp.int32(0), new.directions
        if batches is None:
            begun, extra = _field.whole(field, point, again)
        elif batches > 1:
            times = jnp.where(again, batches, 0)
            begun, extra, places = _field.several(field, key, point, places, times, batches)
        directions = jax.tree.map(lambda a, b: jnp.where(again, a, b), begun, moved)
        cost = new.gradients + old.gradients + extra
        found = new._replace(directions=directions, gradients=cost)
        return found, places, Recursion(memory.count + 1, point, directions)

    return Estimator(label, init, update)


def check_finite(field: Field, label: str) -> None:
    """Raises ValueError unless the field is a finite sum's, and linear in its parts."""
    if field.losses is None:
        raise ValueError(
            f"`{label}` needs passes over the data, and directions that are means over the rows; a "
            "Neumann series is not. Use storm(eta) or moving_average(beta), or give `batches`."
        )
    for name, source in (
        ("outer_data", field.losses.outer_data),
        ("inner_data", field.losses.inner_data),
    ):
        if not isinstance(source, data.FiniteSum):
            raise ValueError(
                f"`{label}` needs passes over the data, but `{name}` is an endless sampler. Use "
                "bilevel.finite_sum(arrays, batch_size), or sarah, page or storm with `batches`."
            )


def _at(rate: Rate, count: jax.Array) -> Numeric:
    return rate(count.astype(jnp.float32)) if callable(rate) else rate


def _name(rate: Rate) -> str:
    return "schedule" if callable(rate) else str(rate)


def _check_rate(name: str, rate: Rate, least: float, open_below: bool = False) -> None:
    if callable(rate):
        return
    value = arguments.number(name, rate)
    inside = (value > least if open_below else value >= least) and value <= 1
    if not inside:
        bracket = "(" if open_below else "["
        raise ValueError(f"`{name}` must be in {bracket}{least:g}, 1]; got {rate}.")
