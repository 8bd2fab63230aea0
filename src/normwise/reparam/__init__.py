"""Weight normalization, centered weight normalization and weight standardization.

Torch parametrizations that can be put on a model, taken off again and folded away.
"""

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
from normwise.reparam.once import computed_once
from normwise.reparam.parametrizations import (
    CenteredWeightNorm,
    Divisor,
    WeightNorm,
    WeightParametrization,
    WeightStandardization,
)
from normwise.reparam.start import MeanOnlyBatchNorm, data_dependent_start

__all__ = [
    "CenteredWeightNorm",
    "Conversion",
    "ConvertedWeight",
    "Divisor",
    "Gain",
    "Gains",
    "MeanOnlyBatchNorm",
    "WeightNorm",
    "WeightParametrization",
    "WeightStandardization",
    "add_gains",
    "center_weight_normalize",
    "computed_once",
    "data_dependent_start",
    "fold",
    "reparametrize",
    "weight_normalize",
    "weight_standardize",
]
