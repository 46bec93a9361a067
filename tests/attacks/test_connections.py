"""No connection unless one was asked for, and no file but the output, the cache and the scratch folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit import embed
from embedkit.analysis.matching.calibration import Calibration
from embedkit.analysis.neighbors import SearchIndex
from embedkit.analysis.vectors import Rows
from embedkit.errors import ConfigError, OutputError, SpaceMismatchError
from embedkit.hub.access import Access, is_offline
from embedkit.hub.publish.publish import publish, unpublish
from embedkit.hub.resolve import DEFAULT_ENCODER, find_entry
from embedkit.workflows.calibrate import calibrate_images
from embedkit.workflows.doctor import examine
from embedkit.workflows.embedding import encoder_of_images
from embedkit.workflows.identify import identify_images
from embedkit.workflows.search import open_index, search

#: Seconds that a child lives on: ONNX Runtime's telemetry looks its host up about ten seconds after the import.
LIFE = 20

WORK = f"""
import sys, time
from pathlib import Path
from embedkit import cli
import embedkit
from embedkit.workflows.doctor import examine

def run(*words):
    sys.argv = ["embedkit", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)

embedkit.load_encoder(local_files_only=True).encode("images/0.png")
run("embed", "images", "-o", "out/x.parquet", "--local-files-only")
run("search", "query.png", "out/x.parquet", "-k", "2")
run("verify", "images/0.png", "images/1.png", "--threshold", "0.5")
run("zoo", "verify", embedkit.load_encoder().name)
assert not [problem for problem in examine().problems if "telemetry" in problem]
time.sleep({LIFE})
"""


def child(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """A fresh interpreter, its environment without ONNX Runtime's variable unless it is given."""
    changes = {"ORT_DISABLE_TELEMETRY": None, **environment}
    kept = {name: value for name, value in os.environ.items() if name not in changes}
    given = {name: value for name, value in changes.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **given}, timeout=300
    )


def test_four_commands_open_no_socket_and_write_nowhere_else(tmp_path):
    """Looked at from outside, by the kernel's own list of calls."""
    strace = shutil.which("strace")
    if strace is None or sys.platform != "linux":
        pytest.skip("needs strace")
    if subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    zoos = {name: tmp_path / name for name in ("home", "cache", "out", "images", "tmp")}
    for zoo in zoos.values():
        zoo.mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(zoos["images"] / f"{seed}.png")
    environment = {
        **{
            name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
        },
        "HOME": str(zoos["home"]),
        "TMPDIR": str(zoos["tmp"]),
        "EMBEDKIT_CACHE": str(zoos["cache"]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    shutil.copy(zoos["images"] / "0.png", tmp_path / "query.png")
    log = tmp_path / "log"
    calls = "trace=socket,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
    done = subprocess.run(
        [strace, "-f", "-qq", "-e", calls, "-o", str(log), sys.executable, "-c", WORK],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if re.search(r"socket\(AF_INET6?\b", line)] == []
    allowed = (*(str(zoos[name]) for name in ("out", "cache", "tmp")), "/dev/", "/proc/", "out/")
    written = set()
    for line in lines:
        if " = -1 " in line or not re.search(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|mkdir|rename", line):
            continue
        written.update(path for path in re.findall(r'"([^"]*)"', line) if not path.startswith(allowed))
    assert written - {str(zoo) for zoo in zoos.values()} == set()
    assert not any(path.is_file() for path in zoos["home"].rglob("*"))


# --- telemetry --------------------------------------------------------------------------------------------

SAY = (
    "import os; from embedkit.model import providers; providers.onnxruntime(); "
    "print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
)


def test_telemetry_is_off_unless_the_user_decides():
    assert child(SAY).stdout == "1\n"
    assert child(SAY, ORT_DISABLE_TELEMETRY="0").stdout == "0\n"
    assert (
        child("import onnxruntime; " + SAY).stdout == "None\n"
    )  # too late; nothing of the host's is changed


def test_doctor_says_that_telemetry_is_on_where_the_host_imported_first(tiny_entry):
    code = "from embedkit.workflows.doctor import examine; print([x for x in examine().problems if 'telemetry' in x])"
    assert child(code).stdout == "[]\n"
    said = child("import onnxruntime; " + code).stdout
    assert "ONNX Runtime's telemetry is on" in said and "set ORT_DISABLE_TELEMETRY=1" in said
    assert "ONNX Runtime's telemetry is on" in child(code, ORT_DISABLE_TELEMETRY="0").stdout
    assert child("import onnxruntime; " + code, ORT_DISABLE_TELEMETRY="1").stdout == "[]\n"


def test_doctor_opens_no_connection(site, monkeypatch):
    """Not even where a lock file asks for a version that only a remote zoo might have."""
    monkeypatch.setenv("EMBEDKIT_ZOO", site.url)
    pin = {"zoo": site.url, "revision": "0" * 64, "manifest_sha256": "0" * 64}
    Path("embedkit.lock").write_text(json.dumps({"schema": 1, "entries": {DEFAULT_ENCODER: pin}}))
    assert any("embedkit.lock pins" in problem for problem in examine().problems)
    assert site.requests == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_ends(tiny_entry):
    """With ONNX Runtime's telemetry threads in the parent, a child that ends as processes do hangs for ever."""
    code = f"""
import os, sys, time, warnings
warnings.simplefilter("ignore")
import embedkit
embedkit.load_encoder({str(tiny_entry)!r}, threads=1)
child = os.fork()
if child == 0:
    sys.exit(0)
end = time.monotonic() + 60
while time.monotonic() < end and not os.waitpid(child, os.WNOHANG)[0]:
    time.sleep(0.01)
print("ended" if time.monotonic() < end else "hangs")
if time.monotonic() >= end:
    os.kill(child, 9)
os._exit(0)
"""
    assert child(code).stdout == "ended\n"


# --- offline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)]
)
def test_what_counts_as_offline(monkeypatch, name, value, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(name, value)
    assert is_offline() == Access().offline == offline
    assert Access(local_files_only=True).offline


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nothing_is_asked_and_nothing_is_published(site, zoo, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(Exception, match="is not in the cache, and no connection may be opened"):
        find_entry(f"{site.url}/linear-tiny.noise")
    entry = find_entry(zoo / "linear-tiny.noise")
    for act in (
        lambda: publish(entry, "hf://team"),
        lambda: publish(entry, "s3://bucket/zoo"),
        lambda: unpublish("linear-tiny.noise", "hf://team"),
    ):
        with pytest.raises(
            ConfigError, match="needs a connection, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
        ):
            act()
    assert site.requests == []


# --- what a file says -------------------------------------------------------------------------------------


def doctored(path: Path, entry: str) -> None:
    """Let a Parquet file or a calibration name another encoder."""
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "entry": entry}))
        return
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    metadata = {**json.loads(table.schema.metadata[b"embedkit"]), "entry": entry}
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"embedkit": json.dumps(metadata).encode()}),
        path,
    )


