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

# What goes around another optimizer.
WRAPPERS = {
    "tangential": lambda o, view: normwise.tangential(o, view, wd_ratio=0.3),
    "tangential, norm fixed": lambda o, view: normwise.tangential(o, view, norm="fixed"),
    "hyperball": normwise.sphere,
    "great circle": lambda o, view: normwise.sphere(o, view, path="geodesic"),
    "raw": lambda o, view: normwise.sphere(o, view, update="raw"),
    "raw with a floor": lambda o, view: normwise.sphere(o, view, update="raw", floor=1e-2),
    "exponential map": lambda o, view: normwise.sphere(o, view, update="raw", path="geodesic"),
}
