"""Bilevel optimization: an outer descent through the solution of an inner problem."""

from unrollgrad.bilevel.bloop import bloop
from unrollgrad.bilevel.solve import BilevelResult, solve
from unrollgrad.bilevel.unrolled import unrolled

__all__ = ["BilevelResult", "bloop", "solve", "unrolled"]
