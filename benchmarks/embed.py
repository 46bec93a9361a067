"""The folder job side by side with its peers: the same JPEG files, the same weights, float32 everywhere.

    python benchmarks/embed.py --photos DIR [--json OUT.json]       the two tables
    python benchmarks/embed.py --photos DIR --memory                does memory grow with the folder?

Every contender is a fresh process in an environment of its own; rounds are interleaved, their order rotates.
A process loads its model, waits for the word, and times its own job: from the list of files (embedkit: from
the folder, and the Parquet file is written) to normalized float32 rows. That is the headline; the rate with
start-up and loading stands beside it. Round 0 is not timed: it warms the page cache, polls memory, compares
the rows with embedkit's exact ones and picks the better variant of a peer that has two. The roofline is
cores / (decode + inference CPU-seconds per image), each measured alone with all cores busy.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import BATCH, ContenderError, Job, run
from photographs import cut_images, linked

HERE, CORES = Path(__file__).resolve().parent, os.cpu_count() or 1
DEFAULT_ENTRY = HERE.parent / "zoo" / "supervised-efficientnet_lite0.in1k"


def rows_of(output: str, files: list[str]) -> Any:
    """The rows that a contender left, float32 (N, D), in the order of `files`."""
    import numpy as np
    import pyarrow.parquet

    if output.endswith(".npy"):
        return np.load(output)
    table = pyarrow.parquet.read_table(output, columns=["id", "embedding"])
    place = {Path(name).name: row for row, name in enumerate(table["id"].to_pylist())}
    return np.stack(table["embedding"].to_numpy())[[place[Path(file).name] for file in files]]


def measure_alone(files: list[str], decodes: tuple[str, ...], common: Job) -> dict[str, float]:
    """CPU-seconds per image of decoding alone (per mode) and of inference alone (per way to run it)."""
    seconds = {}
    shares = [files[core::CORES] for core in range(min(CORES, len(files)))]
    for decode in decodes:
        jobs = [common | {"worker": "decode_only", "files": share, "decode": decode} for share in shares]
        seconds[f"decode {decode}"] = sum(result["cpu_s"] for result in run(sys.executable, *jobs)) / len(
            files
        )
    for batch in (4, BATCH):
        for processes, threads in ((CORES, 1), (1, 0)):
            job = common | {"worker": "inference_only", "batch": batch, "threads": threads}
            total = sum(result["cpu_s"] for result in run(sys.executable, *[job] * processes))
            way = f"{processes} x 1 thread" if threads else "1 x all threads"
            seconds[f"inference {way}, batch {batch}"] = total / (256 * processes)
    return seconds


def compare(
    contenders: dict[str, list[tuple[str, str, Job]]],
    files: list[str],
    rounds: int,
    alone: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Measure all contenders on one set of images, round by round.

    Args:
        contenders: Label -> variants (note, interpreter, job), of which round 0 keeps the fastest. The first
            label's rows are what the others' are compared with.
        files: The images.
        rounds: Timed rounds.
        alone: Measures decoding and inference alone, once a round.

    Returns:
        `alone`, one dictionary a round, and `contenders`: label -> `runs`, `variants` (images/s of round 0),
        `note`, `peak_mb`, `cosine` (min and mean), and `failed` with the reason where anything did.
    """
    figures: dict[str, Any] = {label: {"runs": [], "variants": {}} for label in contenders}
    chosen: dict[str, tuple[str, Job]] = {}
    expected, measured_alone = None, []

    def attempt(label: str, python: str, job: Job, poll: bool = False) -> Job | None:
        Path(job["output"]).unlink(missing_ok=True)
        try:
            result = run(python, job, poll=poll)[0]
        except ContenderError as error:
            figures[label]["failed"] = str(error)
            return None
        print(f"  {label}: {len(files) / result['job_s']:.1f} images/s", file=sys.stderr)
        return result

    for label, variants in contenders.items():
        best = math.inf
        for note, python, job in variants:
            if (result := attempt(label, python, job, poll=True)) is None:
                continue
            figures[label]["variants"][note] = len(files) / result["job_s"]
            rows = rows_of(job["output"], files)
            expected = rows if expected is None else expected
            if result["job_s"] < best:
                best, chosen[label] = result["job_s"], (python, job)
                cosine = (rows * expected).sum(axis=1)
                figures[label] |= {"note": note, "peak_mb": result["peak_mb"]}
                figures[label] |= {"cosine": [float(cosine.min()), float(cosine.mean())]}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        labels = list(chosen)
        for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
            if (result := attempt(label, *chosen[label])) is not None:
                figures[label]["runs"].append(result)
        measured_alone.append(alone())
    return {"images": len(files), "contenders": figures, "alone": measured_alone}


