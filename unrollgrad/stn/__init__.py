"""Self-tuning networks: hyperparameters tuned in one training run, by a best response learned."""

from unrollgrad.stn.losses import SplitLoss
from unrollgrad.stn.networks import SelfTuning, delta_stn, stn
from unrollgrad.stn.response import Response, linear, scaled_rows
from unrollgrad.stn.schedule import Schedule, schedule
from unrollgrad.types import StnInfo

__all__ = [
    "Response",
    "Schedule",
    "SelfTuning",
    "SplitLoss",
    "StnInfo",
    "delta_stn",
    "linear",
    "scaled_rows",
    "schedule",
    "stn",
]
