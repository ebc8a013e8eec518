"""Samplers of diffusion and flow models as inner loops, and reward gradients through them."""

from unrollgrad.samplers._step import SamplerState
from unrollgrad.samplers.cutoffs import Cutoff, alignprop_cutoff, cutoff
from unrollgrad.samplers.diffusion import ddim
from unrollgrad.samplers.flows import flow
from unrollgrad.samplers.matching import adjoint_matching
from unrollgrad.samplers.networks import LowRank, guided, lora
from unrollgrad.samplers.sampling import inverse, sample
from unrollgrad.samplers.schedules import tabulated, vp
from unrollgrad.samplers.truncated import draft_lv, skip_path

__all__ = [
    "Cutoff",
    "LowRank",
    "SamplerState",
    "adjoint_matching",
    "alignprop_cutoff",
    "cutoff",
    "ddim",
    "draft_lv",
    "flow",
    "guided",
    "inverse",
    "lora",
    "sample",
    "skip_path",
    "tabulated",
    "vp",
]
