"""The contenders of `embed.py`, and `run`, which starts them: each runs this file in its own environment.

A contender is a generator: load, `yield`, do the job, `yield` the result. Nothing beyond the standard
library is imported at the top, because a peer's environment may lack it. Rows are float32 and L2-normalized.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]

BATCH = 32
PACKAGES = ("embedkit", "onnxruntime", "pillow", "numpy", "torch", "timm", "fastembed")


def embedkit_folder(job: Job) -> Iterator[Job]:
    """The public call, Parquet file included."""
    import embedkit

    encoder = embedkit.load_encoder(job["entry"])
    yield {}
    report = embedkit.embed(
        job["folder"], job["output"], encoder=encoder, decode=job["decode"], overwrite=True
    )
    if (report.images, report.failed) != (len(job["files"]), 0):
        raise SystemExit(f"{report.images} of {len(job['files'])} images embedded, {report.failed} failed")
    yield {"report_seconds": report.seconds}


def plain_loop(job: Job) -> Iterator[Job]:
    """Pillow and ONNX Runtime as most people write it; (x - 127) / 128 is done by the graph itself."""
    import numpy as np
    import onnxruntime
    from PIL import Image

    session = onnxruntime.InferenceSession(job["onnx"], providers=["CPUExecutionProvider"])
    yield {}
    short, side, rows = job["resize"], job["size"], []
    for start in range(0, len(job["files"]), BATCH):
        pixels = []
        for path in job["files"][start : start + BATCH]:
            image = Image.open(path).convert("RGB")
            width, height = (int(short * edge / min(image.size)) for edge in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = round((width - side) / 2), round((height - side) / 2)
            pixels.append(np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1))
        embedding = session.run(["embedding"], {"pixels": np.stack(pixels)})[0]
        rows.append(embedding / np.linalg.norm(embedding, axis=1, keepdims=True))
    yield {"rows": np.concatenate(rows)}


class Images:
    """A map-style data set for PyTorch's DataLoader."""

    def __init__(self, files: list[str], transform: Any):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.files[index]).convert("RGB"))


def timm_loader(job: Job) -> Iterator[Job]:
    """The same entry through timm and timm's own transform, two loader workers, default threads."""
    import timm
    import torch

    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    model = timm.create_model(f"local-dir:{job['entry']}", pretrained=True, num_classes=0)
    model = model.float().eval().to(memory_format=layout)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    yield {}
    images: Any = Images(job["files"], transform)
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH, num_workers=2)
    with torch.inference_mode():
        rows = [torch.nn.functional.normalize(model(x.contiguous(memory_format=layout))) for x in loader]
    yield {"rows": torch.cat(rows).numpy()}


