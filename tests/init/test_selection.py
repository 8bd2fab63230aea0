"""Weight selection: evenly spaced entries of a larger network."""

import copy
import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.geometry import View, norms
from normwise.init import selected_indices, weight_selection


def network(width, depth=2):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        *[nn.Conv2d(width, width, 3) for _ in range(depth)],
    )


@pytest.mark.parametrize(
    ("teacher", "student", "indices"),
    [
        (5, 3, [0, 2, 4]),
        (12, 5, [0, 3, 6, 8, 11]),
        (10, 4, [0, 3, 6, 9]),
        (384, 192, list(range(0, 384, 2))),
        (7, 7, list(range(7))),
        (4, 1, [0]),
    ],
)
def test_the_indices_are_those_of_the_official_code(teacher, student, indices):
    assert selected_indices(teacher, student).tolist() == indices


def test_each_parameter_takes_the_selected_entries_along_every_dimension():
    teacher, student = network(10, depth=3), network(4)
    assert len(weight_selection(student, teacher)) == len(list(student.parameters()))
    rows = torch.tensor([0, 3, 6, 9])
    assert torch.equal(student[0].weight, teacher[0].weight[rows])
    assert torch.equal(student[1].bias, teacher[1].bias[rows])
    assert torch.equal(student[2].weight, teacher[2].weight[rows][:, rows])


def test_of_equal_shapes_it_is_a_copy():
    teacher, student = network(6), network(6)
    weight_selection(student, teacher.state_dict())
    for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(p, q)


def test_selecting_in_two_steps_is_selecting_in_one_where_sizes_divide():
    large, middle, small, direct = network(16), network(8), network(4), network(4)
    weight_selection(middle, large)
    weight_selection(small, middle)
    weight_selection(direct, large)
    for p, q in zip(small.parameters(), direct.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rows_lose_the_root_of_the_share_of_their_inputs_unless_norms_are_kept():
    teacher, student = nn.Linear(4096, 8), nn.Linear(1024, 4)
    nn.init.normal_(teacher.weight)
    weight_selection(student, teacher)
    theirs = norms(teacher.weight.detach(), View.channel())[::2]
    shrunk = norms(student.weight.detach(), View.channel()) / theirs
    torch.testing.assert_close(shrunk, torch.full((4,), math.sqrt(1 / 4)), rtol=0.1, atol=0)
    before = student.weight.detach().clone()
    weight_selection(student, teacher, keep_norms=View.channel())
    torch.testing.assert_close(norms(student.weight.detach(), View.channel()), theirs)
    cosines = nw.geometry.cosine(student.weight.detach(), before, View.channel())
    torch.testing.assert_close(cosines, torch.ones(4))


def test_a_report_of_the_student_says_whose_norms_to_keep():
    teacher, student = network(8), network(4)
    report = nw.analyze(student, torch.randn(2, 3, 9, 9))
    weight_selection(student, teacher, keep_norms=report.views())
    theirs = norms(teacher[0].weight.detach(), View.channel())[::2]
    torch.testing.assert_close(norms(student[0].weight.detach(), View.channel()), theirs)
    assert torch.equal(student[3].weight, teacher[3].weight[::2][:, ::2])


def test_heads_are_left_as_they_are():
    teacher = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    student = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 20)})
    before = copy.deepcopy(student["head"].state_dict())
    assert weight_selection(student, teacher) == ["body.weight", "body.bias"]
    assert torch.equal(student["head"].weight, before["weight"])


def test_what_does_not_fit_is_told_and_changes_nothing():
    student = network(8)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight: Invalid sizes: 8 of 4"):
        weight_selection(student, network(4))
    with pytest.raises(ValueError, match=r"the teacher has no parameter '3\.weight'"):
        weight_selection(student, network(16, depth=1))
    with pytest.raises(ValueError, match="has shape"):
        weight_selection(nn.Linear(2, 2), nn.Conv1d(4, 4, 1))
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
