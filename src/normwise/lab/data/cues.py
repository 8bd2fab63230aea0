"""Images whose shape is that of one class and whose texture is that of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate
from normwise.lab.data.sounds import read_npz

__all__ = ["CueConflict", "cue_conflict"]


@dataclass(frozen=True)
class CueConflict:
    """The stimuli of Geirhos et al. (ICLR 2019), for testing only.

    Args:
        images: shape ``(N, 3, 64, 64)``, uint8.
        shape: the class of the shape, shape ``(N,)``, int64.
        texture: the class of the texture.
        classes: what the classes are.
    """

    images: npt.NDArray[np.uint8]
    shape: npt.NDArray[np.int64]
    texture: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def cue_conflict(root: Path) -> CueConflict:
    """The 1,280 stimuli at 64×64 pixels, from ``cue_conflict_64.npz``."""
    name = "cue_conflict_64.npz"
    path = locate(root, "cue_conflict", ("cue_conflict", "."), name) / name
    content = read_npz(path, ("images", "shape", "texture", "classes"))
    images, count = content["images"], len(content["shape"])
    if images.dtype != np.uint8 or images.shape != (count, 64, 64, 3):
        raise DataError(f"{path} has images of shape {images.shape}; must be (N, 64, 64, 3)")
    return CueConflict(
        np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.uint8),
        content["shape"].astype(np.int64),
        content["texture"].astype(np.int64),
        tuple(map(str, content["classes"])),
    )
