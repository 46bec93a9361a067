"""No rows, however strange, abort or hang native code: each call gives a result or one sentence.

Each runs in a process of its own, where an abort is seen, with warnings as errors.
"""

import multiprocessing

import numpy as np
import pytest
from strange_rows import ACTS, attempt

from embedkit.analysis.clustering.cluster import cluster
from embedkit.analysis.vectors import as_count, as_numbers, check_rows, magnitudes
from embedkit.errors import ConfigError


@pytest.mark.parametrize("act", ACTS)
def test_any_rows_give_a_result_or_one_sentence(act):
    if act in ("kmeans", "kmeans, any K", "kmeans, every row", "spherical", "pca", "whiten", "ivf", "hnsw"):
        pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    if act == "hdbscan":
        pytest.importorskip("sklearn", reason="pip install '.[analysis]'")
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=attempt, args=(act, theirs))
    process.start()
    theirs.close()
    last = "the start"
    try:
        while isinstance(last, str):
            assert mine.poll(120), f"hangs at {last}"
            last = mine.recv()
    except EOFError:
        process.join()
        pytest.fail(f"ends with {process.exitcode} at {last}")
    finally:
        process.kill()
        process.join()
    assert last == []


# --- the checker ------------------------------------------------------------------------------------------


def test_magnitudes_by_a_loop():
    for dtype in ("f2", "f4", "f8", "i1", "i8", "u8"):
        rows = np.array([[1, -2], [3, 0], [0, 0]]).astype(dtype)
        expected = [max(abs(float(value)) for value in row) for row in rows.tolist()]
        if dtype != "u8":
            assert magnitudes(rows).tolist() == expected
    assert magnitudes(np.array([[np.iinfo(np.int64).min, 0]])).tolist() == [2.0**63]
    assert magnitudes(np.array([[np.iinfo(np.uint64).max, 0]], np.uint64)).tolist() == [2.0**64]
    found = magnitudes(np.array([[np.nan, 1], [-np.inf, 1]], np.float32))
    assert np.isnan(found[0]) and found[1] == np.inf


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (np.nan, {}, "x: row 12 (p12) holds NaN or infinity; embed that image again, or leave the row out"),
        (-np.inf, {}, "x: row 12 (p12) holds NaN or infinity; embed that image again, or leave the row out"),
        (-3e15, {"largest": 1e15}, "x: row 12 (p12) holds 3e+15, and 1e+15 is the most; scale all rows down"),
        (0, {"zeros": False}, "x: row 12 (p12) is all zeros and has no direction; "
                              "embed that image again, or leave the row out"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(value, options, message):
    rows = np.ones((5, 3))
    rows[2] = value
    with pytest.raises(ConfigError) as caught:
        check_rows(rows, 10, lambda row: f"p{row}", "x", **options)
    assert str(caught.value) == message
    assert check_rows(np.ones((5, 3)), 0, str, "x").tolist() == [1] * 5


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float32(2), np.bool_(True)])
def test_what_is_no_count(value):
    with pytest.raises(ConfigError, match=r"^k: expected a whole number, found "):
        as_count(value, "k")
    assert as_count(np.int32(2), "k") == as_count(2, "k") == 2


def test_numbers_keep_their_memory():
    rows = np.ones((3, 2), np.float32)
    assert as_numbers(rows, "x") is rows
    with pytest.raises(ConfigError, match="found rows of unequal width"):
        as_numbers([[1], [1, 2]], "x")


def test_scaling_rows_changes_no_cluster():
    """From one bound of what is taken to the other: labels and probabilities are those of the rows themselves."""
    pytest.importorskip("faiss", reason="pip install '.[analysis]'")
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(60, 4)) * 0.01 + np.eye(4)[rng.integers(0, 4, 60)]).astype(np.float32)
    expected = cluster(rows, "kmeans", 4)
    for power in (-26, 26, 46):
        found = cluster(np.ldexp(rows, power), "kmeans", 4)  # powers of two: nothing is rounded
        assert np.array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-5)
