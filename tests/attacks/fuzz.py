"""Fuzz everything that reads bytes of strangers: manifests, indexes, configurations, graphs, headers, URLs, archives.

    pip install atheris
    python tests/attacks/fuzz.py tests/attacks/corpus -max_total_time=600

Whatever the bytes are, the answer is a value or an `EmbedkitError`; anything else is a finding, and becomes a file of
`corpus/`, which the ordinary tests read too (`test_corpus.py`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from embedkit.errors import EmbedkitError
from embedkit.hub.catalog import Index
from embedkit.hub.limits import check_file_list
from embedkit.hub.lockfile import LockFile
from embedkit.hub.static import StaticZoo
from embedkit.hub.urls import parse_entry, parse_zoo
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CONFIG
from embedkit.model.manifest import Manifest
from embedkit.model.onnx_guard import check_graph, tensor_table
from embedkit.storage.tar import ArchiveStorage

_WEIGHTS = (16).to_bytes(8, "little") + b'{"a":{}}        '


def _archive(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        StaticZoo(ArchiveStorage(Path(file.name))).locate("linear-tiny.noise", None)


def _lock(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        LockFile(Path(file.name)).pin("x")


#: First byte -> what reads the rest.
TARGETS: dict[bytes, Callable[[bytes], object]] = {
    b"m": lambda data: check_file_list(Manifest.from_json(data), "x"),
    b"i": lambda data: Index.from_json(data, "x"),
    b"c": lambda data: EntryConfig.from_json(data, CONFIG),
    b"g": lambda data: check_graph(data, _WEIGHTS, "x"),
    b"t": lambda data: tensor_table(data, "x"),
    b"e": lambda data: parse_entry(data.decode(errors="replace")),
    b"p": lambda data: parse_zoo(data.decode(errors="replace")),
    b"a": _archive,
    b"l": _lock,
}


def one_input(data: bytes) -> None:
    """Give the bytes to what their first byte names."""
    target = TARGETS.get(data[:1])
    if target is None:
        return
    try:
        target(data[1:])
    except EmbedkitError as error:
        if "\n" in str(error):
            raise ValueError("a message of several lines") from error


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
