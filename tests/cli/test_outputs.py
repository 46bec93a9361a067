"""What commands write: never over an input, before anything is printed, and with streams that are closed or full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from embedkit import cli as commands
from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.matching.calibration import Calibration
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.npy_write import write_npy
from embedkit.embeddings.parquet import write_rows
from embedkit.embeddings.schema import schema_of
from embedkit.errors import OutputError
from embedkit.images.originals import Originals
from embedkit.workflows.visual.atlas import write_atlas
from embedkit.workflows.visual.contact_sheet import Section, Tile, write_contact_sheet

METADATA = Metadata(
    entry="linear-tiny.noise", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True
)
ROWS = 40
COMMAND = [sys.executable, "-c", "from embedkit.cli import main; main()"]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX shells and descriptors")


@pytest.fixture
def folder(tmp_path, monkeypatch, by_hand) -> Path:
    """Images of four identities in folders, their embeddings, pairs, and an entry, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids = [f"p/{row % 4}/{row}.png" for row in range(ROWS)]
    for row, name in enumerate(ids):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (row, 0, 0)).save(name)
    vectors = (np.eye(8)[np.arange(ROWS) % 4] + rng.normal(0, 0.02, (ROWS, 8))).astype(np.float32)
    schema = schema_of(METADATA, {}, sha256=False)
    status = [os.stat(name) for name in ids]
    table = pa.table(
        {
            "id": ids,
            "part": [0] * ROWS,
            "embedding": list(vectors),
            "size": [one.st_size for one in status],
            "mtime_ns": [one.st_mtime_ns for one in status],
        },
        schema=schema,
    )
    write_rows([table], Path("e.parquet"), schema)
    write_npy([table], Path("n.npy"), METADATA, ROWS)
    Path("shards").mkdir()
    shutil.copy("e.parquet", "shards/part-00001-of-00001-00000.parquet")
    lines = ["a,b,same"]
    lines += [f"{ids[row]},{ids[row + 4]},1\n{ids[row]},{ids[row + 1]},0" for row in range(ROWS - 4)]
    Path("pairs.csv").write_text("\n".join(lines) + "\n")
    by_hand.TinyEntry().write(tmp_path / "linear-tiny.noise")
    os.symlink("e.parquet", "link.parquet")
    os.link("pairs.csv", "pairs.html")
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "line",
    [
        "cluster e.parquet -n 2 -o e.parquet",
        "cluster e.parquet -n 2 -o ./p/../e.parquet",
        "cluster e.parquet -n 2 -o link.parquet",
        "cluster link.parquet -n 2 -o e.parquet",
        "cluster n.npy -n 2 -o n.npy",
        "cluster n.npy -n 2 -o n.ids.jsonl",
        "cluster n.npy -n 2 -o n.metadata.json",
        "cluster shards -n 2 -o shards/part-00001-of-00001-00000.parquet",
        "cluster e.parquet -n 2 -o p/0/0.png",
        "cluster e.parquet -n 2 --draw-sheet p/0/0.png",
        "cluster e.parquet -n 2 -o new.html --draw-sheet new.html",
        "cluster e.parquet -n 2 -o new --copy-into new",
        "cluster e.parquet -n 2 --copy-into new -o new/c.parquet",
        "cluster e.parquet --algorithm dpmm --mixture m.safetensors -o m.safetensors",
        "cluster e.parquet -n 2 -o ",
        "duplicates e.parquet --threshold .99 --write-delete-list e.parquet",
        "duplicates e.parquet --threshold .99 --write-pairs e.parquet",
        "duplicates e.parquet --threshold .99 --write-delete-list p/0/0.png",
        "duplicates e.parquet --threshold .99 --write-pairs p/0/0.png",
        "duplicates e.parquet --threshold .99 --draw-sheet p/0/0.png",
        "duplicates e.parquet --threshold .99 --write-delete-list x --write-pairs x",
        "duplicates e.parquet --target-precision .9 --pairs pairs.csv --write-pairs pairs.csv",
        "duplicates e.parquet --target-precision .9 --pairs pairs.csv --draw-sheet pairs.html",
        "calibrate e.parquet --label-from-folder -o e.parquet",
        "calibrate e.parquet --pairs pairs.csv -o pairs.csv",
        "calibrate e.parquet --pairs pairs.csv -o p/0/0.png",
        "calibrate pairs.csv -o pairs.csv",
        "calibrate pairs.csv -o p/0/0.png",
        "calibrate p -o p/0/0.png",
        "search p/0/0.png e.parquet --draw-sheet p/0/0.png",
        "search p/0/0.png e.parquet --draw-sheet p/1/1.png",
        "search p/0/0.png e.parquet --cache-index e.parquet",
        "search p/0/0.png e.parquet --cache-index p/0/0.png",
        "verify p/0/0.png p/1/1.png --faces --draw-faces p/1/1.png",
        "atlas e.parquet -o e.parquet",
        "atlas n.npy --clusters pairs.html -o pairs.html",
        "embed p -o p --overwrite",
        "embed e.parquet -o e.parquet --overwrite",
        "embed *.parquet -o e.parquet --overwrite",
        "embed p/0/0.png -o p/0/0.png --overwrite",
        "export-onnx linear-tiny.noise -o linear-tiny.noise/model.onnx",
        "zoo bundle z.tar -o z.tar",
        "zoo bundle --zoo z.tar -o z.tar",
        "train simclr --data p -o p",
    ],
)
def test_an_output_that_is_an_input_is_refused_and_nothing_is_written(folder, line, monkeypatch, capsys):
    for name in ("m.safetensors", "z.tar"):
        Path(name).write_bytes(b"mine")
    before = snapshot(folder)
    monkeypatch.setattr(sys, "argv", ["embedkit", *line.split(" ")])
    with pytest.raises(SystemExit) as end:
        commands.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2 if err.startswith("embedkit: -") else 1, ""), err
    assert err.startswith("embedkit: ") and err.count("\n") == 1
    assert any(
        words in err
        for words in (
            "is also",
            "one of the embedded images",
            "not a regular file",
            "which holds only images",
            "expected X.parquet",
        )
    ), err
    assert snapshot(folder) == before


