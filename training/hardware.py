"""What this machine is, what it multiplies natively, how much memory is free, and one setting of it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "free_memory", "keep_freed_memory", "multiplies_bf16"]

_PACKAGES = (
    "embedkit",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def multiplies_bf16(accelerator: str) -> bool:
    """Whether bfloat16 autocast is faster than float32 here: where the processor multiplies bfloat16 natively.

    A rule and not a timing at start, which would make a run's arithmetic depend on what else the machine did
    in that second. Measured with SimCLR, r10, 28 px, channels last, 2 cores: 1.4 times the steps with
    AVX512-BF16 (Zen 4); without such instructions oneDNN emulates the type.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator not in ("cpu", "auto"):
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile")
    )


def keep_freed_memory() -> None:
    """Keep freed activations in this process, on huge pages, instead of giving them back to Linux at each step.

    glibc returns large blocks to the kernel, which must zero and map them again, 4 KiB at a time, in the next
    step: without that, SimCLR with r10 makes 1.2 times the steps. Other systems and C libraries are left alone.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # torch asks for huge pages; read at its first large block
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory() -> int | None:
    """Bytes that this process may still take without swapping: of the machine, and of its cgroup; None if unknown."""
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
        cgroup = Path("/sys/fs/cgroup")
        most = int((cgroup / "memory.max").read_text())
        free.append(max(0, most - int((cgroup / "memory.current").read_text())))
    return min(free, default=None)


def describe(threads: int, device: str) -> dict[str, Any]:
    """What a result may depend on: versions, processor, threads and device, as JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
