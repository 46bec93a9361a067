"""SimCLR from the data set to the step, embedkit against lightly: the same network, batch and machine.

Two workloads: `gray`, the recipe `simclr` on Fashion-MNIST; `color`, the views of `simclr:color`, which are the
paper's, on color images stored at 128 pixels, with crops of 96 and r10 from random weights.

Every contender runs in a process of its own, interleaved. lightly brings its transform, head and loss, in a
DataLoader with two workers: once as its documentation shows it, and once with what embedkit does by default as
well (channels-last memory, bfloat16 where the processor multiplies it, and only the recipe's augmentations).
Needs what `pip install '.[train,dev]'` installs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedkit.training import recipes, run
from embedkit.training.config import RunConfig
from embedkit.training.data import Loader, load_images, split_validation
from embedkit.training.hardware import keep_freed_memory, multiplies_bf16
from embedkit.training.method import Method

#: Steps before the clock starts: kernels are chosen, workers start, queues fill.
WARM = 5
CONTENDERS = ("embedkit", "lightly", "lightly, tuned")


def workload(name: str) -> RunConfig:
    """The run of a workload, `gray` or `color`."""
    if name == "gray":
        return recipes.recipe("simclr")
    base = recipes.recipe("simclr:color")
    return dataclasses.replace(
        base, init="", backbone="r10", optimizer=dataclasses.replace(base.optimizer, layer_decay=1.0)
    )


def embedkit(config: RunConfig, data: str, steps: int) -> dict[str, float]:
    """images/s of `embedkit train`, and the share of the time that data and views take."""
    spent = {"data": 0.0, "views": 0.0}
    view, batches = Method.view, Loader.__iter__

    def timed_view(self: Method, *arguments: Any) -> torch.Tensor:
        begin = time.perf_counter()
        found = view(self, *arguments)
        if self.batches_seen > WARM:
            spent["views"] += time.perf_counter() - begin
        return found

    def timed_batches(self: Loader) -> Iterator[Any]:
        source = batches(self)
        while True:
            begin = time.perf_counter()
            batch = next(source)
            if self.position() >= WARM:
                spent["data"] += time.perf_counter() - begin
            yield batch

    Method.view, Loader.__iter__ = timed_view, timed_batches  # type: ignore[method-assign, assignment]
    config = dataclasses.replace(config, steps=WARM + steps, log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        run.train(config, data=data, out=Path(folder) / "run", progress=False)
        with open(Path(folder) / "run" / run.METRICS, newline="") as file:
            rates = [float(row["images_per_second"]) for row in csv.DictReader(file)][WARM:]
    seconds = sum(config.batch_size / rate for rate in rates)
    return {"images_per_second": steps * config.batch_size / seconds} | {
        f"{name}_share": value / seconds for name, value in spent.items()
    }


class Drawn(torch.utils.data.Dataset):
    """Images as a torchvision data set gives them: one PIL image at a time, through the transform."""

    def __init__(self, images: np.ndarray, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index]))


def lightly(config: RunConfig, data: str, steps: int, *, tuned: bool) -> dict[str, float]:
    """images/s of lightly's SimCLR on the workload's network, batch, temperature and optimizer."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    from embedkit.training.models.backbones import create_backbone

    gray = config.data.color == "gray"
    stored = dataclasses.replace(
        config.data, path=data, image_size=config.data.load_size or config.data.image_size, load_size=0
    )
    data_set = split_validation(load_images(stored), config.data.validation, config.seed)[0]
    mean, std = data_set.statistics()
    pixels = data_set.images[data_set.rows]  # type: ignore[index]
    images = (pixels[:, 0] if gray else pixels.permute(0, 2, 3, 1)).contiguous().numpy()
    views: dict[str, Any] = {"normalize": {"mean": list(mean), "std": list(std)}}
    views["input_size"] = config.data.image_size
    if tuned and gray:  # as documented it has the paper's views, which are those of `color`
        views |= {"min_scale": 0.2, "cj_strength": 0.5, "cj_sat": 0, "cj_hue": 0}
        views |= {"gaussian_blur": 0, "random_gray_scale": 0}
    loader = torch.utils.data.DataLoader(
        Drawn(images, SimCLRTransform(**views)),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
    )
    torch.manual_seed(0)
    backbone = create_backbone(
        config.backbone, in_chans=1 if gray else 3, image_size=(config.data.image_size,) * 2
    )
    network = torch.nn.Sequential(backbone, SimCLRProjectionHead(backbone.dim, backbone.dim, 128))
    half = tuned and multiplies_bf16("cpu")
    if tuned:
        keep_freed_memory()
        network = network.to(memory_format=torch.channels_last)
    criterion = NTXentLoss(temperature=config.method.temperature)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=config.optimizer.weight_decay)
    begin, step = 0.0, 0
    while True:
        for first, second in loader:
            if step == WARM:
                begin = time.perf_counter()
            if step == WARM + steps:
                return {"images_per_second": steps * config.batch_size / (time.perf_counter() - begin)}
            if tuned:
                first, second = (x.to(memory_format=torch.channels_last) for x in (first, second))
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                z0, z1 = network(first), network(second)
            loss = criterion(z0.float(), z1.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def measure(contender: str, config: RunConfig, data: str, steps: int) -> dict[str, float]:
    """In this process."""
    if contender == "embedkit":
        return embedkit(config, data, steps)
    return lightly(config, data, steps, tuned=contender.endswith("tuned"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", choices=("gray", "color"), default="gray")
    parser.add_argument(
        "--data", required=True, help="as for `embedkit train`: Fashion-MNIST, or color images"
    )
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = workload(arguments.workload)
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, config, arguments.data, arguments.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--workload", arguments.workload, "--data", arguments.data]
            done = subprocess.run(
                [*command, "--steps", str(arguments.steps), "--contender", name],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {found[name][-1]['images_per_second']:.0f} images/s", file=sys.stderr)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightly", "timm")
    )
    print(
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"{config.backbone}, {config.data.image_size} px, batches of {config.batch_size} images (two views each), "
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    print("| contender | images/s, median | range | embedkit / it | data and views, share of the time |")
    print("|---|---|---|---|---|")
    ours = statistics.median(one["images_per_second"] for one in found["embedkit"])
    for name in CONTENDERS:
        rates = sorted(one["images_per_second"] for one in found[name])
        middle = statistics.median(rates)
        shares = [one["data_share"] + one["views_share"] for one in found[name] if "data_share" in one]
        share = f"{statistics.median(shares):.1%}" if shares else "not measured"
        print(f"| {name} | {middle:.0f} | {rates[0]:.0f}-{rates[-1]:.0f} | {ours / middle:.2f}x | {share} |")


if __name__ == "__main__":
    main()
