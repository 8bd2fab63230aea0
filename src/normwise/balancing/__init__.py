"""The same function, better balanced; slices rescaled on purpose; merges.

The room is ``normwise.balancing`` and its main function ``normwise.balance``, so that neither name
hides the other.
"""

from normwise.balancing.biases import correct_biases
from normwise.balancing.equalizing import equalize
from normwise.balancing.factors import balance_factors, balance_lora
from normwise.balancing.least_mass import Balanced, balance
from normwise.balancing.merging import Merge, Shrink, expected_shrink, learn_gamma, merge
from normwise.balancing.online import Balance
from normwise.balancing.rounding import round_weight, rounded
from normwise.balancing.rows import (
    MaxNorm,
    adjust_logits,
    align_rows,
    class_balanced_weights,
    rescale_rows,
    simplex_etf,
    tau_normalize,
)

__all__ = [
    "Balance",
    "Balanced",
    "MaxNorm",
    "Merge",
    "Shrink",
    "adjust_logits",
    "align_rows",
    "balance",
    "balance_factors",
    "balance_lora",
    "class_balanced_weights",
    "correct_biases",
    "equalize",
    "expected_shrink",
    "learn_gamma",
    "merge",
    "rescale_rows",
    "round_weight",
    "rounded",
    "simplex_etf",
    "tau_normalize",
]
