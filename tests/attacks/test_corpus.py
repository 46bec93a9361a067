"""The corpus of the fuzzer: every file of it ends in a value or in a typed error."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

CORPUS = sorted(Path(__file__).with_name("corpus").iterdir())


@pytest.mark.parametrize("file", CORPUS, ids=[file.name for file in CORPUS])
def test_a_file_of_the_corpus(file):
    fuzz.one_input(file.read_bytes())


def test_the_corpus_reaches_every_target():
    assert {file.read_bytes()[:1] for file in CORPUS} >= set(fuzz.TARGETS)
