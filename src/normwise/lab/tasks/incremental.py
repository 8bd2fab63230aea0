"""Class-incremental learning: classes come in groups, a few examples of earlier ones are kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.balancing import align_rows
from normwise.lab.checks import within
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.classification import Classification, ClassificationOptions
from normwise.lab.tasks.problem import Evaluation, Metric

__all__ = ["Incremental", "IncrementalOptions", "distillation", "herded"]

METRICS = (
    Metric("accuracy", "test accuracy after the last group", "%", 100.0),
    Metric("earlier", "of it, on earlier groups", "%", 100.0),
    Metric("latest", "of it, on the last group", "%", 100.0),
    Metric("average", "test accuracy, mean over the ends of groups", "%", 100.0),
)
KEPT = ("first", "herding")
_PART = 500


@dataclass(frozen=True)
class IncrementalOptions(ClassificationOptions):
    """What a recipe may set, beside the settings of classification.

    The recipe's ``epochs`` must be ``groups`` times ``group_epochs``, and its ``cycles`` be
    ``groups``, so that each group has a schedule of its own.

    Args:
        groups: into how many groups of equal size classes are divided, in an order that is drawn
            with the initial weights (default: 5).
        group_epochs: epochs of each (default: 170).
        group_examples: of each class while it is new, the first ones (default: all).
        memory: examples of earlier classes that are kept, as many of each (default: 2000).
        kept: which ones: the ``first`` of the set, whose order says nothing, or by ``herding``, at
            the end of a class's group (default: first).
        temperature: of the distillation from the network at the end of the group before
            (default: 2).
        align: whether rows of new classes are given the mean norm of the others at the end of
            each group but the first (default: no).
    """

    groups: int = 5
    group_epochs: int = 170
    group_examples: int | None = None
    memory: int = 2000
    kept: str = "first"
    temperature: float = 2.0
    align: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "group_epochs", "group_examples", "memory"):
            within(self, name, 1)
        within(self, "temperature", 0, above=True)
        if self.kept not in KEPT:
            raise UsageError(f"unknown kept {self.kept!r}: {nearest(self.kept, KEPT)}")
        if self.data.startswith("folder:"):
            raise UsageError(f"data {self.data!r} is not allowed: its classes cannot be sorted")


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of a network's softened outputs under those of its teacher, in nats.

    Args:
        logits: shape ``(N, K)``.
        teacher: shape ``(N, K)``.
        temperature: T, by which both are divided.

    Source: arXiv 1911.07053, equation 2.
    """
    wanted = F.softmax(teacher / temperature, dim=1)
    return -(wanted * F.log_softmax(logits / temperature, dim=1)).sum(1).mean()


def herded(features: Tensor, count: int) -> Tensor:
    """Examples of a class, each the one with which the mean of those chosen is nearest to all's.

    Args:
        features: one row an example, shape ``(N, d)``; only their directions count.
        count: how many to choose, at most N.

    Returns:
        Their numbers in the order of choice, so that the first few are the choice of so few.

    Source: arXiv 1611.07725, algorithm 4.
    """
    unit = F.normalize(features.double(), dim=1)
    mean, total = unit.mean(0), torch.zeros_like(unit[0])
    taken = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    order = torch.empty(count, dtype=torch.long, device=unit.device)
    for k in range(count):
        distance = (mean - (total + unit) / (k + 1)).norm(dim=1)
        best = distance.masked_fill(taken, torch.inf).argmin()
        order[k], taken[best] = best, True
        total = total + unit[best]
    return order


class _WithTeacher(nn.Module):
    """A network, the one that it learns from, and how far the groups have come.

    All of it is state that a checkpoint holds. ``epoch`` counts finished ones; ``ends`` are the
    accuracies at the ends of groups; ``rows`` and ``biases`` are those that new classes begin with;
    ``kept`` has for each class the examples that are kept, the most that can be, in their order.
    """

    def __init__(self, network: nn.Module, head: nn.Linear, groups: int, kept: Tensor) -> None:
        super().__init__()
        self.network = network
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.epoch = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.ends = nn.Buffer(torch.zeros(groups, dtype=torch.float64))
        self.rows = nn.Buffer(head.weight.detach().clone())
        self.biases = nn.Buffer(head.bias.detach().clone())
        self.kept = nn.Buffer(kept)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


