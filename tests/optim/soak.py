"""Random operations on a live optimizer, against the single-tensor step of the same operations.

    python tests/optim/soak.py --operations 1000000 --seed 0

Each life of an optimizer begins with drawn weights, groups and options. Then come steps with drawn
gradients, and what programs do to optimizers between them: swapped data, casts, frozen weights,
edited groups, checkpoints, copies, exceptions. After every operation weights and states are
compared; the process must not grow.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import random
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

from optimizer_table import MAKERS

SHAPES = [(4, 4), (6, 5), (3, 2, 3, 3), (7,), (1, 8), (0, 3), (5, 40), ()]
VIEWS = ["auto", "channel", "layer", None]
# One step's rounding, relative to weights, states and updates of about 1. Of bfloat16 an entry may
# be rounded the other way.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-6}
LIFE = 500


class Fault(Exception):
    """Raised in a closure."""


class Twins:
    """A live optimizer and its reference, to which the same is done."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.name = self.random.choice(sorted(MAKERS))
        self.frozen = set()
        self.dtype = torch.float64
        first = self.draw_groups(self.random.randint(1, 3))
        self.live = MAKERS[self.name](first, **self.draw_how())
        self.reference = MAKERS[self.name](copies(first), foreach=False, fused=False)

    @property
    def both(self):
        return self.live, self.reference

    def draw_how(self):
        return self.random.choice([{}, {"fused": True}, {"fused": True}, {"foreach": True}])

    def draw_groups(self, count):
        return [{"params": self.draw_params(), **self.draw_options()} for _ in range(count)]

    def draw_params(self):
        shapes = self.random.choices(SHAPES, k=self.random.randint(1, 3))
        return [self.normal(shape).to(self.dtype).requires_grad_() for shape in shapes]

    def draw_options(self):
        options = {
            "lr": 10 ** self.random.uniform(-4, -1),
            "weight_decay": self.random.choice([0.0, 0.01, 0.5]),
            "maximize": self.random.random() < 0.1,
        }
        if self.name == "adamp":
            options["betas"] = (self.random.choice([0.0, 0.9]), self.random.choice([0.9, 0.999]))
            options["nesterov"] = self.random.random() < 0.3
        else:
            options["momentum"] = self.random.choice([0.5, 0.9])
            options["nesterov"] = self.random.random() < 0.3
        if self.name == "sgdw":
            options["variant"] = self.random.choice(["paper", "official"])
        else:
            view = self.random.choice(VIEWS)
            fixed = view in ("channel", "layer") and self.random.random() < 0.3
            options.update(view=view, norm="fixed" if fixed else "free", delta=0.3)
            options["wd_ratio"] = self.random.choice([0.1, 1.0])
        return options

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def draw_gradient(self, w):
        """Orthogonal to every channel, or so far from it that rounding does not open a gate."""
        kind = self.random.choice(["orthogonal", "aligned", "aligned", "zero", "none"])
        if kind == "none":
            return None
        if kind == "zero":
            return torch.zeros_like(w)
        g = self.normal(w.shape)
        if w.ndim > 1 and w.numel():
            rows, weights = g.flatten(1), w.detach().double().flatten(1)
            length = (weights * weights).sum(1, keepdim=True).clamp_min(1e-300)
            rows = rows - weights * (weights * rows).sum(1, keepdim=True) / length
            if kind == "aligned":
                norms = rows.norm(dim=1, keepdim=True).clamp_min(1e-3)
                rows = rows + norms * weights / length.sqrt()
            g = rows.reshape(w.shape)
        g = g.to(w.dtype)
        if kind == "aligned" and w.ndim > 1 and self.random.random() < 0.2:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        if g.numel() and self.random.random() < 0.05:
            g = torch._neg_view(g)
        return g

    def pairs(self):
        for ours, theirs in zip(self.live.param_groups, self.reference.param_groups, strict=True):
            yield from zip(ours["params"], theirs["params"], strict=True)

    def set_gradients(self):
        for i, (p, q) in enumerate(self.pairs()):
            p.grad = None if i in self.frozen else self.draw_gradient(p)
            q.grad = None if p.grad is None else p.grad.detach().clone()

    def draw_pair(self):
        return self.random.choice(list(self.pairs()))

    # Operations.

    def step(self):
        self.set_gradients()
        for optimizer in self.both:
            optimizer.step()

    def swap_data(self):
        p, q = self.draw_pair()
        how = self.random.choice(["clone", "transposed", "strides", "strided", "negative"])
        if how == "transposed" and p.ndim == 2 and p.shape[0] == p.shape[1]:
            for optimizer, w in zip(self.both, (p, q), strict=True):
                w.data = w.data.t()
                for key, value in optimizer.state.get(w, {}).items():
                    optimizer.state[w][key] = value if key == "step" else value.t()
        elif how == "strides" and p.ndim > 1:
            p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)
        elif how == "strided" and p.ndim:
            p.data = torch.stack([p.data, p.data], -1)[..., 0]
        elif how == "negative" and p.numel():
            p.data = torch._neg_view(p.data.neg())
        else:
            p.data = p.data.clone()

    def swap_state(self):
        p, _ = self.draw_pair()
        for key, value in self.live.state.get(p, {}).items():
            if value.ndim > 1 and self.random.random() < 0.5:
                value = value.transpose(0, 1).contiguous().transpose(0, 1)
            self.live.state[p][key] = value.clone(memory_format=torch.preserve_format)

    def cast(self):
        self.dtype = self.random.choice(list(TOLERANCE))
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        for optimizer, params in zip(self.both, zip(*self.pairs(), strict=True), strict=True):
            for p in params:
                p.data = p.data.to(self.dtype)
                p.grad = None
                for key, value in optimizer.state.get(p, {}).items():
                    optimizer.state[p][key] = value if key == "step" else value.to(wide)

    def freeze(self):
        count = sum(1 for _ in self.pairs())
        self.frozen = set(self.random.sample(range(count), self.random.randint(0, count // 2)))

    def edit_group(self):
        options = self.draw_options()
        which = self.random.randrange(len(self.live.param_groups))
        keys = self.random.sample(sorted(options), 2)
        if {"view", "norm"} & set(keys):
            keys += ["view", "norm"]
        # The buffer of SGDW means another thing in the other variant.
        for key in set(keys) - {"variant"}:
            for optimizer in self.both:
                value = options[key]
                if key == "view" and isinstance(value, str) and value != "auto":
                    value = as_view(value)
                optimizer.param_groups[which][key] = value

    def add_group(self):
        if len(self.live.param_groups) < 5:
            (group,) = self.draw_groups(1)
            self.live.add_param_group(group)
            (twin,) = copies([group])
            self.reference.add_param_group(twin)

    def remove_group(self):
        if len(self.live.param_groups) > 1:
            which = self.random.randrange(len(self.live.param_groups))
            for optimizer in self.both:
                for p in optimizer.param_groups.pop(which)["params"]:
                    optimizer.state.pop(p, None)
            self.frozen = set()

    def move_weight(self):
        """From one group to the end of another."""
        groups = range(len(self.live.param_groups))
        source, target = self.random.choice(groups), self.random.choice(groups)
        if self.name != "sgdw" and len(self.live.param_groups[source]["params"]) > 1:
            for optimizer in self.both:
                p = optimizer.param_groups[source]["params"].pop(0)
                optimizer.param_groups[target]["params"].append(p)

    def save_and_load(self):
        stream = io.BytesIO()
        torch.save(self.live.state_dict(), stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=True)
        if self.random.random() < 0.5:
            groups = [{"params": group["params"]} for group in self.live.param_groups]
            self.live = MAKERS[self.name](groups, **self.draw_how())
        self.live.load_state_dict(loaded)

    def copy(self):
        self.live = copy.deepcopy(self.live)

    def change_how(self):
        how = {"fused": None, "foreach": None, **self.draw_how()}
        for group in self.live.param_groups:
            group.update(how)

    def fault_in_a_closure(self):
        def closure():
            raise Fault

        for optimizer in self.both:
            try:
                optimizer.step(closure)
            except Fault:
                continue
            raise AssertionError("an exception in a closure was lost")

    def fault_in_a_step(self):
        """A sparse gradient, of the last weight, is refused before any other weight moves."""
        self.set_gradients()
        p = self.live.param_groups[-1]["params"][-1]
        before = p.grad
        if p.ndim != 2:
            return
        p.grad = torch.zeros_like(p).to_sparse()
        try:
            self.live.step()
        except RuntimeError as error:
            if "sparse" not in str(error):
                raise
        else:
            raise AssertionError("a sparse gradient was taken")
        finally:
            p.grad = before
        # A weight that has not yet been stepped may have got its state.

    def refused_group(self):
        count = len(self.live.param_groups)
        try:
            self.live.add_param_group({"params": self.draw_params(), "weight_dcay": 0.1})
        except ValueError:
            assert len(self.live.param_groups) == count
        else:
            raise AssertionError("a misspelt option was taken")

    OPERATIONS = {  # noqa: RUF012 -- never written to
        step: 60,
        swap_data: 6,
        swap_state: 4,
        cast: 1,
        freeze: 3,
        edit_group: 6,
        add_group: 2,
        remove_group: 2,
        move_weight: 2,
        save_and_load: 2,
        copy: 2,
        change_how: 2,
        fault_in_a_closure: 2,
        fault_in_a_step: 2,
        refused_group: 1,
    }

    def operate(self):
        """Do one drawn operation; return its name, with the largest difference in tolerances."""
        operations, weights = zip(*self.OPERATIONS.items(), strict=True)
        (operation,) = self.random.choices(operations, weights)
        with torch.no_grad():
            operation(self)
            return operation.__name__, self.compare()

    def compare(self):
        """The largest difference, in tolerances; then the reference goes on from the live one."""
        worst = 0.0
        for p, q in self.pairs():
            ours, theirs = self.live.state.get(p, {}), self.reference.state.get(q, {})
            tensors = [(p, q, TOLERANCE[self.dtype])]
            for key, value in theirs.items():
                exact = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
                tensors.append((ours[key], value, TOLERANCE[exact]))
            for a, b, tolerance in tensors:
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                if a.numel():
                    scale = 1 + b.abs().max().double()
                    difference = (a.double() - b.double()).abs().max() / scale / tolerance
                    worst = max(worst, float(difference.nan_to_num(float("inf"))))
                    b.copy_(a)
        return worst


def as_view(spelling):
    from normwise import View

    return View.parse(spelling)


def copies(groups):
    """Groups of equal options, with copies of their weights."""
    return [
        {**g, "params": [p.detach().clone().requires_grad_() for p in g["params"]]} for g in groups
    ]


def soak(operations, seed, report=None):
    """Do so many operations, and raise AssertionError where something differs.

    Args:
        operations: how many.
        seed: of all that is drawn; a life can be repeated from its own, which the error names.
        report: called with the number of operations done after every life (default: None).
    """
    done = 0
    life = seed * 1_000_003
    while done < operations:
        twins = Twins(life)
        history = []
        for _ in range(min(LIFE, operations - done)):
            name, difference = twins.operate()
            history.append(name)
            if not difference <= 1:
                raise AssertionError(
                    f"after {history[-6:]} in life {life} of {twins.name} ({twins.dtype}), "
                    f"operation {len(history)}, the difference is {difference:.3g} tolerances"
                )
            done += 1
        life += 1
        if report is not None:
            report(done)


def resident_bytes():
    """The memory of this process that is in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20_000, help="operations between two lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, sizes = time.monotonic(), []

    def report(done):
        if done % options.every == 0:
            sizes.append(resident_bytes())
            spent = time.monotonic() - start
            print(f"{done} operations, {spent:.0f} s, {sizes[-1] / 2**20:.1f} MiB", flush=True)

    soak(options.operations, options.seed, report)
    growth = (sizes[-1] - sizes[len(sizes) // 5]) / 2**20 if len(sizes) > 1 else 0.0
    print(f"no difference; memory grew by {growth:.1f} MiB in the last four fifths")
    return 1 if growth > 16 else 0


if __name__ == "__main__":
    sys.exit(main())
