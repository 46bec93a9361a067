"""The bytes of one image file: bounded, regular, and under either Unicode form of its name."""

from __future__ import annotations

import os
import unicodedata

import pytest

from embedkit.images.files import other_form, read_file
from embedkit.images.originals import Originals

NAMES = [unicodedata.normalize(form, "Fotos Köln/Müller.jpg") for form in ("NFC", "NFD")]


@pytest.mark.parametrize(("stored", "asked"), [NAMES, NAMES[::-1]])
def test_the_other_unicode_form_is_read(stored, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(os.path.dirname(stored))
    with open(stored, "wb") as file:
        file.write(b"x")
    assert read_file(asked) == read_file(stored) == b"x"
    assert other_form(asked) == stored and other_form(os.path.abspath(asked)) == os.path.abspath(stored)
    originals = Originals()
    assert originals.read(asked) == b"x" and originals.file(asked) == os.path.abspath(stored)


def test_a_name_with_two_other_forms_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    letters = ["\u1e69", "s\u0323\u0307", "\u1e63\u0307"]  # one letter with two dots, three ways to write it
    assert len({unicodedata.normalize("NFC", letter) for letter in letters}) == 1
    for letter in letters[1:]:
        open(letter, "wb").close()
    assert other_form(letters[0]) is None
    with pytest.raises(FileNotFoundError):
        read_file(letters[0])


@pytest.mark.parametrize("name", ["gone.jpg", "é.jpg", "ü/é.jpg", "a\0é", "é/"])
def test_what_is_not_there_has_no_other_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert other_form(name) is None