class Incremental(Classification):
    """Cross-entropy on new and kept examples, and distillation from the network before the group.

    (1 − λ)·CE + λ·KD, where λ is the share of earlier classes among those seen (arXiv 1911.07053,
    equation 3).
    """

    divisible = False
    options: IncrementalOptions
    model: _WithTeacher

    def __init__(self, options: IncrementalOptions, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        if self.classes % options.groups:
            raise UsageError(
                f"groups {options.groups} is not allowed: must divide the {self.classes} classes"
            )
        self.places = torch.argsort(torch.randperm(self.classes)).to(device)
        self.train_places = self.places[self.data.train_labels]
        self.test_places = self.places[self.data.test_labels]
        self.members = [self._members(c) for c in range(self.classes)]
        self.group_size = self.classes // options.groups
        fewest = min(len(members) for members in self.members)
        most = min(options.memory // self.group_size, fewest)
        first = torch.stack([members[:most] for members in self.members])
        self.model = _WithTeacher(self.model, self._head(), options.groups, first).to(device)
        self.examples = options.memory + max(
            sum(len(self.members[c]) for c in self._group(g)) for g in range(options.groups)
        )
        self.facts |= {"groups": options.groups, "epoch_examples": self.examples}
        seen = [(g + 1) * self.group_size for g in range(options.groups)]
        self.baseline = {
            "accuracy": 1 / self.classes,
            "earlier": 1 / max(self.classes - self.group_size, 1),
            "latest": 0.0,
            "average": sum(1 / n for n in seen) / len(seen),
        }

    def _head(self) -> nn.Linear:
        network = getattr(self.model, "network", self.model)
        layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
        if not layers or len(layers[-1].weight) != self.classes or layers[-1].bias is None:
            raise UsageError(
                f"network {self.options.network!r} is not allowed: its last linear layer must have "
                "a row and a bias for each class"
            )
        return layers[-1]

    def _members(self, place: int) -> Tensor:
        of = (self.train_places == place).nonzero().flatten().cpu()
        return of[: self.options.group_examples]

    def _group(self, group: int) -> range:
        return range(group * self.group_size, (group + 1) * self.group_size)

    @property
    def group(self) -> int:
        """The group that is trained on now, from 0."""
        return min(int(self.model.epoch) // self.options.group_epochs, self.options.groups - 1)

    def batches(self, size: int, draw: Generator) -> Tensor:
        """The new classes' examples and the kept ones; some twice where there are none to keep."""
        new = torch.cat([self.members[c] for c in self._group(self.group)])
        earlier = self.group * self.group_size
        pool = new
        if earlier:
            kept = self.model.kept[:earlier, : self.options.memory // earlier]
            pool = torch.cat([new, kept.flatten().cpu()])
        order = torch.cat(
            [
                pool[torch.randperm(len(pool), generator=draw)]
                for _ in range(-(-self.examples // len(pool)))
            ]
        )
        steps = self.examples // size
        return order[: steps * size].view(steps, size)

    def _made(self, x: Tensor, labels: Tensor, draw: Generator) -> tuple[Tensor, ...]:
        return super()._made(x, self.places[labels], draw)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy among the classes seen, and distillation of the earlier ones, in nats."""
        x, y = batch
        known, seen = self.group * self.group_size, (self.group + 1) * self.group_size
        logits = self.model(x)[:, :seen]
        loss = F.cross_entropy(logits, y[:, :seen], label_smoothing=self.options.label_smoothing)
        if not known:
            return loss
        self.model.teacher.eval()
        with torch.no_grad():
            wanted = self.model.teacher(x)[:, :known]
        share = known / seen
        learned = distillation(logits[:, :known], wanted, self.options.temperature)
        return (1 - share) * loss + share * learned

    @torch.no_grad()
    def end_epoch(self) -> None:
        """At the end of a group: align, choose, test, become the teacher, and lay out new rows."""
        model, group = self.model, self.group
        model.epoch.add_(1)
        if int(model.epoch) % self.options.group_epochs:
            return
        head = self._head()
        new = slice(group * self.group_size, (group + 1) * self.group_size)
        if self.options.align and group:
            # Rows that no class has yet count neither as old nor as new.
            align_rows(head.weight[: new.stop], new)
        if self.options.kept == "herding":
            for place in self._group(group):
                model.kept[place] = self._herded(place)
        model.ends[group] = self._tested()["accuracy"]
        model.teacher.load_state_dict(model.network.state_dict())
        head.weight[new.stop :] = model.rows[new.stop :]
        head.bias[new.stop :] = model.biases[new.stop :]

    def _herded(self, place: int) -> Tensor:
        """The examples of a class that are kept, by what the last layer reads of them."""
        members, features = self.members[place], []
        handle = self._head().register_forward_pre_hook(lambda _, given: features.append(given[0]))
        self.model.eval()
        for step in torch.split(members, _PART):
            for x, _, _ in self.data.batches(step[None], [torch.Generator()]):
                self.model(self.standardized(x))
        handle.remove()
        order = herded(torch.cat(features), self.model.kept.shape[1])
        return members.to(order.device)[order]

    @torch.no_grad()
    def _tested(self) -> dict[str, float]:
        self.model.eval()
        groups_seen = max(1, -(-int(self.model.epoch) // self.options.group_epochs))
        seen = groups_seen * self.group_size
        predicted = torch.cat(
            [
                self.model(self.standardized(x))[:, :seen].argmax(1)
                for x, _ in self.data.test_parts()
            ]
        )
        right = predicted == self.test_places
        latest = (self.test_places >= seen - self.group_size) & (self.test_places < seen)
        earlier = self.test_places < seen - self.group_size

        def share(members: Tensor) -> float:
            return float(right[members].double().mean()) if members.any() else 0.0

        return {
            "accuracy": share(self.test_places < seen),
            "earlier": share(earlier),
            "latest": share(latest),
        }

    def evaluate(self) -> Evaluation:
        """Accuracy on the classes seen so far."""
        ended = int(self.model.epoch) // self.options.group_epochs
        average = float(self.model.ends[:ended].mean()) if ended else 0.0
        return Evaluation({**self._tested(), "average": average})
