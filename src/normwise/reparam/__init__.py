"""Weights that are computed from others: normalized, conditioned, 1-Lipschitz, of few values.

Torch parametrizations that can be put on a model, taken off again and folded away.
"""

from normwise.reparam.conditioning import (
    ColumnConditioning,
    RowColumnConditioning,
    condition_weights,
)
from normwise.reparam.convert import (
    Conversion,
    ConvertedWeight,
    center_weight_normalize,
    reparametrize,
    weight_normalize,
    weight_standardize,
)
from normwise.reparam.folding import fold
from normwise.reparam.gains import Gain, Gains, add_gains
from normwise.reparam.layers import MeanOnlyBatchNorm, TranslatedReLU
from normwise.reparam.lipschitz import AOL, SLL, ContractiveResidual
from normwise.reparam.once import computed_once
from normwise.reparam.optimizer import WeightNormalized
from normwise.reparam.parametrizations import (
    CenteredWeightNorm,
    DividedWeight,
    Divisor,
    WeightNorm,
    WeightParametrization,
    WeightStandardization,
)
from normwise.reparam.quantized import BinaryConnect, Draw, Oscillation, StatsQ, clip_after_steps

__all__ = [
    "AOL",
    "SLL",
    "BinaryConnect",
    "CenteredWeightNorm",
    "ColumnConditioning",
    "ContractiveResidual",
    "Conversion",
    "ConvertedWeight",
    "DividedWeight",
    "Divisor",
    "Draw",
    "Gain",
    "Gains",
    "MeanOnlyBatchNorm",
    "Oscillation",
    "RowColumnConditioning",
    "StatsQ",
    "TranslatedReLU",
    "WeightNorm",
    "WeightNormalized",
    "WeightParametrization",
    "WeightStandardization",
    "add_gains",
    "center_weight_normalize",
    "clip_after_steps",
    "computed_once",
    "condition_weights",
    "fold",
    "reparametrize",
    "weight_normalize",
    "weight_standardize",
]