def test_functions_refuse_it_too(folder):
    before = snapshot(folder)
    os.symlink("e.parquet", "e.html")
    with pytest.raises(OutputError, match="is also the input"):
        write_atlas("e.parquet", "e.html")
    for path in ("p/0/0.png", "p/1/1.png"):
        with pytest.raises(OutputError, match="one of the embedded images"):
            write_contact_sheet(
                path, "t", [Section("s", [Tile(name="p/0/0.png"), Tile(name="p/1/1.png")])], Originals()
            )
    os.unlink("e.html")
    assert snapshot(folder) == before


# --- files first ------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("sink", ["gone", "full", "closed"])
def test_files_are_written_before_anything_is_printed(folder, sink):
    lines = [
        "duplicates e.parquet --threshold .99 --write-delete-list del.txt --write-pairs new.csv --draw-sheet d.html",
        "cluster e.parquet -n 4 -o c.parquet --copy-into out --draw-sheet c.html",
        "search p/0/0.png e.parquet --draw-sheet s.html",
        "calibrate e.parquet --label-from-folder --target-fmr 0.3 -o c.json",
    ]
    if not os.path.exists("/dev/full") and sink == "full":
        pytest.skip("no /dev/full")
    for line in lines:
        redirect = {"gone": "", "full": ">/dev/full", "closed": ">&-"}[sink]
        done = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirect}', "sh", *COMMAND, *line.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.stdout is not None
        done.stdout.close()
        _, err = done.communicate(timeout=60)
        assert done.returncode == (0 if sink == "gone" else 1) and "Traceback" not in err, err
        said = [text for text in err.splitlines() if "standard output cannot be written to" in text]
        assert len(said) == (0 if sink == "gone" else 1)
    for name in ("del.txt", "new.csv", "d.html", "c.html", "s.html", "out/cluster-0"):
        assert Path(name).exists(), name
    assert len(Path("del.txt").read_text().splitlines()) == ROWS - 4
    assert len(Clustering.load("c.parquet").ids) == ROWS
    assert Calibration.load("c.json").identities == 4


# --- standard streams -------------------------------------------------------------------------------------


