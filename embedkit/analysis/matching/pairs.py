"""Labeled pairs of images, of one identity or of two: from a CSV, from labels, from folders.

Also the 10-fold protocol of Labeled Faces in the Wild: A Database for Studying Face Recognition in Unconstrained
Environments (Huang et al., Technical Report 07-49, University of Massachusetts, 2007), view 2.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import NamedTuple

import numpy as np

from embedkit._io.atomic import write_file
from embedkit._io.reading import open_regular
from embedkit.analysis.similarity import UnionFind
from embedkit.errors import ConfigError

__all__ = [
    "Folds",
    "Pairs",
    "folder_identities",
    "lfw_protocol",
    "pair_names",
    "read_pairs",
    "sample_pairs",
    "write_pairs",
]

#: Greatest number of genuine pairs and of impostor pairs; more are sampled.
MOST = 1 << 18
#: Where a spreadsheet may start a cell. In some locales it splits at semicolons and tabs, also inside quotes.
_START = r"(?:^|(?<=[;\t\r\n]))"
#: The start of a formula there, after apostrophes that already hide one.
_FORMULA = r"(?='*[=+\-@\t\r\n])"
_shortener = Repr()
_shortener.maxstring = 200
_short = _shortener.repr
_TRUE, _FALSE = ("1", "true", "yes", "same"), ("0", "false", "no", "different")


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows of embeddings.

    Attributes:
        a: int64 (P,), the first row of each pair.
        b: int64 (P,), the second one.
        same: bool (P,), whether both are of one identity.
        identities: int64 (P, 2), the identity of each side as a number; pairs that share one are correlated.
    """

    a: np.ndarray
    b: np.ndarray
    same: np.ndarray
    identities: np.ndarray

    def __len__(self) -> int:
        return len(self.a)

    def among(self, kept: np.ndarray) -> Pairs:
        """The pairs whose rows are both kept, renumbered over the kept rows.

        Args:
            kept: bool (N,), of the rows.
        """
        row = np.cumsum(kept) - 1
        here = kept[self.a] & kept[self.b]
        return Pairs(row[self.a[here]], row[self.b[here]], self.same[here], self.identities[here])


def write_pairs(
    path: str | os.PathLike[str], names: Sequence[str], pairs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Write pairs for a person to label: a CSV with the columns `a`, `b`, `cosine` and an empty `same`.

    A name that a spreadsheet would run as a formula gets an apostrophe in front, which `read_pairs` removes.

    Args:
        path: The CSV.
        names: One per row.
        pairs: Rows i, rows j and cosines.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = ["a,b,cosine,same"]
    for a, b, cosine in zip(*(side.tolist() for side in pairs), strict=True):
        lines.append(f"{_cell(names[a])},{_cell(names[b])},{cosine:.6f},")
    write_file(Path(path), "".join(f"{line}\r\n" for line in lines).encode())


def _cell(text: str) -> str:
    """One cell: an apostrophe before each formula, and quotes if needed."""
    text = re.sub(_START + _FORMULA, "'", text)
    return '"' + text.replace('"', '""') + '"' if re.search(r"[,;\"\s]", text) else text


def _plain(cell: str) -> str:
    """The inverse of `_cell`, for a cell without its quotes."""
    return re.sub(f"{_START}'{_FORMULA}", "", cell)


class _Line(NamedTuple):
    number: int
    a: str
    b: str
    same: bool


def pair_names(path: str | os.PathLike[str]) -> list[str]:
    """The names in the columns `a` and `b` of a CSV of pairs, each once, in order.

    Raises:
        ConfigError: Not such a file.
    """
    return list(dict.fromkeys(_plain(name) for line in _lines_of(path) for name in (line.a, line.b)))


def read_pairs(
    path: str | os.PathLike[str], names: Sequence[str] | Mapping[str, int], *, identities: bool = True
) -> Pairs:
    """Read a CSV with the columns `a`, `b` (ids) and `same` (1 or 0, true or false, yes or no).

    Identities follow from the pairs: images linked by pairs of one identity are one identity.

    Args:
        path: The CSV; its first line names the columns, and other columns are ignored.
        names: The embeddings' ids, one per row, as `Rows.names` gives them; or a mapping to rows, if
            several names belong to one row.
        identities: False makes each image its own identity, for labels such as "near-duplicate" that are not
            transitive.

    Raises:
        ConfigError: Not such a file, an id that the embeddings do not have, pairs of one kind only, or a pair
            of two identities that other pairs make one.

    Examples:
        >>> with open("pairs.csv", "w") as file:
        ...     print("a,b,same", file=file)
        ...     print("samples/cat.jpg,samples/cat-closer.jpg,1", file=file)
        ...     print("samples/cat.jpg,samples/rocket.jpg,0", file=file)
        >>> pairs = embedkit.analysis.read_pairs("pairs.csv", embedkit.Embeddings.load("samples.parquet").ids)
        >>> pairs.same
        array([ True, False])
    """
    where = os.fspath(path)
    lines = _lines_of(path)
    rows = names if isinstance(names, Mapping) else {name: index for index, name in enumerate(names)}
    # An id may start with an apostrophe of its own.
    lines = [line._replace(a=_id_of_cell(line.a, rows), b=_id_of_cell(line.b, rows)) for line in lines]
    unknown = [(line.number, name) for line in lines for name in (line.a, line.b) if name not in rows]
    if unknown:
        others = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{where}, line {unknown[0][0]}: {_short(unknown[0][1])} is not an id of the embeddings{others}; "
            "ids are spelled as `embedkit embed` stored them"
        )
    truth = np.array([line.same for line in lines], bool)
    check_both_kinds(truth, where)
    a, b = np.array([(rows[line.a], rows[line.b]) for line in lines], np.int64).T
    own = np.flatnonzero(a == b)
    if len(own):
        line = lines[own[0]]
        raise ConfigError(
            f"{where}, line {line.number}: {line.a!r} is paired with itself; leave this line out"
        )
    group = UnionFind(max(rows.values()) + 1)
    if identities:
        group.join(a[truth], b[truth])
    sides = np.stack([group.find(a), group.find(b)], 1)
    wrong = np.flatnonzero((sides[:, 0] == sides[:, 1]) & ~truth)
    if len(wrong):
        line = lines[wrong[0]]
        raise ConfigError(
            f"{where}, line {line.number}: {line.a!r} and {line.b!r} are labeled as different, "
            "but other lines make them one identity; correct one of them"
        )
    return Pairs(a, b, truth, sides)


