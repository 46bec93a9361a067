"""Whose folder it is: what another user can write there is not this user's."""

from __future__ import annotations

import os

import pytest

from embedkit._io.ownership import foreign_access

pytestmark = pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")


@pytest.mark.parametrize(
    ("mode", "sticky", "ours"),
    [
        (0o700, False, True),
        (0o755, False, True),
        (0o500, False, True),
        (0o775, False, False),
        (0o702, False, False),
        (0o1777, False, False),
        (0o1777, True, True),
        (0o777, True, False),
    ],
)
def test_modes(tmp_path, mode, sticky, ours):
    tmp_path.chmod(mode)
    expected = "" if ours else "can be written by other users"
    assert foreign_access(tmp_path, sticky=sticky) == expected


def test_owners(tmp_path, monkeypatch):
    """Root's folders are taken by everybody: root can change all others too."""
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert foreign_access(tmp_path) == ("" if owner == 0 else f"belongs to another user ({owner})")
    if owner == 0:
        os.chown(tmp_path, 12345, -1)
        assert foreign_access(tmp_path) == "belongs to another user (12345)"


def test_a_missing_folder_belongs_to_nobody(tmp_path):
    assert foreign_access(tmp_path / "missing") == ""


def test_a_link_is_followed(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open")
    assert foreign_access(tmp_path / "link") == "can be written by other users"