def shell(line: str, redirect: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *COMMAND, *line.split()],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@posix
@pytest.mark.parametrize(
    "line",
    ["--help", "--version", "zoo list", "zoo list --json", "doctor", "lint e.parquet", "lint e.parquet --json",
     "leaks e.parquet e.parquet --threshold .9", "zoo info linear-tiny.noise/", "train --list", "zoo --help"],
)  # fmt: skip
def test_output_that_is_full_or_closed(folder, line):
    if line == "train --list":
        pytest.importorskip("torch")
    for redirect in (">&-", ">/dev/full") if os.path.exists("/dev/full") else (">&-",):
        done = shell(line, redirect)
        assert done.returncode == 1, done.stderr
        assert done.stderr.splitlines()[-1].startswith("embedkit: standard output cannot be written to (")
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@posix
def test_embed_with_streams_that_are_closed(folder):
    done = shell("embed p -o a.parquet --encoder ./linear-tiny.noise", "<&-")
    assert done.returncode == 0 and f"{ROWS} embedded" in done.stderr
    done = shell("embed - -o b.parquet --encoder ./linear-tiny.noise", "<&-")
    assert (done.returncode, done.stderr) == (
        1,
        "embedkit: standard input cannot be read (it is closed)\n",
    )
    done = shell("embed p -o c.parquet --encoder ./linear-tiny.noise", ">&-")  # it prints nothing there
    assert done.returncode == 0 and f"{ROWS} embedded" in done.stderr
    for redirect in ("2>&-", "2>/dev/full"):
        done = shell("embed p -o d.parquet --encoder ./linear-tiny.noise --json --overwrite", redirect)
        assert done.returncode == 0 and json.loads(done.stdout)["images"] == ROWS
    done = shell("embed nowhere -o f.parquet", "2>&-")
    assert (done.returncode, done.stdout) == (1, "")
    done = shell("embed p -o g.parquet --encoder ./linear-tiny.noise", "<&- >&- 2>&-")
    assert done.returncode == 0
    for name in "acdg":  # what was printed has not gone into a file that was opened later
        assert Path(f"{name}.parquet").read_bytes()[-4:] == b"PAR1"


# --- terminals --------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;title\x07\x1b[31m"


@posix
def test_no_name_reaches_the_terminal_as_it_is(folder, by_hand, monkeypatch, capsys):
    """File names, suffixes, label columns, entries' names and cards, in every command that prints them."""
    import pyarrow.parquet as pq

    from embedkit.embeddings.metadata import METADATA_KEY

    for name in (f"p/x.{ESCAPE}", f"p/0/{ESCAPE}.jpg", f"p/0/{ESCAPE}.png"):
        Path(name).write_bytes(b"x")
    Path(f"d{ESCAPE}").mkdir()
    table = pq.read_table("e.parquet")
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    metadata["entry"] = "x" + ESCAPE
    table = table.set_column(
        0, table.schema.field(0), pa.array([f"{name}{ESCAPE}" for name in table["id"].to_pylist()])
    )
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()}), "evil.parquet"
    )
    entry = by_hand.TinyEntry()
    config = json.loads(entry.files()["config.json"])
    config["embedkit"]["license"] = "MIT" + ESCAPE
    entry.write(folder / "zoo" / "linear-tiny.noise", {
        **entry.files(), "config.json": json.dumps(config).encode(), "README.md": ESCAPE.encode()
    })  # fmt: skip
    runs = [
        ["embed", "p", "-o", "x.parquet", "--encoder", "./linear-tiny.noise"],
        ["embed", f"d{ESCAPE}", "-o", "x.parquet", "--encoder", "./linear-tiny.noise"],
        ["embed", "p", "-o", f"{ESCAPE}.parquet", "--encoder", "./linear-tiny.noise"],
        ["embed", "p", "--nope" + ESCAPE],
        ["embed", "p", "--batch-size", ESCAPE],
        [ESCAPE],
        ["calibrate", "evil.parquet", "--label-from-folder", "--target-fmr", "0.3", "-o", "c.json"],
        ["lint", "evil.parquet"],
        ["search", f"p/0/0.png{ESCAPE}", "evil.parquet"],
        ["search", "p/0/0.png", "evil.parquet"],
        ["cluster", "evil.parquet", "-n", "2", "--copy-into", "sorted"],
        ["cluster", "evil.parquet", "-n", "2", "--label", ESCAPE],
        ["duplicates", "evil.parquet", "--threshold", "0.9", "--write-delete-list", "del.txt"],
        ["leaks", "evil.parquet", "evil.parquet", "--threshold", "0.9"],
        ["atlas", "evil.parquet", "-o", "a.html", "--map", "pca"],
        ["zoo", "list", "--zoo", "zoo"],
        ["zoo", "info", "./zoo/linear-tiny.noise"],
        ["zoo", "verify", "./zoo/linear-tiny.noise"],
    ]
    for arguments in runs:
        monkeypatch.setattr(sys, "argv", ["embedkit", *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit):  # `main` shows warnings in its own way
            commands.main()
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x07" not in out + err, arguments
        assert "Traceback" not in err
