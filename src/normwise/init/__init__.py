"""Where training starts: from data, from Hadamard matrices, from a larger network."""

from normwise.init.data_dependent import data_dependent_init
from normwise.init.selection import selected_indices, weight_selection
from normwise.init.zero import hadamard, zero_, zero_init

__all__ = [
    "data_dependent_init",
    "hadamard",
    "selected_indices",
    "weight_selection",
    "zero_",
    "zero_init",
]
