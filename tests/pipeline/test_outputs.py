"""What a job may delete and replace, what it says of older rows, and outputs that are damaged, foreign or full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedkit
from embedkit.embeddings.formats import output_format
from embedkit.embeddings.table import Embeddings
from embedkit.images.sources import PathList
from embedkit.pipeline.report import Progress
from embedkit.pipeline.scope import Scope


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(sum(f"{folder.name}/{name}".encode())).integers(0, 256, (9, 12, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def cats(tmp_path) -> Path:
    return draw(tmp_path / "cats", "a.png", "b.png", "c.png")


@pytest.fixture
def dogs(tmp_path) -> Path:
    return draw(tmp_path / "dogs", "d.png", "e.png")


def names(source) -> list[str]:
    return [Path(name).name for name in Embeddings.load(source).ids]


# --- rows of other sources ----------------------------------------------------------------------------------


def test_prune_drops_rows_of_the_sources_or_without_a_file(cats, dogs, tmp_path, tiny):
    output = tmp_path / "images.parquet"
    embedkit.embed(cats, output, encoder=tiny)
    (cats / "a.png").unlink()
    (dogs / "d.png").unlink()
    report = embedkit.embed(dogs, output, encoder=tiny)
    assert (report.images, report.kept, report.gone) == (1, 3, 1)
    assert f"{output} also holds 3 rows of images outside these sources, from earlier runs" in report.notes
    assert "1 of the kept rows have no file any more; --prune drops them" in report.notes
    report = embedkit.embed(dogs, output, encoder=tiny, prune=True)
    assert (report.removed, report.kept, report.gone) == (1, 3, 0)
    assert names(output) == ["b.png", "c.png", "e.png"]
    # What lies in the sources and is listed no more goes, though its file is there.
    draw(cats, "f.png")
    (cats / "b.png").rename(cats / ".b.png")
    report = embedkit.embed(cats, output, encoder=tiny, prune=True)
    assert (report.images, report.removed) == (1, 1) and names(output) == ["c.png", "e.png", "f.png"]


@pytest.mark.parametrize(
    ("sources", "root", "recursive", "name", "covered"),
    [
        (["cats"], None, True, "cats/a.png", True),
        (["cats/"], None, True, "{}/cats/x/a.png", True),
        (["cats"], None, False, "cats/x/a.png", False),
        (["cats"], None, False, "cats/a.png", True),
        (["cat"], None, True, "cats/a.png", False),
        (["."], None, True, "cats/a.png", True),
        (["ca*"], None, True, "cats/a.png", True),
        (["cats/a.png"], None, True, "cats/a.png", True),
        (["cats/b.png"], None, True, "cats/a.png", False),
        (["a.tar"], None, True, "a.tar::x/a.png", True),
        (["b.tar"], None, True, "a.tar::x/a.png", False),
        ([PathList(["cats/a.png"])], None, True, "a.tar::x/a.png", True),
        ([PathList(["cats/a.png"])], None, True, "cats/a.png", False),
        (["cats"], "cats", True, "a.png", True),
        (["cats"], None, True, "file:cats/%FF.png", True),
    ],
)
def test_what_sources_cover(tmp_path, monkeypatch, cats, sources, root, recursive, name, covered):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.tar").touch()
    scope = Scope(sources, root, recursive, ["a.tar::other.png"])
    assert scope.covers(name.format(tmp_path)) == covered


def test_files_of_rows(tmp_path, monkeypatch, cats):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    scope = Scope(["cats"], None, True, [])
    for name in ("cats/a.png", f"{cats}/b.png", "a.tar::x.png", "file:cats/%61.png"):
        assert scope.has_file(name), name
    for name in ("cats/z.png", "b.tar::x.png", "file:cats/%FF.png", "cats/a.png/x"):
        assert not scope.has_file(name), name


# --- what is deleted ----------------------------------------------------------------------------------------


class Stopping(Progress):
    """Ends a job before its first shard, after `act`."""

    def __init__(self, act):
        self.act = act

    def start(self, total: int) -> None:
        self.act()
        raise KeyboardInterrupt


def test_a_worker_that_ends_early_leaves_the_shards_of_others(cats, tmp_path, tiny):
    folder = (
        tmp_path / "shards"
    )  # ids are relative to the root: a part is a function of the id, not of this path

    def other() -> None:
        embedkit.embed(cats, f"{folder}/", encoder=tiny, worker=(2, 2), root=cats)

    with pytest.raises(KeyboardInterrupt):
        embedkit.embed(cats, f"{folder}/", encoder=tiny, worker=(1, 2), root=cats, progress=Stopping(other))
    assert (folder / "_done-00002-of-00002.json").exists()
    embedkit.embed(cats, f"{folder}/", encoder=tiny, worker=(1, 2), root=cats)
    assert sorted(names(folder)) == ["a.png", "b.png", "c.png"]
    with pytest.raises(KeyboardInterrupt):
        embedkit.embed(cats, f"{tmp_path}/new/", encoder=tiny, progress=Stopping(lambda: None))
    assert not (tmp_path / "new").exists(), "a folder that the job made, and left empty, goes"


def test_a_folder_of_the_user_stays(cats, tmp_path, tiny):
    partial = tmp_path / "o.parquet.partial"
    (partial / "deep").mkdir(parents=True)
    mine = ("notes.txt", "deep/x", "part-1.parquet", "part-00001-of-00001-x.parquet")
    for name in mine:
        (partial / name).write_text("mine")
    for _ in range(2):
        embedkit.embed(cats, tmp_path / "o.parquet", encoder=tiny, overwrite=True)
        assert {str(path.relative_to(partial)) for path in partial.rglob("*")} == {*mine, "deep"}
    (partial / "part-00001-of-00001-000000.parquet").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(embedkit.OutputError, match="000000.parquet"):
            embedkit.embed(cats, tmp_path / "o.parquet", encoder=tiny, overwrite=overwrite)
    assert (partial / "part-00001-of-00001-000000.parquet").read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "foreign"),
    [
        ("x.parquet", "x.errors.parquet"),
        ("x.npy", "x.npy.errors.parquet"),
        ("x.npy", "x.ids.jsonl"),
        ("x.npy", "x.metadata.json"),
        ("x/", "x/_errors-00001-of-00001.parquet"),
    ],
)
@pytest.mark.parametrize("content", ["text", "parquet", "json", "link"])
def test_files_of_others_are_not_replaced(dogs, tmp_path, tiny, output, foreign, content):
    (dogs / "bad.png").write_bytes(b"")
    (tmp_path / "x").mkdir()
    path = tmp_path / foreign
    if content == "parquet":
        pq.write_table(pa.table({"id": ["x"], "reason": ["y"]}), path)
    elif content == "link":
        (tmp_path / "precious").write_text("of the user")
        path.symlink_to(tmp_path / "precious")
    else:
        path.write_text('{"id": 3}\n' if content == "json" else "of the user")
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(embedkit.OutputError, match="was not written by embedkit"):
            embedkit.embed(dogs, f"{tmp_path}/{output}", encoder=tiny, overwrite=overwrite)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_overwrite_replaces_embeddings_only(dogs, tmp_path, tiny, name):
    output = tmp_path / name
    if name == "x.npy":
        np.save(output, np.zeros((3, 4), np.float32))
    else:
        pq.write_table(pa.table({"x": [1]}), output)
    before = output.read_bytes()
    with pytest.raises(embedkit.OutputError, match="was not written by embedkit"):
        embedkit.embed(dogs, output, encoder=tiny, overwrite=True)
    assert output.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    output.unlink()
    embedkit.embed(dogs, output, encoder=tiny)
    assert embedkit.embed(dogs, output, encoder=tiny, overwrite=True).images == 2


def test_outputs_that_are_sources_or_have_no_name(cats, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(cats / "a.png", "x.parquet")
    shutil.copy(cats / "a.png", "y.errors.parquet")
    shutil.copy(cats / "a.png", "z.ids.jsonl")
    os.symlink("x.parquet", "link.parquet")
    before = {path: path.read_bytes() for path in tmp_path.glob("?.*")}
    for source, output in (
        ("x.parquet", "x.parquet"),
        ("x.parquet", "./link.parquet"),
        ("y.errors.parquet", "y.parquet"),
        ("z.ids.jsonl", "z.npy"),
        ("cats", "cats/"),
    ):
        with pytest.raises(embedkit.OutputError, match="is also the input"):
            embedkit.embed(source, output, encoder=tiny, overwrite=True)
    with pytest.raises(embedkit.ConfigError, match="the name is empty"):
        embedkit.embed(cats, "", encoder=tiny)
    assert {path: path.read_bytes() for path in tmp_path.glob("?.*")} == before
    assert len(list(cats.iterdir())) == 3


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_an_output_that_is_a_link_is_written_through(cats, dogs, tmp_path, tiny, suffix):
    (tmp_path / "data").mkdir()
    link, real = tmp_path / f"link{suffix}", tmp_path / "data" / f"real{suffix}"
    link.symlink_to(real)
    (cats / "bad.png").write_bytes(b"")
    embedkit.embed(cats, link, encoder=tiny)
    report = embedkit.embed([cats, dogs], real, encoder=tiny)
    assert (report.images, report.kept) == (2, 3)
    report = embedkit.embed([cats, dogs], link, encoder=tiny)
    assert (report.images, report.kept) == (0, 5) and link.is_symlink()
    assert names(link) == names(real) and len(names(real)) == 5
    assert Path(report.errors).parent == real.parent
    assert {path.name for path in tmp_path.iterdir()} == {"cats", "dogs", "data", link.name}


def test_every_output_has_errors_of_its_own(tmp_path):
    def errors_path(name: str) -> Path:
        form = output_format(name)
        return form.errors_path(form.locate(name))

    outputs = ("x.parquet", "x.npy", "lance://x", "x.y.npy", "x.y.parquet")
    assert len(set(map(errors_path, outputs))) == len(outputs)
    assert errors_path("d/x.parquet") == Path("d/x.errors.parquet")


# --- files that belong together -----------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["out.npy", "out.ids.jsonl", "out.metadata.json"])
def test_one_file_of_another_version_is_noticed_and_repaired(cats, dogs, tmp_path, tiny, changed):
    output = tmp_path / "out.npy"
    embedkit.embed(cats, output, encoder=tiny)
    old = (tmp_path / changed).read_bytes()
    (cats / "a.png").unlink()
    draw(cats, "z.png")
    embedkit.embed(cats, output, encoder=tiny, prune=True)
    (tmp_path / changed).write_bytes(old)
    with pytest.raises(embedkit.OutputError, match="do not belong together"):
        Embeddings.load(output)
    with pytest.raises(embedkit.OutputError, match="are not in these sources; name their sources too"):
        embedkit.embed(dogs, output, encoder=tiny)
    report = embedkit.embed(cats, output, encoder=tiny, prune=True)
    assert report.images == 3 and any("did not belong together" in note for note in report.notes)
    found = Embeddings.load(output)
    assert np.abs(found.vectors - tiny.encode(found.ids)).max() < 1e-5 and len(found) == 3


def test_labels_of_an_array_keep_their_types(tmp_path, tiny, jpeg_maker):
    source = tmp_path / "s.parquet"
    table = {
        "image": [jpeg_maker(i, 20, 20) for i in range(2)],
        "n": pa.array([1, 2], pa.int16()),
        "id": ["A", "B"],
        "source_id": ["C", "D"],
    }
    pq.write_table(pa.table(table), source)
    for name in ("o.npy", "o.parquet"):
        embedkit.embed(source, tmp_path / name, encoder=tiny)
        assert embedkit.embed(source, tmp_path / name, encoder=tiny).kept == 2
        labels = Embeddings.load(tmp_path / name).labels
        assert labels == {"n": [1, 2], "source_id": ["A", "B"], "source_source_id": ["C", "D"]}


# --- disks and file systems ---------------------------------------------------------------------------------

LIMITED = "import embedkit.pipeline.batches as b; b.SHARD_ROWS = 1; from embedkit.cli import main; main()"


@pytest.mark.parametrize(("limit", "kept"), [(1000, False), (9000, True)])
@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "x/"])
def test_a_full_disk(tmp_path, by_hand, name, limit, kept):
    """RLIMIT_FSIZE stands for the full disk: no shard fits, or all do and the assembled file does not."""
    entry = by_hand.TinyEntry(dim=512).write(tmp_path / "linear-wide.noise")
    source = draw(tmp_path / "in", *(f"{i}.png" for i in range(8)))
    words = ["embed", source, "-o", f"{tmp_path}/{name}", "--encoder", entry, "--batch-size", 1]
    command = [sys.executable, "-c", LIMITED, *map(str, words)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    if kept and name == "x/":
        assert done.returncode == 0
        return
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1 and "the disk is full" in done.stderr
    assert ("what is embedded so far is kept" in done.stderr) == kept
    left = {path.name for path in tmp_path.iterdir()} - {"in", "linear-wide.noise"}
    assert left == ({f"{name}.partial"} if kept else set())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and len(Embeddings.load(f"{tmp_path}/{name}")) == 8
    assert ("8 kept" in done.stderr) == kept


def has_mounts() -> bool:
    try:
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not has_mounts(), reason="unshare is not there, or not allowed")
def test_a_full_disk_under_an_array(tmp_path, by_hand):
    """A tmpfs that holds the shards and not the array: a mapped page without a block would end the process."""
    entry = by_hand.TinyEntry(dim=4096).write(tmp_path / "linear-wide.noise")
    source = draw(tmp_path / "in", *(f"{i}.png" for i in range(24)))
    (tmp_path / "disk").mkdir()
    words = f"embed {source} -o {tmp_path}/disk/x.npy --encoder {entry} --batch-size 4"
    code = "from embedkit.cli import main; main()"
    script = f"""
