"""The metric and the losses of retrieval against their definitions written out as loops."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normwise.lab.errors import UsageError
from normwise.lab.tasks.retrieval import Retrieval, RetrievalOptions, hits, make_loss


def embedded(n: int = 40, classes: int = 8) -> tuple[Tensor, Tensor]:
    """Vectors that lean towards their class, so that neighbours are neither all right nor wrong."""
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, 6, dtype=torch.float64)
    return centres[labels] + 0.9 * torch.randn(n, 6, dtype=torch.float64), labels


@pytest.mark.parametrize("k", [1, 2, 4, 39])
def test_recall_at_k_is_that_of_a_loop_over_all_pairs(k: int) -> None:
    x, labels = embedded()
    expected = []
    for i in range(len(x)):
        near = sorted(
            (j for j in range(len(x)) if j != i),
            key=lambda j: -float(F.cosine_similarity(x[i], x[j], dim=0)),
        )
        expected.append(any(labels[j] == labels[i] for j in near[:k]))
    assert hits(x, labels, k).tolist() == expected
    if k == 1:
        assert 0 < sum(expected) < len(expected)


def test_recall_at_1_is_the_librarys_precision_at_1() -> None:
    distances = pytest.importorskip(
        "pytorch_metric_learning.distances", reason="compares with pytorch-metric-learning"
    )
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    x, labels = embedded(300, 30)
    neighbours = CustomKNN(distances.CosineSimilarity())
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=neighbours)
    theirs = calculator.get_accuracy(x, labels)["precision_at_1"]
    assert float(hits(x, labels, 1).double().mean()) == pytest.approx(theirs, abs=1e-12)


def test_images_that_coincide_do_not_find_themselves() -> None:
    # All vectors are one: a neighbour is any other image, and none is of the class.
    assert not hits(torch.ones(5, 3), torch.arange(5), 4).any()


def test_many_images_give_what_few_at_a_time_give() -> None:
    x, labels = torch.randn(1203, 3), torch.randint(40, (1203,))
    similarity = F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    similarity.fill_diagonal_(-2)
    expected = labels[similarity.argmax(1)] == labels
    assert torch.equal(hits(x, labels, 1), expected)


def test_the_triplet_loss_is_the_mean_over_all_semi_hard_triplets() -> None:
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    x, labels = embedded(24, 6)
    unit = F.normalize(x, dim=1)
    violations = []
    for a in range(24):
        for p in range(24):
            for n in range(24):
                if a == p or labels[a] != labels[p] or labels[a] == labels[n]:
                    continue
                near = float((unit[a] - unit[p]).square().sum())
                far = float((unit[a] - unit[n]).square().sum())
                if near < far < near + 0.2:
                    violations.append(near - far + 0.2)
    assert len(violations) > 20
    loss = make_loss("triplet", 6, 6)(x, labels)
    assert float(loss) == pytest.approx(sum(violations) / len(violations), rel=1e-12)


def test_without_a_semi_hard_triplet_the_loss_is_zero_and_has_a_gradient() -> None:
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], requires_grad=True)
    loss = make_loss("triplet", 2, 2)(x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_proxy_anchor_is_equation_4_of_its_paper() -> None:
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    x, labels = embedded(12, 4)
    loss = make_loss("proxy-anchor", 6, 6).double()  # two classes are not in the batch
    (proxies,) = (p.detach() for p in loss.parameters())
    pulled, pushed = [], []
    for k in range(6):
        cosine = [float(F.cosine_similarity(v, proxies[k], dim=0)) for v in x]
        own = [math.exp(-32 * (c - 0.1)) for c, y in zip(cosine, labels, strict=True) if y == k]
        others = [math.exp(32 * (c + 0.1)) for c, y in zip(cosine, labels, strict=True) if y != k]
        if own:
            pulled.append(math.log1p(sum(own)))
        pushed.append(math.log1p(sum(others)))
    expected = sum(pulled) / len(pulled) + sum(pushed) / len(pushed)
    assert float(loss(x, labels).detach()) == pytest.approx(expected, rel=1e-9)


def test_batches_have_the_asked_number_of_images_of_each_class() -> None:
    problem = object.__new__(Retrieval)  # without the data
    problem.options = RetrievalOptions(data="omniglot", network="resnet8", loss="triplet")
    problem.members = torch.arange(200).view(10, 20)
    problem.examples = 200
    batches = problem.batches(24, torch.Generator().manual_seed(0))
    assert batches.shape == (8, 24)
    for batch in batches:
        assert len(batch.unique()) == 24
        assert torch.bincount(batch // 20).tolist().count(4) == 6
    assert torch.equal(problem.batches(24, torch.Generator().manual_seed(0)), batches)
    assert len(batches.unique()) > 100  # of all 200 images many have their turn
    with pytest.raises(UsageError, match=r"batch_size 25 .*4 images each of at most 10 classes"):
        problem.batches(25, torch.Generator())
    with pytest.raises(UsageError, match=r"batch_size 44 is not allowed"):
        problem.batches(44, torch.Generator())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.distances", None)
    with pytest.raises(UsageError, match=r'pip install "normwise\[lab\]"'):
        make_loss("triplet", 2, 2)


def test_a_mistake_in_the_options_is_shown() -> None:
    with pytest.raises(UsageError, match=r"unknown loss 'triplets': did you mean 'triplet'"):
        RetrievalOptions(data="omniglot", network="resnet8", loss="triplets")
    with pytest.raises(UsageError, match=r"unknown data 'omniglott': did you mean 'omniglot'"):
        RetrievalOptions(data="omniglott", network="resnet8", loss="triplet")
    with pytest.raises(UsageError, match=r"test_classes 1 is not allowed"):
        RetrievalOptions(data="omniglot", network="resnet8", loss="triplet", test_classes=1)
