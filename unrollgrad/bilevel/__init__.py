"""Bilevel optimization: an outer descent through the solution of an inner problem."""

from unrollgrad.bilevel.advice import advice
from unrollgrad.bilevel.blocks import bsvrb
from unrollgrad.bilevel.bloop import bloop
from unrollgrad.bilevel.data import FiniteSum, finite_sum
from unrollgrad.bilevel.directions import moving_average, page, sarah, sgd, storm
from unrollgrad.bilevel.double_loop import amigo, bsa, fsla, stocbio, ttsa
from unrollgrad.bilevel.first_order import bome, f2sa, penalty
from unrollgrad.bilevel.momentum import mrbo, sustain
from unrollgrad.bilevel.registry import REGISTRY, Row
from unrollgrad.bilevel.saga import saga
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.solve import BilevelResult, solve
from unrollgrad.bilevel.unrolled import unrolled
from unrollgrad.bilevel.variance_reduced import ma_soba, saba, spaba, srba
from unrollgrad.types import BilevelInfo

__all__ = [
    "REGISTRY",
    "BilevelInfo",
    "BilevelResult",
    "FiniteSum",
    "Row",
    "advice",
    "amigo",
    "bloop",
    "bome",
    "bsa",
    "bsvrb",
    "f2sa",
    "finite_sum",
    "fsla",
    "ma_soba",
    "moving_average",
    "mrbo",
    "page",
    "penalty",
    "saba",
    "saga",
    "sarah",
    "sgd",
    "soba",
    "solve",
    "spaba",
    "srba",
    "stocbio",
    "storm",
    "sustain",
    "ttsa",
    "unrolled",
]
