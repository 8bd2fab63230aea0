"""Start a small network from evenly spaced entries of a larger one (arXiv 2311.18823)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from normwise.geometry import View, at_least_float32, unit

__all__ = ["selected_indices", "weight_selection"]


def selected_indices(teacher: int, student: int) -> Tensor:
    """Which indices of a dimension of the teacher the student takes.

    0, q, 2q, … with q = teacher/student where that is a whole number, else
    round(linspace(0, teacher − 1, student)), ties to even.

    Args:
        teacher: the size of the dimension in the larger network.
        student: in the smaller one, from 1 to ``teacher``.

    Returns:
        Shape ``(student,)``, of integers, ascending.

    Raises:
        ValueError: for a student that is larger than its teacher, or of no size.

    Source: arXiv 2311.18823, as in the official code.
    """
    if not 0 < student <= teacher:
        raise ValueError(
            f"Invalid sizes: {student} of {teacher}; the student's must be 1 or more "
            "and not above the teacher's"
        )
    if teacher % student == 0:
        return torch.arange(0, teacher, teacher // student)
    return torch.linspace(0, teacher - 1, student, dtype=torch.float64).round().long()


@torch.no_grad()
def weight_selection(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, Tensor],
    *,
    skip: Iterable[str] = ("*head*",),
    keep_norms: Mapping[str, View] | View | None = None,
) -> list[str]:
    """Start ``student`` from evenly spaced entries of ``teacher``, in place.

    Each parameter of the student takes from the teacher's parameter of its name, along every
    dimension in turn, what :func:`selected_indices` says; the layers are those that both have, so
    the teacher's first. Even spacing takes the same channels in a layer as in the next one. With
    attention heads, both networks should have the same size of a head, or as many heads.

    A row whose inputs are selected loses about √(n_student/n_teacher) of its norm. To a
    scale-invariant weight that is a larger effective learning rate, to others a smaller output;
    ``keep_norms`` gives each slice the norm that the teacher's slice had.

    Args:
        student: the smaller network.
        teacher: the larger one, or its state dict.
        skip: patterns of names to leave as they are (default: what has "head" in its name, as the
            official code does).
        keep_norms: the slices whose norms are kept, for all parameters of two dimensions or more,
            or by name (default: None, as published).

    Returns:
        The names of the parameters that were set.

    Raises:
        ValueError: for a parameter that the teacher does not have, or has with another number of
            dimensions or smaller; the student is then as it was.

    Source: arXiv 2311.18823, section 3, as in the official code; kept norms are ours.
    """
    theirs = dict(teacher.named_parameters()) if isinstance(teacher, nn.Module) else teacher
    patterns = tuple(skip)
    chosen = {}
    for name, p in student.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        source = theirs.get(name)
        if source is None:
            raise ValueError(f"the teacher has no parameter {name!r}; name it in skip")
        if source.ndim != p.ndim:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, the teacher's {tuple(source.shape)}; "
                "name it in skip"
            )
        view = keep_norms.get(name) if isinstance(keep_norms, Mapping) else keep_norms
        try:
            chosen[name] = _selected(source, p, None if p.ndim < 2 else view)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    params = dict(student.named_parameters())
    for name, value in chosen.items():
        params[name].copy_(value)
    return list(chosen)


def _selected(source: Tensor, p: Tensor, view: View | None) -> Tensor:
    value = source.detach()
    indices = [
        selected_indices(large, small).to(value.device)
        for large, small in zip(source.shape, p.shape, strict=True)
    ]
    for dim, index in enumerate(indices):
        value = value.index_select(dim, index)
    if view is None:
        return value
    # The teacher's slices that the student has: all of the entries of the selected ones.
    whole = source.detach()
    if view.kind != "layer":
        whole = whole.index_select(view.dim, indices[view.dim])
    wide = at_least_float32(value).clone()
    slices = view.slices(wide)
    slices.copy_(
        unit(slices)[0]
        * unit(view.slices(at_least_float32(whole)))[1].view(-1, *(1 for _ in slices.shape[1:]))
    )
    return wide.to(value.dtype)