def fastembed_images(job: Job) -> Iterator[Job]:
    """The image pipeline of fastembed over the standalone ONNX.

    It cannot register image models, but a supported name with `specific_model_path` runs another folder. Its
    parallel mode starts workers and loads the model inside the call: the time of the same call on two tiny
    images is counted as start-up.
    """
    import numpy as np
    from fastembed import ImageEmbedding
    from PIL import Image

    parallel = job["parallel"]
    model = ImageEmbedding(
        "Qdrant/resnet50-onnx",
        specific_model_path=str(Path(job["onnx"]).parent),
        local_files_only=True,
        lazy_load=parallel is not None,
    )
    yield {}
    start_up = -time.perf_counter()
    if parallel:
        list(model.embed([Image.new("RGB", (256, 256))] * 2, batch_size=1, parallel=parallel))
    start_up += time.perf_counter()
    # A list of fewer images than a batch would not be split between the workers.
    batch = min(BATCH, len(job["files"]) // 4)
    rows = np.stack(list(model.embed(job["files"], batch_size=batch, parallel=parallel)))
    # Twice in this job: for the two tiny images, and for the real ones.
    yield {"rows": rows, "start_up_s": start_up, "not_job_s": 2 * start_up}


def decode_only(job: Job) -> Iterator[Job]:
    """One core's share of the files, through embedkit's own decoding, resize and crop."""
    from embedkit.images.transform import ReusedBlocks, read_pixels
    from embedkit.model.config import EntryConfig

    contract = EntryConfig.from_json(Path(job["entry"], "config.json").read_bytes()).preprocess
    with ReusedBlocks(1):
        read_pixels(job["files"][0], contract, decode=job["decode"])
        yield {}
        for path in job["files"]:
            read_pixels(path, contract, decode=job["decode"])
        yield {}


def inference_only(job: Job) -> Iterator[Job]:
    """ONNX Runtime on 256 random images; `threads` 0 is its default."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["onnx"], options, providers=["CPUExecutionProvider"])
    shape = (job["batch"], 3, job["size"], job["size"])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    session.run(["embedding"], {"pixels": pixels})
    yield {}
    for _ in range(256 // job["batch"]):
        session.run(["embedding"], {"pixels": pixels})
    yield {}


WORKERS = (embedkit_folder, plain_loop, timm_loader, fastembed_images, decode_only, inference_only)


def main() -> None:
    """Run one contender: a job as JSON on stdin, `ready` out, a line in, the result as JSON out."""
    job = json.loads(sys.stdin.readline())
    steps = {worker.__name__: worker for worker in WORKERS}[job["worker"]](job)
    next(steps)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, wall = time.process_time(), time.perf_counter()
    result = next(steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wall -= result.pop("not_job_s", 0.0)
    if (rows := result.pop("rows", None)) is not None:
        import numpy as np

        np.save(job["output"], rows.astype(np.float32, copy=False))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    result |= {"job_s": wall, "cpu_s": cpu, "peak_mb": int(peak.split()[1]) / 1024, "versions": versions}
    print("result " + json.dumps(result), flush=True)


class ContenderError(Exception):
    """A contender that did not finish; the message is its last word."""


def run(python: str, *jobs: Job, poll: bool = False) -> list[Job]:
    """Run one process per job, all told to go together once all are loaded.

    Args:
        python: Interpreter of the contender's environment.
        jobs: What each process is to do.
        poll: Poll the memory of the first process and its children while it works.

    Returns:
        Per job `job_s`, `start_s` (spawn to ready) and `cpu_s` in seconds, `peak_mb`, `versions`.
    """
    results: list[Job] = []
    with contextlib.ExitStack() as stack:
        workers = []
        for job in jobs:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            spawned, pipe = time.perf_counter(), subprocess.PIPE
            worker = subprocess.Popen(
                [python, __file__], stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True
            )
            stack.callback(end_session, worker)
            say(worker, json.dumps(job))
            workers.append((worker, errors, spawned))
        started = [
            (listen(worker, errors, "ready"), time.perf_counter() - at)[1] for worker, errors, at in workers
        ]
        for worker, _, _ in workers:
            say(worker, "go")
        polled = poll_memory(workers[0][0]) if poll else 0.0
        for (worker, errors, _), start_s in zip(workers, started, strict=True):
            result = json.loads(listen(worker, errors, "result").removeprefix("result"))
            result["start_s"] = start_s + result.pop("start_up_s", 0.0)
            result["peak_mb"] = max(result["peak_mb"], polled)
            results.append(result)
            worker.wait()
    return results


def say(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin
    with contextlib.suppress(BrokenPipeError):  # why it died is told by `listen`
        worker.stdin.write(line + "\n")
        worker.stdin.flush()


def listen(worker: subprocess.Popen[str], errors: Any, word: str) -> str:
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith(word):
            return line
    worker.wait()
    errors.seek(0)
    text = errors.read().strip() or f"exit status {worker.returncode}"
    print(text, file=sys.stderr)
    raise ContenderError(text.splitlines()[-1][:200])


def end_session(worker: subprocess.Popen[str]) -> None:
    """End the worker and what it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def poll_memory(worker: subprocess.Popen[str]) -> float:
    """Peak of the summed proportional set sizes of the worker's session, in MB, until it has a result."""
    assert worker.stdout
    peak = 0
    while not select.select([worker.stdout], [], [], 0.5)[0]:
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):  # processes come and go
                if stat.read_text().rpartition(")")[2].split()[3] == str(worker.pid):
                    rollup = stat.with_name("smaps_rollup").read_text().split()
                    total += int(rollup[rollup.index("Pss:") + 1])
        peak = max(peak, total)
    return peak / 1024


if __name__ == "__main__":
    main()