def _id_of_cell(cell: str, rows: Mapping[str, int]) -> str:
    return plain if (plain := _plain(cell)) in rows else cell


def _lines_of(path: str | os.PathLike[str]) -> list[_Line]:
    """The pairs of a CSV, as written."""
    where = os.fspath(path)
    lines: list[_Line] = []
    try:
        with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"a", "b", "same"} - set(reader.fieldnames or ())
            if missing:
                raise ConfigError(
                    f"{where}: expected the columns a, b and same in its first line, "
                    f"found {_short(', '.join(reader.fieldnames or ()) or 'nothing')}"
                )
            for line in reader:
                answer = (line["same"] or "").strip().lower()
                if answer not in _TRUE + _FALSE:
                    raise ConfigError(
                        f"{where}, line {reader.line_num}: same: expected 1 or 0, found {_short(answer)}"
                    )
                lines.append(_Line(reader.line_num, line["a"] or "", line["b"] or "", answer in _TRUE))
    except ConfigError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, or a path with a NUL
        raise ConfigError(f"{where} cannot be read as a CSV file ({error})") from None
    return lines


def check_both_kinds(same: np.ndarray, where: str) -> None:
    """Refuse pairs of one kind only.

    Raises:
        ConfigError: One kind is missing; the message gives both numbers.
    """
    genuine = int(same.sum())
    if not 0 < genuine < len(same):
        raise ConfigError(
            f"{where}: expected pairs of one identity and pairs of two, found {genuine} of one and "
            f"{len(same) - genuine} of two"
        )


def folder_identities(ids: Sequence[str]) -> list[str]:
    """The identity of each image by its folder: the parent folder of its id.

    Raises:
        ConfigError: An id without a folder.
    """
    folders = [name.replace("::", "/").rpartition("/")[0] for name in ids]
    bare = next((name for name, folder in zip(ids, folders, strict=True) if not folder), None)
    if bare is not None:
        raise ConfigError(
            f"{bare!r} is not in a folder, so its identity is unknown; "
            "give a folder that holds one folder per identity, or name a column with --label"
        )
    return folders


