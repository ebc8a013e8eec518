"""Bilevel optimization: an outer descent on the solution of an inner one."""

from unrollgrad.bilevel.solve import BilevelResult, solve
from unrollgrad.bilevel.unrolled import unrolled

__all__ = ["BilevelResult", "solve", "unrolled"]