@pytest.fixture
def searched(zoo, tmp_path, monkeypatch) -> Path:
    """Embeddings of eight noise images of four identities, by the zoo's encoder; a calibration beside them."""
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    folder = tmp_path / "people"
    for person in range(6):
        for shot in range(4):
            rng = np.random.default_rng([person, 0])
            pixels = rng.integers(0, 256, (8, 8, 3)) // 2 + np.random.default_rng([person, shot]).integers(
                0, 100, (8, 8, 3)
            )
            path = folder / str(person) / f"{shot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    shutil.copy(folder / "0" / "0.png", tmp_path / "query.png")  # not the name of a row
    embed([folder], output=tmp_path / "x.parquet", encoder="linear-tiny")
    found = calibrate_images(str(folder), 0.3, encoder="linear-tiny").calibration
    found.save(tmp_path / "c.json")
    return tmp_path


SAYS = ["{url}/linear-tiny.noise", "{zoo}/linear-tiny.noise", "../zoo/linear-tiny.noise", "./linear-tiny.noise",
        "file://{zoo}/linear-tiny.noise", "hf://org/linear-tiny.noise", "~/x", "linear-tiny@latest", "..",
        "\n"]  # fmt: skip


@pytest.mark.parametrize("says", SAYS)
def test_a_url_or_a_path_in_a_file_is_not_opened(searched, zoo, site, monkeypatch, says):
    """What a downloaded file of embeddings, an index or a calibration names decides what is loaded and run."""
    monkeypatch.chdir(searched / "work")
    evil = says.format(url=site.url, zoo=zoo)
    doctored(searched / "x.parquet", evil)
    images = [str(searched / "query.png")]
    SearchIndex.build(Rows(searched / "x.parquet"), "flat").save(searched / "x.index")
    opened: list[object] = []
    monkeypatch.setattr("embedkit.workflows.embedding.load_encoder", lambda *a, **k: opened.append(a))
    monkeypatch.setattr("embedkit.workflows.embedding.find_entry", lambda *a, **k: opened.append(a))
    refusal = "is not the name of an entry, and a URL or a path in a file is never opened"
    for source in ("x.parquet", "x.index"):
        with pytest.raises(ConfigError, match=refusal):
            search(open_index(searched / source), images)
    with pytest.raises(ConfigError, match="name the encoder with --encoder"):
        identify_images(images, searched / "x.parquet", identity_from_folder=True, threshold=0.5)
    doctored(searched / "c.json", evil)
    with pytest.raises(ConfigError, match="the calibration names .* name the encoder with --encoder"):
        encoder_of_images(calibration=Calibration.load(searched / "c.json"))
    assert opened == [] and site.requests == []


def test_embeddings_that_name_no_encoder_are_refused(searched):
    doctored(searched / "x.parquet", "")
    with pytest.raises(OutputError, match="entry: expected text, found ''"):
        Rows(searched / "x.parquet")


def test_the_encoder_of_a_file_is_the_one_of_its_space(searched, zoo, by_hand, caplog):
    query = [str(searched / "query.png")]
    base = open_index(searched / "x.parquet")
    assert search(base, query) and not caplog.records
    # The card was edited: another manifest, the same space.
    entry = by_hand.TinyEntry()
    entry.write(zoo / "linear-tiny.noise", {**entry.files(), "README.md": b"# Edited"})
    by_hand.write_index(zoo)
    assert search(base, query) and "both give the same space" in caplog.text
    # Another encoder under the name.
    by_hand.TinyEntry(seed=1).write(zoo / "linear-tiny.noise")
    by_hand.write_index(zoo)
    with pytest.raises(SpaceMismatchError, match="a query must be embedded by the same encoder"):
        search(base, query)
    known = Calibration.load(searched / "c.json")
    with pytest.raises(SpaceMismatchError, match="the calibration is of linear-tiny.noise"):
        encoder_of_images(calibration=known)
    own = entry.write(searched / "own" / "linear-tiny.noise")
    assert search(base, query, encoder=own)
    assert encoder_of_images(own, calibration=known).name == "linear-tiny.noise"
