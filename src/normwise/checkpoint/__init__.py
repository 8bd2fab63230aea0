"""What a checkpoint's weights alone say about how it was trained: :func:`examine`."""

from normwise.checkpoint.examination import State, TensorNorms
from normwise.checkpoint.report import CheckpointReport, examine
from normwise.checkpoint.stored import CheckpointError

__all__ = ["CheckpointError", "CheckpointReport", "State", "TensorNorms", "examine"]
