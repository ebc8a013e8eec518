"""The registry of stochastic bilevel algorithms, which feeds the tests and the experiments."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from unrollgrad.bilevel.blocks import bsvrb
from unrollgrad.bilevel.double_loop import amigo, bsa, fsla, stocbio, ttsa
from unrollgrad.bilevel.first_order import bome, f2sa, penalty
from unrollgrad.bilevel.momentum import mrbo, sustain
from unrollgrad.bilevel.single_loop import soba
from unrollgrad.bilevel.variance_reduced import ma_soba, saba, spaba, srba
from unrollgrad.types import GradientEstimator, Numeric

__all__ = ["Row"]


class Row(NamedTuple):
    """An algorithm's row in the manual, and how to build it from common settings.

    Attributes:
        factory: ``factory(outer, inner, *, ...)``.
        gradients: Cost of a call in gradients of one batch, with N inner steps, K terms or linear
            steps: a gradient 1, products with H and B from one vjp 2, one of them alone 2.
        memory: Numbers kept, with d params, p thetas, n and m batches of the inner and outer data.
        rate: Calls until the squared norm of the hypergradient is below epsilon, as published.
        paper: The source.
        blocks: Whether the losses take a block as their fourth argument.
        finite: Whether both data sets must be finite sums.
    """

    factory: Callable[..., GradientEstimator]
    gradients: str
    memory: str
    rate: str
    paper: str
    blocks: bool = False
    finite: bool = False

    def takes(self, setting: str) -> bool:
        """Returns whether the factory has this keyword."""
        return setting in inspect.signature(self.factory).parameters

    def build(
        self,
        outer: Callable[..., Numeric],
        inner: Callable[..., Numeric],
        **settings: Any,
    ) -> GradientEstimator:
        """Calls the factory with the settings that it takes."""
        taken = {k: v for k, v in settings.items() if self.takes(k)}
        return self.factory(outer, inner, **taken)


REGISTRY: dict[str, Row] = {
    "soba": Row(
        soba,
        gradients="4",
        memory="2d + 2p",
        rate="O(eps^-2 log)",
        paper="Dagréou et al. 2022",
    ),
    "ma_soba": Row(
        ma_soba,
        gradients="4",
        memory="2d + 3p",
        rate="O(eps^-2)",
        paper="Chen, Xiao and Balasubramanian 2024",
    ),
    "saba": Row(
        saba,
        gradients="4",
        memory="(n + 2)(2d + p) + (m + 2)(d + p)",
        rate="O(eps^-1), linear under PL",
        paper="Dagréou et al. 2022",
        finite=True,
    ),
    "srba": Row(
        srba,
        gradients="8, and 3n + m every period",
        memory="6d + 4p",
        rate="O((n + m)^1/2 eps^-1)",
        paper="Dagréou et al. 2024",
    ),
    "spaba": Row(
        spaba,
        gradients="8, and 3n + m with the probability of a pass",
        memory="6d + 4p",
        rate="O((n + m)^1/2 eps^-1), or O(eps^-3/2)",
        paper="Chu et al. 2024",
    ),
    "fsla": Row(
        fsla,
        gradients="10",
        memory="4d + 4p",
        rate="O(eps^-2)",
        paper="Li, Gu and Huang 2022",
    ),
    "stocbio": Row(
        stocbio,
        gradients="N + 2K + 3",
        memory="2d + 2p",
        rate="O(eps^-2 log)",
        paper="Ji, Yang and Liang 2021",
    ),
    "amigo": Row(
        amigo,
        gradients="N + 2K + 3",
        memory="2d + 2p",
        rate="O(eps^-2)",
        paper="Arbel and Mairal 2022",
    ),
    "bsa": Row(
        bsa,
        gradients="N + K + 2 on average",
        memory="2d + 2p",
        rate="O(eps^-2) outer, O(eps^-3) inner",
        paper="Ghadimi and Wang 2018",
    ),
    "ttsa": Row(
        ttsa,
        gradients="K + 3 on average",
        memory="2d + 2p",
        rate="O(eps^-5/2 log)",
        paper="Hong et al. 2023",
    ),
    "mrbo": Row(
        mrbo,
        gradients="4K + 8",
        memory="4d + 4p",
        rate="O(eps^-3/2 log)",
        paper="Yang, Ji and Liang 2021",
    ),
    "sustain": Row(
        sustain,
        gradients="2K + 6 on average",
        memory="4d + 4p",
        rate="O(eps^-3/2 log)",
        paper="Khanduri et al. 2021",
    ),
    "f2sa": Row(
        f2sa,
        gradients="3N + 3",
        memory="3d + 2p",
        rate="O(eps^-7/2)",
        paper="Kwon et al. 2023",
    ),
    "bome": Row(
        bome,
        gradients="N + 3",
        memory="3d + 2p",
        rate="of the KKT residual, K^-1/4",
        paper="Liu et al. 2022",
    ),
    "penalty": Row(
        penalty,
        gradients="N + 3; of the gradient 5",
        memory="3d + 2p",
        rate="O(eps^-1), with exact gradients",
        paper="Shen and Chen 2023",
    ),
    "bsvrb": Row(
        bsvrb,
        gradients="8 per sampled block",
        memory="4d per block, 3p",
        rate="O(eps^-3/2)",
        paper="Hu et al. 2023",
        blocks=True,
    ),
}
