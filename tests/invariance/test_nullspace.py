"""Null spaces of Euler products, against exponents that are known."""

import pytest
import torch

from normwise.invariance.nullspace import RowSpace, null_space, pivots, sparse_basis


def products(relations, tensors, draws, seed=0):
    """Random products of very different sizes that satisfy the relations."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.zeros(len(relations), tensors, dtype=torch.float64)
    for i, relation in enumerate(relations):
        for t, a in relation.items():
            exponents[i, t] = a
    p = torch.randn(draws, tensors, generator=generator, dtype=torch.float64)
    p *= 10 ** (4 * torch.rand(draws, 1, generator=generator, dtype=torch.float64))
    p -= p @ torch.linalg.pinv(exponents) @ exponents
    return p


def as_dicts(basis):
    return [{int(t): float(a[t]) for t in a.nonzero().flatten()} for a in basis]


CASES = {
    "none": [],
    "a pair": [{0: 1, 3: 1}],
    "a trade": [{0: 1, 3: -2}],
    "apart": [{0: 1, 1: 1}, {2: 1, 4: 1, 6: 1}],
    "a chain": [{0: 1, 1: 1}, {2: 1, 3: -1}, {4: 1, 5: 1, 6: 1, 7: -1}],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_the_relations_that_were_put_in_come_out(name, seed):
    relations = CASES[name]
    p = products(relations, 8, 12, seed)
    null = null_space(p)
    assert null.shape == (8, len(relations))
    generator = torch.Generator().manual_seed(seed)
    assert as_dicts(sparse_basis(p, null, [], generator)) == relations


def test_of_tensors_that_stand_for_one_another_the_last_to_write_is_named():
    """A stream written by 0, 3 and v·o = 1·2: (0, 1, 3) and (0, 2, 3) scale it; 2 comes last."""
    p = products([{0: 1, 2: 1, 3: 1}, {1: 1, 2: -1}], 6, 8)
    found = as_dicts(sparse_basis(p, null_space(p), [], torch.Generator().manual_seed(0)))
    assert found == [{0: 1, 2: 1, 3: 1}, {1: 1, 2: -1}]


def test_what_is_known_is_not_found_again():
    relations = [{0: 1, 1: 1}, {2: 1, 3: -1}, {1: 1, 4: 1, 5: 1}]
    p = products(relations, 8, 12)
    known = []
    for relation in relations[:2]:
        known.append(torch.zeros(8, dtype=torch.float64))
        for t, a in relation.items():
            known[-1][t] = a
    left = [t for t in range(8) if t not in pivots(known)]
    assert len(left) == 6
    null = torch.zeros(8, 1, dtype=torch.float64)
    null[left] = null_space(p[:, left])
    found = as_dicts(sparse_basis(p, null, known, torch.Generator().manual_seed(0)))
    assert found == [{1: 1, 4: 1, 5: 1}]


def test_a_row_space_is_complete_at_the_rank():
    p = products([{0: 1, 1: 1}, {2: 1, 3: 1, 4: 1}], 8, 20)
    space = RowSpace(p[:2])
    assert [space.add(row) for row in p[2:]] == [True] * 4 + [False] * 14
