"""The derivatives of the two losses on one batch each, from which every direction is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._core.dtypes import wide
from unrollgrad.bilevel import data
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Key, Numeric, Theta


class Losses(NamedTuple):
    """The bilevel problem.

    Attributes:
        outer: ``outer(params, theta, batch) -> scalar``, the mean over the batch.
        inner: ``inner(params, theta, batch) -> scalar``, the mean over the batch.
        outer_data: The batches of outer: ``finite_sum(...)``, or ``sample_batch(key)``.
        inner_data: The batches of inner.
    """

    outer: Callable[..., Numeric]
    inner: Callable[..., Numeric]
    outer_data: data.Source
    inner_data: data.Source


class Point(NamedTuple):
    """Where the three variables stand.

    Attributes:
        params: The inner variable.
        v: The solution of the linear system, H v = d outer / d params.
        theta: The outer variable.
    """

    params: Any
    v: Any
    theta: Any


class Directions(NamedTuple):
    """Directions of descent for the three variables, in at least float32; None for one left out.

    Attributes:
        params: d inner / d params.
        v: H v - d outer / d params.
        theta: d outer / d theta - B^T v.
    """

    params: Any
    v: Any
    theta: Any


class InnerParts(NamedTuple):
    """What the directions need of inner: its gradient, H v and B^T v."""

    gradient: Any
    product: Any
    mixed: Any


class OuterParts(NamedTuple):
    """What the directions need of outer: its gradients with respect to params and theta."""

    params: Any
    theta: Any


class Places(NamedTuple):
    """The places in both data sets."""

    inner: data.Place
    outer: data.Place


_INNER, _OUTER = 1, 2  # streams of an episode's key
INNER_COST, OUTER_COST, PRODUCT_COST = 3, 1, 2
"""Gradient-equivalents of ``inner_parts``, ``outer_parts``, and of one product with H or B."""


def start(losses: Losses) -> Places:
    """The places before the first batches."""
    return Places(data.start(losses.inner_data), data.start(losses.outer_data))


def draw_inner(losses: Losses, key: Key, places: Places) -> tuple[Any, Places]:
    """The next batch of inner; ``key`` is the episode's."""
    token, place = data.draw(losses.inner_data, key, places.inner, _INNER)
    return token, places._replace(inner=place)


def draw_outer(losses: Losses, key: Key, places: Places) -> tuple[Any, Places]:
    """The next batch of outer."""
    token, place = data.draw(losses.outer_data, key, places.outer, _OUTER)
    return token, places._replace(outer=place)


def widened(tree: ArrayTree) -> Any:
    """Every leaf in at least float32."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def weighted(tree: ArrayTree, weight: Numeric) -> Any:
    """The tree in at least float32, times the weight of its batch."""
    tree = widened(tree)
    return tree if isinstance(weight, float) and weight == 1 else trees.scale(weight, tree)


def inner_parts(losses: Losses, point: Point, token: Any) -> InnerParts:
    """One gradient of inner, and the products with H and B from one ``vjp`` of it."""

    def parts(batch):
        def gradient(params, theta):
            return jax.grad(losses.inner)(params, theta, batch)

        value, pull = jax.vjp(gradient, point.params, point.theta)
        return value, *pull(trees.narrow(point.v, point.params))

    return InnerParts(*weighted(*data.on_batch(losses.inner_data, token, parts)))


def inner_gradient(losses: Losses, params: ArrayTree, theta: Theta, token: Any) -> Any:
    """D inner / d params."""

    def gradient(batch):
        return jax.grad(losses.inner)(params, theta, batch)

    return weighted(*data.on_batch(losses.inner_data, token, gradient))


def hessian_product(losses: Losses, point: Point, token: Any) -> Any:
    """H v."""

    def product(batch):
        def gradient(params):
            return jax.grad(losses.inner)(params, point.theta, batch)

        return jax.jvp(gradient, (point.params,), (trees.narrow(point.v, point.params),))[1]

    return weighted(*data.on_batch(losses.inner_data, token, product))


def mixed_product(losses: Losses, point: Point, token: Any) -> Any:
    """B^T v."""

    def product(batch):
        def gradient(params):
            return jax.grad(losses.inner, argnums=1)(params, point.theta, batch)

        return jax.jvp(gradient, (point.params,), (trees.narrow(point.v, point.params),))[1]

    return weighted(*data.on_batch(losses.inner_data, token, product))


def outer_parts(losses: Losses, point: Point, token: Any) -> tuple[jax.Array, OuterParts]:
    """Outer itself, and its two gradients."""

    def parts(batch):
        return jax.value_and_grad(losses.outer, argnums=(0, 1))(point.params, point.theta, batch)

    (loss, gradients), weight = data.on_batch(losses.outer_data, token, parts)
    loss = jnp.asarray(loss)
    return loss.astype(wide(loss.dtype)), OuterParts(*weighted(gradients, weight))
