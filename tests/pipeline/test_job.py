"""The folder job: what is killed goes on, what is there is kept, and equal work gives equal bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedkit
from embedkit.embeddings.parquet import read_metadata
from embedkit.embeddings.table import Embeddings
from embedkit.pipeline import batches
from embedkit.pipeline import job as job_module
from embedkit.pipeline.report import Progress

COUNT = 40


@pytest.fixture(scope="session")
def images(tmp_path_factory, jpeg_maker) -> Path:
    """A folder of 40 JPEGs in two sub-folders."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(COUNT):
        path = folder / ("a" if index % 3 else "b") / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg_maker(index, width=120 + index, height=90))
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    """Commit after every batch, so that a small job has many shards."""
    monkeypatch.setattr(batches, "SHARD_ROWS", 1)


@pytest.fixture(scope="session")
def whole(images, tmp_path_factory, encoder) -> Path:
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "images.parquet"
    report = embedkit.embed(images, output, encoder=encoder, batch_size=4)
    assert (report.images, report.kept, report.failed, report.errors) == (COUNT, 0, 0, None)
    return output


def command(*arguments: object, shard_rows: int = 512, before: str = "") -> list[str]:
    """The command line in a process of its own, committing after `shard_rows` rows."""
    main = "from embedkit.cli import main; main()"
    code = f"import embedkit.pipeline.batches as b; b.SHARD_ROWS = {shard_rows}; {before}\n{main}"
    return [sys.executable, "-c", code, *map(str, arguments)]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, **{k: options.pop(k) for k in ("shard_rows", "before") if k in options}),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_rows_are_the_encoders_in_source_order(whole, images, encoder):
    found = Embeddings.load(whole)
    expected_ids = [
        f"{images}/{p}" for p in sorted(str(p.relative_to(images)) for p in images.rglob("*.jpg"))
    ]
    assert found.ids == expected_ids
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (COUNT, encoder.dim)
    assert np.abs(found.vectors - encoder.encode(expected_ids)).max() < 1e-6
    assert found.metadata.fingerprint == encoder.fingerprint
    assert found.metadata.runs[0].batch_size == 4
    table = pq.read_table(whole)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), encoder.dim)
    assert table["size"].to_pylist() == [os.stat(path).st_size for path in expected_ids]
    assert table["mtime_ns"].to_pylist() == [os.stat(path).st_mtime_ns for path in expected_ids]


def test_kill_nine_at_random_moments_gives_the_same_file(whole, images, tmp_path, encoder):
    output = tmp_path / "images.parquet"
    arguments = ["embed", images, "-o", output, "--batch-size", 4]
    randomness = random.Random(0)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(command(*arguments, shard_rows=4), stderr=subprocess.PIPE)
        # Kill twice at the first new shard, then at a random moment after one: all phases after the start get hit.
        store = tmp_path / "images.parquet.partial"
        before = len(list(store.glob("part-*"))) if store.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if store.exists() and len(list(store.glob("part-*"))) > before:
                break
            time.sleep(0.001)
        if kills >= 2:
            time.sleep(randomness.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
        if output.exists():
            break
        assert not output.exists(), "a killed run must not leave a file that looks finished"
    assert kills >= 2
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.parquet"]


def test_a_kill_between_the_rename_and_the_clean_up_doubles_nothing(
    whole, images, tmp_path, encoder, small_shards
):
    output = tmp_path / "images.parquet"
    kept = tmp_path / "kept"
    original = job_module.Job._assemble

    def assemble_and_keep(self, keep_old):
        original(self, keep_old)
        shutil.copytree(self.store.folder, kept)

    job_module.Job._assemble = assemble_and_keep
    try:
        embedkit.embed(images, output, encoder=encoder, batch_size=4)
    finally:
        job_module.Job._assemble = original
    kept.rename(tmp_path / "images.parquet.partial")
    report = embedkit.embed(images, output, encoder=encoder)
    assert (report.images, report.kept) == (0, COUNT)
    assert output.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "images.parquet.partial").exists()


