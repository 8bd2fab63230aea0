"""Omniglot: drawings of 1623 characters, and the split into known and unseen ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate

__all__ = ["Drawings", "omniglot"]


@dataclass(frozen=True)
class Drawings:
    """Drawings of characters, each a class.

    Args:
        images: shape ``(N, 1, size, size)``, uint8, ink 255.
        labels: shape ``(N,)``, int64, from 0.
        names: ``ALPHABET/CHARACTER`` of each label.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]


def omniglot(root: Path, part: str, size: int = 28, characters: int | None = None) -> Drawings:
    """One part of Omniglot, 20 drawings a character.

    Args:
        root: where the data sets are.
        part: ``"background"`` (964 characters, to learn from) or ``"evaluation"`` (659).
        size: pixels a side; the drawings have 105 (default: 28).
        characters: how many are used, evenly spread over the alphabets (default: all).

    Raises:
        DataError: if a drawing cannot be decoded, has another size, or a character has not 20.
    """
    from PIL import Image

    folder = locate(root, "omniglot", ("omniglot", "omniglot-py"), f"images_{part}")
    found = sorted(p for p in (folder / f"images_{part}").glob("*/*") if p.is_dir())
    if not found:
        raise DataError(f"{folder / f'images_{part}'} has no ALPHABET/CHARACTER folders")
    if characters is not None:
        found = [found[i] for i in np.linspace(0, len(found) - 1, characters).round().astype(int)]
    images, labels = [], []
    for label, character in enumerate(found):
        files = sorted(character.glob("*.png"))
        if len(files) != 20:
            raise DataError(f"{character} has {len(files)} drawings and should have 20")
        for path in files:
            try:
                with Image.open(path) as image:
                    if image.size != (105, 105):
                        raise DataError(f"{path} has {image.size} pixels and should have 105 × 105")
                    grey = image.convert("L").resize((size, size), Image.Resampling.BOX)
            except (OSError, SyntaxError) as error:
                raise DataError(f"{path} cannot be decoded: {error}") from None
            images.append(255 - np.asarray(grey))
            labels.append(label)
    return Drawings(
        np.stack(images)[:, None],
        np.array(labels, np.int64),
        tuple(f"{path.parent.name}/{path.name}" for path in found),
    )
