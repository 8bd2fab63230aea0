"""Networks of the lab, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks.bagnet import bagnet18
from normwise.lab.networks.centernet import centernet_body
from normwise.lab.networks.convolutional import (
    convnet,
    harmonic,
    mobilenet,
    resnet,
    resnext29,
    se_resnext29,
    shufflenet,
    wide_resnet,
)
from normwise.lab.trust import check_trusted, is_code

__all__ = ["NETWORKS", "build"]

NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    **{f"resnet{depth}": resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"wide_resnet{depth}": wide_resnet(depth) for depth in (10, 16, 28, 34)},
    "resnext29": resnext29,
    "se_resnext29": se_resnext29,
    "mobilenet": mobilenet,
    "shufflenet": shufflenet,
    # By the bands and the highest frequency of the spectra: of recordings of 8 and of 16 kHz.
    "harmonic": harmonic(40, 4000.0),
    "harmonic64": harmonic(64, 8000.0),
    "convnet": convnet,
    "centernet_body": centernet_body,
    "bagnet18": bagnet18,
}


def build(name: str, channels: int, classes: int, width: int) -> nn.Module:
    """A network for images, with weights drawn from torch's global generator.

    Args:
        name: one in ``NETWORKS``, or ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, whose
            number of classes is set and whose width is the name's own. ``MODULE:FACTORY`` is code
            of the user's, which must be trusted.
        channels: of the images.
        classes: how many logits.
        width: channels of the first stage.

    Raises:
        UsageError: for a name that means nothing, or a library that is not installed.
    """
    if name in NETWORKS:
        return NETWORKS[name](channels, classes, width)
    library, colon, _ = name.partition(":")
    if not colon:
        raise UsageError(f"unknown network {name!r}: {nearest(name, NETWORKS)}")
    if is_code(name):
        check_trusted(name)
    from normwise.invariance.sources import load

    settings = {
        "timm": {"num_classes": classes, "in_chans": channels},
        "torchvision": {"num_classes": classes},
        "hf": {"num_labels": classes, "num_channels": channels},
    }
    try:
        model, _ = load(name, settings.get(library, {}))
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    return _Logits(model)


class _Logits(nn.Module):
    """A network of another library, whose output is made its logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        logits: Tensor = getattr(out, "logits", out)
        return logits