def report(title: str, measured: dict[str, Any]) -> str:
    """The table and the roofline of one set as Markdown."""
    count = measured["images"]
    rates: dict[str, float] = {}
    lines = []
    for label, figures in measured["contenders"].items():
        name = label + (f" ({figures['note']})" if figures.get("note") else "")
        if "failed" in figures or not figures["runs"]:
            lines.append(f"| {name} | failed: {figures.get('failed')} | | | | |")
            continue
        speeds = [count / run["job_s"] for run in figures["runs"]]
        whole = statistics.median(count / (run["job_s"] + run["start_s"]) for run in figures["runs"])
        rates[label] = statistics.median(speeds)
        ratio = f"{rates['embedkit'] / rates[label]:.2f}x" if "embedkit" in rates else "?"
        peak = max(figures["peak_mb"], *(run["peak_mb"] for run in figures["runs"]))
        least, mean = figures["cosine"]
        lines.append(
            f"| {name} | {rates[label]:.1f} [{min(speeds):.1f}-{max(speeds):.1f}] | {whole:.1f} | {ratio} | "
            f"{peak:.0f} | {least:.5f} / {mean:.5f} |"
        )
    text = [
        f"\n## {title}: {count} images, {len(measured['alone'])} rounds\n",
        "| contender | images/s [range] | with start-up | embedkit / it | peak MB | cosine min / mean |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]
    seconds = {
        name: statistics.median(one[name] for one in measured["alone"]) for name in measured["alone"][0]
    }
    way = min((name for name in seconds if name.startswith("inference")), key=seconds.__getitem__)
    for mode in ("auto", "exact"):
        label = "embedkit" if mode == "auto" else "embedkit decode=exact"
        if (decode := seconds.get(f"decode {mode}")) and label in rates:
            roof = CORES / (decode + seconds[way])
            text.append(
                f"Roofline, decode={mode}: decoding alone {1 / decode:.1f} and {way} "
                f"{1 / seconds[way]:.1f} images per core-second, so {roof:.1f} images/s; "
                f"{label} reaches {rates[label] / roof:.1%}."
            )
    return "\n".join(text)


def environment(folder: Path, *requirements: str) -> str:
    """The interpreter of a virtual environment with these requirements, made if it is not there."""
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.exists() or done.read_text().split() != list(requirements):
        print(f"making {folder}: {' '.join(requirements)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True, stdout=sys.stderr)
        done.write_text("\n".join(requirements))
    return str(python)


def standalone(entry: Path, work: Path, python: str, contract: dict[str, Any]) -> str:
    """One self-contained ONNX of the entry, with the preprocessing in the file that fastembed reads."""
    digest = hashlib.sha256((entry / "manifest.json").read_bytes()).hexdigest()[:12]
    path = work / f"standalone-{digest}" / "model.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        code = "from embedkit.cli import main; main()"
        subprocess.run([python, "-c", code, "export-onnx", entry, "-o", path], check=True, stdout=sys.stderr)
    bicubic, off = 3, False  # the graph takes uint8 and scales it itself
    processor = {
        "do_resize": True, "size": {"shortest_edge": contract["resize_size"]}, "resample": bicubic,
        "do_center_crop": True, "crop_size": contract["size"][0], "do_rescale": off, "do_normalize": off,
    }  # fmt: skip
    path.with_name("preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


def machine_facts(sets: dict[str, Any]) -> dict[str, Any]:
    """When, where and with which versions the figures came about."""
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    )
    figures = {label: one for measured in sets.values() for label, one in measured["contenders"].items()}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu.partition(':')[2].strip()}, {CORES} cores, {platform.platform()}",
        "python": platform.python_version(),
        "versions": {label: one["runs"][0]["versions"] for label, one in figures.items() if one["runs"]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs to cut images from")
    parser.add_argument("--count", type=int, default=2000, help="images of 500x375")
    parser.add_argument("--large", type=int, default=60, help="images of 12 megapixels; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "embedkit-benchmark"))
    parser.add_argument("--encoder", type=Path, default=DEFAULT_ENTRY, help="folder of a zoo entry")
    parser.add_argument("--torch-python", help="an interpreter with timm, instead of making an environment")
    parser.add_argument(
        "--memory", action="store_true", help="only embedkit's memory, --count and ten times that"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `run` ends its processes
    work, entry = args.work.resolve(), args.encoder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    contract = json.loads((entry / "config.json").read_text())["embedkit"]["preprocess"]
    if (contract["resize"], contract["interpolation"], contract["crop"]) != ("shortest", "bicubic", "center"):
        raise SystemExit(f"{entry.name}: the peers are written for shortest, bicubic and center only")
    common = {"entry": str(entry), "resize": contract["resize_size"], "size": contract["size"][0]}

    def embedkit_job(folder: Path, files: list[str], decode: str = "auto") -> Job:
        output = str(work / f"rows-embedkit-{decode}.parquet")
        job = {"worker": "embedkit_folder", "folder": str(folder), "files": files, "decode": decode}
        return common | job | {"output": output}

    def images(name: str, count: int, large: bool) -> tuple[Path, list[str]]:
        folder = work / f"photos-{name}"
        files = cut_images(args.photos, folder, count, large)
        if len(list(folder.iterdir())) > count:
            folder = linked(files, work / f"links-{name}-{count}", count)
        return folder, [str(folder / Path(file).name) for file in files]

    if args.memory:
        _, files = images("500x375", args.count, False)
        for count in (args.count, 10 * args.count):
            folder = linked(files, work / f"links-500x375-{count}", count)
            job = embedkit_job(folder, sorted(str(path) for path in folder.iterdir()))
            Path(job["output"]).unlink(missing_ok=True)
            result = run(sys.executable, job, poll=True)[0]
            print(f"{count} images: peak {result['peak_mb']:.0f} MB, {count / result['job_s']:.1f} images/s")
        return 0

    pins = [f"{name}=={importlib.metadata.version(name)}" for name in ("onnxruntime", "pillow", "numpy")]
    torch_python = args.torch_python or (
        sys.executable
        if importlib.util.find_spec("timm")
        else environment(work / "env-timm", "timm", "torch")
    )
    plain_python = environment(work / "env-plain", *pins)
    fastembed_python = environment(work / "env-fastembed", "fastembed", *pins)
    exporter = sys.executable if importlib.util.find_spec("onnx") else torch_python
    common["onnx"] = standalone(entry, work, exporter, contract)
    sets = {}
    for name, count, large in (("500x375", args.count, False), ("12mp", args.large, True)):
        if not count:
            continue
        folder, files = images(name, count, large)

        def peer(worker: str, **options: Any) -> Job:
            job = {"worker": worker, "files": files, "output": str(work / f"rows-{worker}.npy")}  # noqa: B023
            return common | job | options

        contenders = {
            "embedkit": [("", sys.executable, embedkit_job(folder, files))],
            "plain loop": [("Pillow + ONNX Runtime", plain_python, peer("plain_loop"))],
            "timm + DataLoader": [
                ("contiguous", torch_python, peer("timm_loader", channels_last=False)),
                ("channels_last", torch_python, peer("timm_loader", channels_last=True)),
            ],
            "fastembed": [("", fastembed_python, peer("fastembed_images", parallel=None))],
            "fastembed parallel=2": [("", fastembed_python, peer("fastembed_images", parallel=2))],
        }
        decodes = ("auto", "exact") if large else ("auto",)
        if large:
            exact = {"embedkit decode=exact": [("", sys.executable, embedkit_job(folder, files, "exact"))]}
            contenders = exact | contenders
        sets[name] = compare(
            contenders, files, args.rounds, functools.partial(measure_alone, files, decodes, common)
        )
        print(report(name, sets[name]), flush=True)
    facts = machine_facts(sets) | {"encoder": f"{entry.name}, float32, batch {BATCH}"}
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if args.json:
        args.json.write_text(json.dumps(facts | {"sets": sets}, indent=1))
    failed = [
        label for one in sets.values() for label, figures in one["contenders"].items() if "failed" in figures
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
