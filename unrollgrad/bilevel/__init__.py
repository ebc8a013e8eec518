"""Bilevel optimization: an outer descent through the solution of an inner problem."""

from unrollgrad.bilevel.data import FiniteSum, finite_sum
from unrollgrad.bilevel.directions import moving_average, page, sarah, sgd, storm
from unrollgrad.bilevel.saga import saga
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.solve import BilevelResult, solve
from unrollgrad.bilevel.unrolled import unrolled

__all__ = [
    "BilevelResult",
    "FiniteSum",
    "finite_sum",
    "moving_average",
    "page",
    "saga",
    "sarah",
    "sgd",
    "soba",
    "solve",
    "storm",
    "unrolled",
]