mount -t tmpfs -o size=600k tmpfs {tmp_path}/disk || exit 77
{sys.executable} -c '{code}' {words}; echo $?; ls -A {tmp_path}/disk
mount -o remount,size=10m {tmp_path}/disk
{sys.executable} -c '{code}' {words}; echo $?; ls -A {tmp_path}/disk"""
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("no tmpfs can be mounted")
    first = ["1", "x.npy.partial"]
    assert done.stdout.split() == [*first, "0", "x.ids.jsonl", "x.metadata.json", "x.npy"], done
    assert "the disk is full" in done.stderr and "what is embedded so far is kept" in done.stderr
    assert "24 kept" in done.stderr


def test_a_file_system_without_locks(cats, tmp_path, tiny, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524):
        monkeypatch.setattr(fcntl, "flock", flock)
        report = embedkit.embed(cats, tmp_path / f"{code}.parquet", encoder=tiny)
        assert any("has no locks" in note for note in report.notes) and report.images == 3
    assert not list(tmp_path.glob("*.partial"))
    code = errno.EIO
    with pytest.raises(embedkit.OutputError, match="Input/output error"):
        embedkit.embed(cats, tmp_path / "x.parquet", encoder=tiny)


def test_names_with_a_colon(cats, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("s3:x.parquet", "s3:x.npy"):
        embedkit.embed("cats", name, encoder=tiny)
        assert embedkit.embed("cats", name, encoder=tiny).kept == 3 and len(Embeddings.load(name)) == 3


def test_a_user_without_a_home_folder(tmp_path, monkeypatch):
    import pwd

    from embedkit.hub.access import default_cache_dir
    from embedkit.hub.resolve import zoos

    def missing(*_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "EMBEDKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", missing)
    assert default_cache_dir().endswith(f"embedkit-{os.getuid()}")
    zoos()


# --- damaged and foreign files ------------------------------------------------------------------------------


def rows_of(tmp_path, cats, tiny) -> pa.Table:
    embedkit.embed(cats, tmp_path / "base.parquet", encoder=tiny)
    return pq.read_table(tmp_path / "base.parquet")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("size", None),
        ("mtime_ns", None),
        ("part", None),
        ("size", pa.array(["x"] * 3)),
        ("mtime_ns", pa.array([1.5] * 3)),
        ("id", pa.nulls(3, pa.string())),
        ("id", pa.array([[1]] * 3)),
        ("embedding", pa.array([[1.0]] * 3)),
        ("label", pa.array([{"a": 1}] * 3)),
        ("sha256", pa.array([1] * 3)),
        ("id twice", pa.array(["x"] * 3)),
        ("label twice", pa.array(["x"] * 3)),
    ],
)
def test_a_file_that_another_program_changed(cats, tmp_path, tiny, column, values):
    table = rows_of(tmp_path, cats, tiny)
    if column in table.column_names:
        table = table.drop_columns([column])
    if values is not None:
        name, _, twice = column.partition(" ")
        for _ in range(2 if name == "label" and twice else 1):
            table = table.append_column(name, values)
    pq.write_table(table, tmp_path / "x.parquet")
    before = (tmp_path / "x.parquet").read_bytes()
    with pytest.raises(embedkit.OutputError) as caught:
        embedkit.embed(cats, tmp_path / "x.parquet", encoder=tiny)
    assert "\n" not in str(caught.value) and (tmp_path / "x.parquet").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("column", ["label", "id"])
def test_a_column_that_unfolds(cats, tmp_path, tiny, column):
    """Some kilobytes of file; 4 MB in each of 100 rows."""
    table = rows_of(tmp_path, cats, tiny).take(pa.array([0] * 10))
    if column in table.column_names:
        table = table.drop_columns([column])
    table = table.append_column(column, pa.array(["x" * 4_000_000] * 10))
    path = tmp_path / "x.parquet"
    with pq.ParquetWriter(path, table.schema, compression="zstd", dictionary_pagesize_limit=1 << 30) as file:
        for _ in range(10):
            file.write_table(table)
    assert path.stat().st_size < 100_000
    for act in (Embeddings.load, lambda path: embedkit.embed(cats, path, encoder=tiny)):
        with pytest.raises(embedkit.OutputError, match=f"the column '{column}' takes 400 MB in memory"):
            act(path)


def test_ids_of_an_array_of_the_wrong_kind(cats, tmp_path, tiny):
    output, ids = tmp_path / "e.npy", tmp_path / "e.ids.jsonl"
    embedkit.embed(cats, output, encoder=tiny)
    lines = [json.loads(line) for line in ids.read_text().splitlines()]
    values = [True, 1 << 63, 1e308, float("nan"), "", "x", [], {}, [[1]]]
    for key in ("size", "mtime_ns", "sha256"):
        for value in values:
            if key == "sha256" and isinstance(value, str):
                continue
            ids.write_text("\n".join(json.dumps({**line, key: value}) for line in lines) + "\n")
            for act in (Embeddings.load, lambda path: embedkit.embed(cats, path, encoder=tiny)):
                with pytest.raises(embedkit.OutputError) as caught:
                    act(output)
                assert "\n" not in str(caught.value)
    ids.unlink()
    os.mkfifo(ids)
    for act in (Embeddings.load, lambda path: embedkit.embed(cats, path, encoder=tiny)):
        with pytest.raises(embedkit.OutputError):
            act(output)


def test_a_table_of_others_is_not_written_over(cats, tmp_path, tiny):
    lance = pytest.importorskip("lance")
    (tmp_path / "db").mkdir()
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "db" / "t.lance"))
    for overwrite in (False, True):
        with pytest.raises(embedkit.OutputError, match="embedkit did not write it|not written by embedkit"):
            embedkit.embed(cats, f"lance://{tmp_path}/db/t", encoder=tiny, overwrite=overwrite)
    assert lance.dataset(str(tmp_path / "db" / "t.lance")).count_rows() == 1
