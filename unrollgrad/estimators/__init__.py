"""The estimators, each a factory of a problem and its settings, and the registry of them."""

from unrollgrad.estimators.backprop import bptt, tbptt
from unrollgrad.estimators.evolution import es_single, full_es, gpes, pes, truncated_es
from unrollgrad.estimators.forward import dodge, forward_mode
from unrollgrad.estimators.hybrid import pes_analytic, pes_analytic_replacement, reparameterized_es
from unrollgrad.estimators.registry import REGISTRY, Row
from unrollgrad.estimators.uoro import uoro

__all__ = [
    "REGISTRY",
    "Row",
    "bptt",
    "dodge",
    "es_single",
    "forward_mode",
    "full_es",
    "gpes",
    "pes",
    "pes_analytic",
    "pes_analytic_replacement",
    "reparameterized_es",
    "tbptt",
    "truncated_es",
    "uoro",
]
