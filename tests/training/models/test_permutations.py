"""Sets of permutations: groups by their axioms, distances recounted, the bound on their size, and the inverse."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.models.permutations import PermutationSet, hamming_distances, reorder


def smallest(permutations):
    """Recounted by a loop, without the function under test."""
    rows = permutations.tolist()
    return min(
        sum(a != b for a, b in zip(one, other, strict=True))
        for index, one in enumerate(rows)
        for other in rows[:index]
    )


@pytest.mark.parametrize(
    ("kind", "items", "members", "distance"),
    [("pgl", 9, 504, 7), ("agl", 9, 72, 8), ("even", 4, 12, 3), ("all", 4, 24, 2)],
)
def test_groups(kind, items, members, distance):
    permutations = PermutationSet(kind=kind).build(items)
    assert permutations.shape == (members, items)
    assert torch.equal(permutations.sort(1).values, torch.arange(items).expand(members, -1))
    assert smallest(permutations) == distance
    assert members == math.factorial(items) // math.factorial(distance - 1)  # the bound: no set is larger
    assert permutations[0].tolist() == list(range(items))
    rows = {tuple(row) for row in permutations.tolist()}
    assert len(rows) == members
    products = reorder(
        permutations[:, None].expand(-1, 12, -1).flatten(0, 1), permutations[:12].repeat(members, 1)
    )
    assert {tuple(row) for row in products.tolist()} <= rows  # closed under composition


def test_moebius_maps_fix_two_places_or_fewer():
    counts = torch.bincount(hamming_distances(PermutationSet(kind="pgl").build(9)).flatten(), minlength=10)
    # 36 pairs of points are each fixed by 6 maps beside the identity, each of 9 points alone by 7
    assert counts[0] == 504 and counts[1:7].sum() == 0
    assert (counts // 504).tolist()[7:] == [36 * 6, 9 * 7, 504 - 1 - 36 * 6 - 9 * 7]


@pytest.mark.parametrize(("count", "distance"), [(64, 7), (100, 6)])
def test_greedy_sets(count, distance):
    permutations = PermutationSet(kind="greedy", count=count).build(9)
    assert len(permutations) == count and smallest(permutations) == distance
    # prefixes of one another: a label keeps its meaning in a larger set
    assert torch.equal(PermutationSet(kind="greedy", count=10).build(9), permutations[:10])
    assert not torch.equal(PermutationSet(kind="greedy", count=10, seed=1).build(9), permutations[:10])


def test_distances():
    permutations = PermutationSet(kind="all").build(3)
    distances = hamming_distances(permutations)
    assert torch.equal(distances, distances.T) and distances.diagonal().sum() == 0
    assert distances[0].tolist() == [0, 2, 2, 3, 3, 2]  # of three items, by hand


def test_place_j_holds_item_k_of_j_and_the_inverse_brings_it_back():
    items = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    permutations = torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]])
    shown = reorder(items, permutations)
    for n in range(2):
        for j in range(4):
            assert torch.equal(shown[n, j], items[n, permutations[n, j]])
    assert torch.equal(reorder(shown, permutations.argsort(1)), items)
    assert not torch.equal(reorder(shown, permutations), items)


@pytest.mark.parametrize(
    ("wrong", "items", "message"),
    [
        ({"kind": "pgl"}, 4, "permutes 9 tiles, and there are 4"),
        ({"kind": "odd"}, 4, "expected pgl, agl, even, all or greedy"),
        ({"kind": "greedy", "count": 25}, 4, "expected 2 to 24, found 25"),
        ({"kind": "greedy", "count": 1}, 4, "expected 2 to 24, found 1"),
        ({"kind": "all"}, 16, "expected 2 to 9 tiles, found 16"),
    ],
)
def test_sets_that_there_are_not(wrong, items, message):
    with pytest.raises(ConfigError, match=message):
        PermutationSet(**wrong).build(items)