def identity_codes(identities: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Identities as numbers 0..n-1 in order of first appearance, int64 (N,); -1 where there is none.

    None, NaN and the empty text mean an unknown identity.
    """
    codes: dict[Hashable, int] = {}
    return np.array(
        [
            -1 if name is None or name == "" or name != name else codes.setdefault(name, len(codes))
            for name in (identities.tolist() if isinstance(identities, np.ndarray) else identities)
        ],
        np.int64,
    )


def sample_pairs(
    identities: Sequence[Hashable] | np.ndarray, *, seed: int = 0, most: int = MOST, where: str = "identities"
) -> Pairs:
    """Pairs from identity labels: all of a kind if they are at most `most`, else a sample of that size.

    A sample is drawn uniformly from all pairs of its kind, without replacement.

    Args:
        identities: One per row; rows with None or the empty text are left out.
        seed: Of the samples.
        most: Pairs of each kind.
        where: Name of the labels in messages.

    Raises:
        ConfigError: Fewer than two identities, or no identity with two images.

    Examples:
        >>> pairs = embedkit.analysis.sample_pairs(["ann", "ann", "bob", "bob", "bob"])
        >>> len(pairs.same), int(pairs.same.sum())
        (10, 4)
    """
    codes = identity_codes(identities)
    rows = np.flatnonzero(codes >= 0)
    order = rows[np.argsort(codes[rows], kind="stable")]  # the images of an identity stand side by side
    _, starts, place, counts = np.unique(
        codes[order], return_index=True, return_inverse=True, return_counts=True
    )
    if len(counts) < 2 or counts.max() < 2:
        raise ConfigError(
            f"{where}: expected at least 2 identities, one of them with 2 images, found {len(counts)} "
            f"{'identity' if len(counts) == 1 else 'identities'} of {len(order)} images"
        )
    n = len(order)
    start, count = starts[place], counts[place]  # of each place's identity
    at = np.arange(n)
    rng = np.random.default_rng(seed)

    # A partner is counted from its image on, so that each unordered pair has one ticket.
    genuine = _draw(start + count - at - 1, most, rng)
    impostor = _draw(n - start - count, most, rng)
    first = np.concatenate([genuine[0], impostor[0]])
    second = np.concatenate([genuine[0] + 1 + genuine[1], (start + count)[impostor[0]] + impostor[1]])
    same = np.arange(len(first)) < len(genuine[0])
    a, b = order[first], order[second]
    return Pairs(a, b, same, np.stack([codes[a], codes[b]], 1))


def _draw(partners: np.ndarray, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs by ticket: a place, and which of its partners; int64 (n,) each, in order.

    Args:
        partners: int64 (N,), how many partners each place has.
        most: Tickets that are drawn, all of them when there are no more.
        rng: The random generator.
    """
    ends = np.cumsum(partners)
    total = int(ends[-1])
    if total <= 2 * most:
        tickets = np.arange(total)
        if total > most:
            tickets = np.sort(rng.choice(total, most, replace=False))
    else:
        # At most half of the tickets are wanted, so that redrawing what came twice ends soon.
        tickets = np.unique(rng.integers(0, total, most))
        while len(tickets) < most:
            tickets = np.union1d(tickets, rng.integers(0, total, most - len(tickets)))
    place = np.searchsorted(ends, tickets, side="right")
    return place, tickets - (ends - partners)[place]


@dataclass(frozen=True)
class Folds:
    """Verification accuracy by cross-validation.

    Attributes:
        accuracy: Mean over the folds.
        standard_error: Of the mean: standard deviation over the square root of the number of folds.
        accuracies: float64 (F,), of each fold.
        thresholds: float64 (F,), chosen on the other folds.
    """

    accuracy: float
    standard_error: float
    accuracies: np.ndarray
    thresholds: np.ndarray


def lfw_protocol(scores: np.ndarray, same: np.ndarray, folds: np.ndarray | int = 10) -> Folds:
    """The 10-fold protocol of LFW: each fold is evaluated at the best threshold of the others.

    Args:
        scores: float (P,), higher means more similar.
        same: bool (P,).
        folds: int (P,), the fold of each pair; or the number of consecutive folds of equal size, as in LFW's list of
        pairs.
            For an accuracy on unseen identities, folds must not share identities.

    Raises:
        ConfigError: Fewer than two folds, sizes that do not divide, or a fold with one kind of pairs only.

    Examples:
        >>> scores, same = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3]), np.array([True, False] * 3)
        >>> embedkit.analysis.lfw_protocol(scores, same, folds=3).accuracy
        1.0
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if isinstance(folds, int):
        if folds < 2 or len(scores) % folds:
            raise ConfigError(
                f"folds: expected a number from 2 on that divides the {len(scores)} pairs, found {folds}"
            )
        folds = np.repeat(np.arange(folds), len(scores) // folds)
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise ConfigError(f"folds: expected at least 2, found {len(numbers)}")
    accuracies, thresholds = [], []
    for number in numbers:
        test = folds == number
        check_both_kinds(same[test], f"fold {number}")
        threshold = _most_accurate(scores[~test], same[~test])
        accuracies.append(float(((scores[test] >= threshold) == same[test]).mean()))
        thresholds.append(threshold)
    return Folds(
        accuracy=float(np.mean(accuracies)),
        standard_error=float(np.std(accuracies, ddof=1) / np.sqrt(len(numbers))),
        accuracies=np.array(accuracies),
        thresholds=np.array(thresholds),
    )


def _most_accurate(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most right answers: of several, the middle one, halfway between two scores."""
    values, index = np.unique(scores, return_inverse=True)
    genuine = np.bincount(index, same, len(values))
    impostor = np.bincount(index, ~same, len(values))
    # Right answers when the values from the i-th on are accepted, i = 0..len(values).
    right = np.append(genuine[::-1].cumsum()[::-1], 0) + np.insert(impostor.cumsum(), 0, 0)
    best = np.flatnonzero(right == right.max())
    i = int(best[len(best) // 2])
    edges = np.concatenate([[values[0] - 1], values, [values[-1] + 1]])
    return float((edges[i] + edges[i + 1]) / 2)
