"""`scripts/release_zoo`: to a site and to the Hub, read back from there, and what a failure leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import servers

from embedkit.hub.bulk import pull
from embedkit.hub.catalog import Index
from embedkit.hub.resolve import find_entry

SCRIPT = Path(__file__).parents[3] / "scripts" / "release_zoo"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the script is in the checkout alone")

NAMES = [f"linear-e{number:02}.noise" for number in range(12)]


def any_license(arrival) -> None:
    """Every license is taken."""


def write_zoo(by_hand, folder: Path, names: list[str], first_seed: int) -> dict[str, str]:
    """A zoo of tiny entries; name -> revision."""
    for seed, name in enumerate(names, first_seed):
        by_hand.TinyEntry(seed=seed).write(folder / name)
    by_hand.write_index(folder)
    return {name: find_entry(folder / name).revision for name in names}


def release(*words: object) -> tuple[str, str, int]:
    """Stdout, stderr and the exit status."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr, done.returncode


def read(url: str, cache: Path, monkeypatch) -> dict[str, str]:
    """Name -> revision of every entry, each byte read from the zoo through an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    monkeypatch.setenv("EMBEDKIT_CACHE", str(cache))
    return {one.name: one.revision for one in pull([], zoo=url, gate=any_license)}


@pytest.fixture
def web(tmp_path):
    """A web server over the folder `site`, which is to be written."""
    (tmp_path / "site").mkdir()
    server = servers.site(tmp_path / "site")
    yield server
    server.close()


def test_to_a_site(web, by_hand, tmp_path, monkeypatch):
    made = write_zoo(by_hand, tmp_path / "mine", NAMES, 0)
    words = (tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "mine")
    out, err, status = release(*words)
    assert (status, out) == (0, f'DEFAULT_ZOO = "{web.url}"\n')
    assert err.splitlines() == [f"{name}: written" for name in NAMES]
    for name in NAMES:  # the script itself read every file from there
        for file in (tmp_path / "mine" / name).iterdir():
            assert f"/{name}/{file.name}" in web.paths()
    assert read(web.url, tmp_path / "cache", monkeypatch) == made
    out, err, status = release(*words)
    assert status == 0 and err.splitlines() == [f"{name}: was there" for name in NAMES]


def test_to_the_hub(hub, by_hand, tmp_path, monkeypatch):
    """Written with a token, and read back as everybody does: without one."""
    made = write_zoo(by_hand, tmp_path / "mine", NAMES[:3], 0)
    monkeypatch.setenv("EMBEDKIT_TOKEN", "hf_writer")
    out, _, status = release("hf://team", "--zoo", tmp_path / "mine")
    assert (status, out) == (0, 'DEFAULT_ZOO = "hf://team"\n')
    monkeypatch.delenv("EMBEDKIT_TOKEN")
    assert read("hf://team", tmp_path / "cache", monkeypatch) == made


def test_a_hub_that_only_its_team_can_read_is_no_default_zoo(hub, by_hand, tmp_path):
    write_zoo(by_hand, tmp_path / "mine", NAMES[:1], 0)
    words = ("hf://team", "--zoo", tmp_path / "mine", "--token", "hf_writer")
    assert release(*words)[2] == 0
    hub.repos[f"team/{NAMES[0]}"].private = True
    out, err, status = release(*words)
    assert status == 1 and out == "" and "reading the release back failed" in err and "Traceback" not in err


def test_to_a_bucket(s3, by_hand, tmp_path, monkeypatch):
    """Versions that are released stay readable, by digest, after the next release."""
    old = write_zoo(by_hand, tmp_path / "old", NAMES[:2], 0)
    new = write_zoo(by_hand, tmp_path / "new", NAMES[:2], 20)
    for zoo in ("old", "new"):
        assert release(s3, "--zoo", tmp_path / zoo)[::2] == (f'DEFAULT_ZOO = "{s3}"\n', 0)
    assert read(s3, tmp_path / "cache", monkeypatch) == new
    for name, revision in old.items():
        assert find_entry(f"{s3}/{name}@{revision}").revision == revision


@pytest.mark.parametrize("fault", ["corrupt", "404", "html"])
def test_a_site_that_serves_other_bytes_gets_no_line(web, by_hand, tmp_path, fault):
    write_zoo(by_hand, tmp_path / "mine", NAMES[:3], 0)
    web.spoil, web.faults = servers.re.compile(r"safetensors"), [fault] * 20
    out, err, status = release(tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "mine")
    assert status == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("release_zoo: reading the release back failed (")


def test_a_site_that_lags_behind_gets_no_line(web, by_hand, tmp_path):
    """The URL serves an earlier release: whole, and not this one."""
    write_zoo(by_hand, tmp_path / "old", NAMES[:3], 0)
    write_zoo(by_hand, tmp_path / "new", NAMES[:3], 20)
    assert release(tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "old")[2] == 0
    out, err, status = release(tmp_path / "next", "--url", web.url, "--zoo", tmp_path / "new")
    assert status == 1 and out == "" and f"for {NAMES[0]}, not " in err


def test_a_folder_keeps_what_released_packages_pin(web, by_hand, tmp_path, monkeypatch):
    old = write_zoo(by_hand, tmp_path / "old", NAMES[:3], 0)
    write_zoo(by_hand, tmp_path / "new", NAMES[:3], 20)
    assert release(tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "old")[2] == 0
    _, err, status = release(tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "new")
    assert status == 1 and "give this release a folder of its own" in err
    assert read(web.url, tmp_path / "cache", monkeypatch) == old


def test_a_folder_needs_the_url_that_it_is_read_at(tmp_path):
    _, err, status = release(tmp_path / "site")
    assert status == 2 and "--url" in err and not (tmp_path / "site").exists()


#: Runs the script, and kills it just before its n-th rename: what is on the disk then is there for good.
KILLED = """
import os, runpy, signal, sys
turns = int(sys.argv.pop(1))
def count(event, _):
    global turns
    if event == "os.rename":
        turns -= 1
        if not turns: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_kill_half_way_leaves_what_was_there_and_the_next_run_completes_it(
    web, by_hand, tmp_path, monkeypatch
):
    before = write_zoo(by_hand, tmp_path / "first", NAMES[:2], 0)
    made = write_zoo(by_hand, tmp_path / "mine", NAMES[:6], 0)
    assert release(tmp_path / "site", "--url", web.url, "--zoo", tmp_path / "first")[2] == 0
    words = [str(SCRIPT), str(tmp_path / "site"), "--url", web.url, "--zoo", str(tmp_path / "mine")]
    sizes = []
    for turn in (1, 2, 3, 4, 5, 2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(turn), *words], capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        there = read(web.url, tmp_path / "cache", monkeypatch)
        assert before.items() <= there.items() <= made.items()
        rows = Index.from_json((tmp_path / "site" / "index.json").read_bytes(), "index").rows
        assert {name: row.manifest_sha256 for name, row in rows.items()} == there
        sizes.append(len(there))
    assert sizes == sorted(sizes) and sizes[0] == 2 and 2 < sizes[-1] < 6
    out, _, status = release(*words[1:])
    assert status == 0 and out.startswith("DEFAULT_ZOO")
    assert read(web.url, tmp_path / "cache", monkeypatch) == made
    assert sorted(path.name for path in (tmp_path / "site").iterdir() if path.is_dir()) == NAMES[:6]
