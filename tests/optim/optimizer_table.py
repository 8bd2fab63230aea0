"""One table of our optimizers, for all tests of them."""

import normwise

# Options with which every part of a step does something.
OPTIONS = {
    "adamp": {"lr": 1e-2, "weight_decay": 0.1},
    "sgdp": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "sgdw": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
}
CLASSES = {"adamp": normwise.AdamP, "sgdp": normwise.SGDP, "sgdw": normwise.SGDW}
PROJECTING = ("adamp", "sgdp")


def maker(name):
    return lambda params, **options: CLASSES[name](params, **{**OPTIONS[name], **options})


MAKERS = {name: maker(name) for name in CLASSES}