def test_what_a_killed_run_wrote_aside_goes_away(images, tmp_path, encoder):
    (tmp_path / ".images.parquet.0123456789abcdef.partial").write_bytes(b"half a file")
    embedkit.embed(images / "b", tmp_path / "images.parquet", encoder=encoder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.parquet"]


def test_failures_keep_their_place_so_that_a_resumed_run_is_equal(images, tmp_path, encoder):
    mixed = tmp_path / "mixed"
    shutil.copytree(images, mixed)
    for name in ("a/001.jpg", "a/002.jpg", "a/020.jpg", "b/030.jpg"):
        (mixed / name).write_bytes(b"no image")
    arguments = ["embed", mixed, "--batch-size", 4]
    done = run(*arguments, "-o", tmp_path / "whole.parquet")
    assert done.returncode == 0 and "4 failed" in done.stderr
    # The second shard is cut by an exception in the middle of the job, as a full disk would.
    breaking = (
        "import embedkit.pipeline.checkpoint as s; real = s.ShardStore.append\n"
        "def append(self, table, failures):\n"
        "    if self._next == 2: raise OSError(28, 'No space left on device')\n"
        "    real(self, table, failures)\n"
        "s.ShardStore.append = append"
    )
    cut = run(*arguments, "-o", tmp_path / "cut.parquet", shard_rows=4, before=breaking)
    assert cut.returncode == 1 and "the disk is full" in cut.stderr and "Traceback" not in cut.stderr
    done = run(*arguments, "-o", tmp_path / "cut.parquet", shard_rows=4)
    assert done.returncode == 0 and "continued" in done.stderr
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    first, second = (pq.read_table(tmp_path / f"{n}.errors.parquet").to_pylist() for n in ("whole", "cut"))
    assert first == second and [row["error"] for row in first] == ["ImageError"] * 4


def test_only_new_and_changed_images_are_embedded(images, tmp_path, encoder, jpeg_maker):
    folder, output = tmp_path / "images", tmp_path / "images.parquet"
    shutil.copytree(images, folder)
    embedkit.embed(folder, output, encoder=encoder)
    before = Embeddings.load(output)
    report = embedkit.embed(folder, output, encoder=encoder)
    assert (report.images, report.kept, report.removed) == (0, COUNT, 0)

    (folder / "a" / "new.jpg").write_bytes(jpeg_maker(1000))
    (folder / "a" / "001.jpg").write_bytes(jpeg_maker(1001))
    (folder / "a" / "002.jpg").unlink()
    report = embedkit.embed(folder, output, encoder=encoder)
    assert (report.images, report.kept, report.removed) == (2, COUNT - 1, 1)
    after = Embeddings.load(output)
    rows = dict(zip(after.ids, after.vectors, strict=True))
    assert len(rows) == len(after) == COUNT + 1
    assert str(folder / "a" / "002.jpg") in rows, "an image that is gone keeps its row without --prune"
    for name, vector in zip(before.ids, before.vectors, strict=True):
        same = np.array_equal(rows[name], vector)
        assert same != name.endswith("a/001.jpg")
    assert np.abs(rows[str(folder / "a/001.jpg")] - encoder.encode(folder / "a/001.jpg")[0]).max() < 1e-6

    report = embedkit.embed(folder, output, encoder=encoder, prune=True)
    assert (report.images, report.removed) == (0, 1)
    assert str(folder / "a" / "002.jpg") not in Embeddings.load(output).ids


def test_verify_content_sees_what_size_and_time_hide(images, tmp_path, encoder, jpeg_maker):
    folder, output = tmp_path / "images", tmp_path / "images.parquet"
    folder.mkdir()
    path = folder / "x.jpg"
    first, second = jpeg_maker(1), jpeg_maker(2)
    size = max(len(first), len(second))
    path.write_bytes(first.ljust(size, b"\0"))
    (folder / "y.jpg").write_bytes(jpeg_maker(3))
    stat = path.stat()
    embedkit.embed(folder, output, encoder=encoder, verify_content=True)
    path.write_bytes(second.ljust(size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert embedkit.embed(folder, output, encoder=encoder).images == 0
    assert embedkit.embed(folder, output, encoder=encoder, verify_content=True).images == 1
    os.utime(path)  # touched, not changed
    assert embedkit.embed(folder, output, encoder=encoder, verify_content=True).images == 0


def test_prune_of_everything_is_refused(images, tmp_path, encoder):
    folder, output = tmp_path / "images", tmp_path / "images.parquet"
    shutil.copytree(images / "b", folder)
    embedkit.embed(folder, output, encoder=encoder)
    shutil.rmtree(folder)
    folder.mkdir()
    before = output.read_bytes()
    with pytest.raises(embedkit.SourceError):
        embedkit.embed(folder, output, encoder=encoder, prune=True)
    assert output.read_bytes() == before


def test_another_space_is_refused_and_named(whole, images, tmp_path, encoder):
    output = tmp_path / "images.parquet"
    shutil.copy(whole, output)
    before = output.read_bytes()
    with pytest.raises(embedkit.SpaceMismatchError, match="normalized.*not normalized"):
        embedkit.embed(images, output, encoder=encoder, normalize=False)
    assert output.read_bytes() == before
    report = embedkit.embed(images, output, encoder=encoder, normalize=False, overwrite=True)
    assert report.images == COUNT
    lengths = np.linalg.norm(Embeddings.load(output).vectors, axis=1)
    assert not np.allclose(lengths, 1, atol=0.01)


def test_two_workers_into_one_folder_equal_one_run(whole, images, tmp_path, encoder):
    folder = tmp_path / "parts"
    first = embedkit.embed(images, f"{folder}/", encoder=encoder, batch_size=4, worker=(1, 2))
    with pytest.raises(embedkit.OutputError, match="part 2 of 2 .* --worker 2/2"):
        Embeddings.load(folder)
    second = embedkit.embed(images, f"{folder}/", encoder=encoder, batch_size=4, worker=(2, 2))
    assert first.images > 5 and second.images > 5 and first.images + second.images == COUNT
    found, expected = Embeddings.load(folder), Embeddings.load(whole)
    assert sorted(found.ids) == sorted(expected.ids)
    rows = dict(zip(found.ids, found.vectors, strict=True))
    assert all(np.abs(rows[n] - v).max() < 1e-6 for n, v in zip(expected.ids, expected.vectors, strict=True))
    with pytest.raises(embedkit.ConfigError, match="folder"):
        embedkit.embed(images, tmp_path / "x.parquet", encoder=encoder, worker=(1, 2))


def test_a_folder_of_shards_is_kept_up_to_date(images, tmp_path, encoder, jpeg_maker, small_shards):
    source, folder = tmp_path / "images", tmp_path / "shards"
    shutil.copytree(images, source)
    (source / "bad.jpg").write_bytes(b"")
    report = embedkit.embed(source, f"{folder}/", encoder=encoder, batch_size=4)
    assert (report.images, report.failed) == (COUNT, 1)
    assert Path(report.errors).parent == folder
    (source / "a" / "001.jpg").write_bytes(jpeg_maker(77))
    (source / "bad.jpg").write_bytes(jpeg_maker(78))
    report = embedkit.embed(source, f"{folder}/", encoder=encoder)
    assert (report.images, report.kept, report.failed) == (2, COUNT - 1, 0)
    found = Embeddings.load(folder)
    assert len(found) == len(set(found.ids)) == COUNT + 1
    assert np.abs(found.vectors - encoder.encode(found.ids)).max() < 1e-6
    import pyarrow.dataset

    assert pyarrow.dataset.dataset(folder, format="parquet").count_rows() == COUNT + 1


def test_npy_with_ids_and_metadata_is_extended_too(whole, images, tmp_path, encoder, jpeg_maker):
    source, output = tmp_path / "images", tmp_path / "images.npy"
    shutil.copytree(images, source)
    embedkit.embed(source, output, encoder=encoder, batch_size=4)
    assert np.array_equal(np.load(output), Embeddings.load(whole).vectors)
    lines = [json.loads(line) for line in (tmp_path / "images.ids.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"id", "part", "size", "mtime_ns"}
    assert json.loads((tmp_path / "images.metadata.json").read_text())["fingerprint"] == encoder.fingerprint
    (source / "z.jpg").write_bytes(jpeg_maker(5))
    report = embedkit.embed(source, output, encoder=encoder)
    assert (report.images, report.kept) == (1, COUNT)
    found = Embeddings.load(output)
    assert found.ids[-1] == str(source / "z.jpg") and len(found) == COUNT + 1


def test_labels_of_a_parquet_source_come_along(tmp_path, encoder, jpeg_maker):
    source = tmp_path / "data.parquet"
    images = [{"bytes": jpeg_maker(i), "path": f"{i}.jpg"} for i in range(6)]
    pq.write_table(
        pa.table({"image": images, "label": pa.array(range(6), pa.int32()), "size": ["s"] * 6}), source
    )
    embedkit.embed(source, tmp_path / "out.parquet", encoder=encoder)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [f"{source}::{i}.jpg" for i in range(6)]
    assert table["label"].to_pylist() == list(range(6)) and table["label"].type == pa.int32()
    assert table["source_size"].to_pylist() == ["s"] * 6
    report = embedkit.embed(source, tmp_path / "out.parquet", encoder=encoder)
    assert (report.images, report.kept) == (0, 6)


def test_stop_keeps_what_is_whole_and_continues_when_the_image_is_fixed(whole, images, tmp_path, encoder):
    source = tmp_path / "images"
    shutil.copytree(images, source)
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))
    good = (source / names[21]).read_bytes()
    stat = (source / names[21]).stat()
    (source / names[21]).write_bytes(b"x")
    with pytest.raises(embedkit.ImageError, match=names[21]):
        embedkit.embed(source, tmp_path / "o.parquet", encoder=encoder, batch_size=4, on_error="stop")
    assert not (tmp_path / "o.parquet").exists()
    (source / names[21]).write_bytes(good)
    os.utime(source / names[21], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = embedkit.embed(source, tmp_path / "o.parquet", encoder=encoder, on_error="stop")
    assert (report.images, report.kept) == (COUNT - 20, 20)
    found, expected = Embeddings.load(tmp_path / "o.parquet"), Embeddings.load(whole)
    assert np.array_equal(found.vectors, expected.vectors)


def test_an_interrupt_keeps_the_finished_batches(images, tmp_path, encoder):
    class Interrupting(Progress):
        def advance(self, images: int, failed: int) -> None:
            self.count = getattr(self, "count", 0) + images
            if self.count == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedkit.embed(images, tmp_path / "o.parquet", encoder=encoder, batch_size=4, progress=Interrupting())
    report = embedkit.embed(images, tmp_path / "o.parquet", encoder=encoder)
    assert (report.images, report.kept) == (COUNT - 12, 12)


def test_an_unfinished_job_keeps_its_batch_size_and_its_space(images, tmp_path, encoder, default_entry):
    (tmp_path / "p").mkdir()
    for path in list((images / "b").iterdir())[:5]:
        shutil.copy(path, tmp_path / "p")
    (tmp_path / "p" / "zzz.jpg").write_bytes(b"bad")
    output = tmp_path / "o.parquet"
    with pytest.raises(embedkit.ImageError):
        embedkit.embed(tmp_path / "p", output, encoder=encoder, batch_size=2, on_error="stop")
    with pytest.raises(embedkit.ConfigError, match="batch_size: the unfinished job here runs with 2"):
        embedkit.embed(tmp_path / "p", output, encoder=encoder, batch_size=3)
    with pytest.raises(embedkit.SpaceMismatchError, match="unfinished job"):
        embedkit.embed(tmp_path / "p", output, encoder=encoder, normalize=False)
    embedkit.embed(tmp_path / "p", output, encoder=encoder)
    assert [run.batch_size for run in read_metadata(output).runs] == [2]


def test_two_processes_cannot_write_one_output(images, tmp_path, encoder):
    class Nested(Progress):
        def start(self, total: int) -> None:
            with pytest.raises(embedkit.OutputError, match="another process"):
                embedkit.embed(images, tmp_path / "o.parquet", encoder=encoder)

    assert embedkit.embed(images, tmp_path / "o.parquet", encoder=encoder, progress=Nested()).images == COUNT


def test_when_no_image_can_be_read_nothing_looks_finished(tmp_path, encoder):
    (tmp_path / "p").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "p" / name).write_bytes(b"junk")
    for output in ("o.parquet", "o/"):
        with pytest.raises(embedkit.SourceError, match="none of the 2 images could be read"):
            embedkit.embed(tmp_path / "p", f"{tmp_path}/{output}", encoder=encoder)
    assert not (tmp_path / "o.parquet").exists()
    assert len(pq.read_table(tmp_path / "o.errors.parquet")) == 2
    assert run("embed", tmp_path / "p", "-o", tmp_path / "q.parquet").returncode == 1


def test_a_full_disk_is_one_sentence_and_the_work_is_kept(whole, images, tmp_path, encoder):
    """RLIMIT_FSIZE stands for the full disk: the shards fit, the assembled file does not."""
    output = tmp_path / "o.parquet"
    limit = whole.stat().st_size - 1000
    arguments = ["embed", images, "-o", output, "--batch-size", 4]
    full = run(
        *arguments, shard_rows=4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert full.stderr.count("\n") == 1 and "what is embedded so far is kept" in full.stderr
    assert not output.exists() and not list(tmp_path.glob(".*.tmp"))
    again = run(*arguments)
    assert again.returncode == 0 and f"{COUNT} kept" in again.stderr
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can drop to nobody, and only nobody is refused anything"
)
def test_unreadable_images_and_a_read_only_output(images):
    # One job before the drop imports all that is imported late: nobody may not be able to read the installation.
    code = """
import os, sys
import embedkit, embedkit.pipeline.embed
encoder = embedkit.load_encoder(device="cpu", threads=1)
base = sys.argv[1]
embedkit.embed(f"{base}/warm", f"{base}/warm.parquet", encoder=encoder)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    embedkit.embed(f"{base}/p", f"{base}/closed/o.parquet", encoder=encoder)
except embedkit.OutputError as error:
    print("refused:", error)
report = embedkit.embed(f"{base}/p", f"{base}/open/o.parquet", encoder=encoder)
print("embedded:", report.images, "failed:", report.failed)
"""
    # Outside pytest's own folder, which nobody cannot enter.
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        shutil.copytree(images / "b", base / "p")
        shutil.copytree(images / "b", base / "warm")
        (base / "warm" / "bad.jpg").write_bytes(b"no image")
        secret = sorted((base / "p").iterdir())[0]
        secret.chmod(0)
        (base / "closed").mkdir(mode=0o755)
        (base / "open").mkdir()
        (base / "open").chmod(0o777)
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        refused, embedded = done.stdout.splitlines()
        assert "cannot be written" in refused and not list((base / "closed").iterdir())
        assert embedded == "embedded: 13 failed: 1"
        [row] = pq.read_table(base / "open" / "o.errors.parquet").to_pylist()
        assert row["id"] == str(secret) and "Permission denied" in row["reason"]


def test_the_command_alone_writes_images_parquet_and_says_so(images, tmp_path):
    done = run("embed", images / "b", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "embedkit: images.parquet: 14 embedded, none failed; dim 1280"
    )
    again = run("embed", images / "b", "--json", cwd=tmp_path)
    report = json.loads(again.stdout)
    assert (report["images"], report["kept"], report["output"]) == (0, 14, "images.parquet")


def test_usage_errors_exit_two_and_user_errors_one(images, tmp_path):
    assert run("embed", cwd=tmp_path).returncode == 2
    assert run("embed", images, "--worker", "3/2", cwd=tmp_path).returncode == 2
    missing = run("embed", tmp_path / "nowhere", cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and "nowhere" in missing.stderr
    assert not list(tmp_path.iterdir())
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    before = foreign.read_bytes()
    refused = run("embed", images, "-o", foreign, cwd=tmp_path)
    assert refused.returncode == 1 and "without metadata" in refused.stderr and foreign.read_bytes() == before
