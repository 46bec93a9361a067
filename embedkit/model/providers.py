"""ONNX Runtime: which wheel is installed, which providers it has, and which of them are requested."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from embedkit._io.optional import install_hint, requires
from embedkit._io.ownership import foreign_access
from embedkit.errors import ConfigError, DeviceError

Provider: TypeAlias = "str | tuple[str, Mapping[str, Any]]"


PRECISIONS = ("fp32", "tf32", "fp16")


CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


#: Sends the input of special operators to a service. It claims graphs without such operators and runs nothing of them.
AZURE = "AzureExecutionProvider"


#: Since 1.32 ONNX Runtime resolves a host some seconds after its import, and writes an identifier into the user's
#: cache. `disable_telemetry_events()` does not prevent that, and a forked child that inherits its threads does not
#: exit.
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


_FIX = "pip uninstall -y {names} && pip install {keep}"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The requested device, providers, precision and threads.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        providers: ONNX Runtime providers in order of preference; overrides `device`.
        precision: `fp32`; `tf32` allows TensorFloat-32 on CUDA; `fp16` lets TensorRT use half precision.
        threads: How many cores to keep busy, at least 1.
        cache_dir: Folder of TensorRT's compiled engines.
    """

    device: str = "auto"
    providers: tuple[Provider, ...] | None = None
    precision: str = "fp32"
    threads: int = 1
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device: expected auto, cpu, cuda or cuda:<index>, found {self.device!r}")
        for item in self.providers or ():
            if not isinstance(item, str) and not (len(item) == 2 and isinstance(item[1], Mapping)):
                raise ConfigError(f"providers: expected names or (name, options) pairs, found {item!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, found {self.threads}")


def available_cpus() -> int:
    """The cores that this process may use: its affinity, capped by the cgroup's CPU quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def installed_runtimes() -> dict[str, str]:
    """The installed distributions that provide the import name `onnxruntime`: name -> version."""
    return {
        dist.metadata["Name"]: dist.version
        for dist in importlib.metadata.distributions()
        if (name := dist.metadata["Name"] or "") == "onnxruntime"
        or (
            name.startswith("onnxruntime-")
            and not name.startswith(("onnxruntime-extensions", "onnxruntime-ep"))
        )
    }


def runtime_conflict() -> str | None:
    """One sentence with the remedy if more than one onnxruntime wheel is installed, else None."""
    names = sorted(installed_runtimes())
    if len(names) < 2:
        return None
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in names else names[0]
    fix = _FIX.format(names=" ".join(names), keep=keep)
    return f"{' and '.join(names)} are both installed and overwrite each other's files: {fix}"


@functools.cache
def onnxruntime() -> ModuleType:
    """ONNX Runtime, imported at first use, with its telemetry off unless the user's environment says otherwise.

    Raises:
        MissingDependencyError: It is not installed; the message holds the pip line.
    """
    telemetry_is_on()
    conflict = runtime_conflict()
    if conflict:
        warnings.warn(conflict, RuntimeWarning, stacklevel=3)
    note = ", or the extra `gpu` on a machine with an NVIDIA GPU"
    with requires("an encoder", "cpu", package="ONNX Runtime", note=note):
        module: ModuleType = importlib.import_module("onnxruntime")
    return module


@functools.cache
def telemetry_is_on() -> bool:
    """Whether ONNX Runtime may open connections of its own in this process. The first call disables that if possible.

    Not possible if the host process imported ONNX Runtime first, or if the user's environment enables telemetry.
    """
    if "onnxruntime" not in sys.modules:
        os.environ.setdefault(TELEMETRY_VARIABLE, "1")
    return os.environ.get(TELEMETRY_VARIABLE) != "1"


def available_providers() -> list[str]:
    """The providers of this ONNX Runtime that can run an entry."""
    return [name for name in onnxruntime().get_available_providers() if name != AZURE]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _preload_cuda() -> str:
    """Load the CUDA libraries of pip wheels, which ONNX Runtime finds only if they are loaded already.

    Returns:
        One line about what could not be loaded, empty if all was loaded.
    """
    said = io.StringIO()
    # It prints failures to stdout, which is reserved for the user's data.
    with contextlib.redirect_stdout(said), contextlib.suppress(Exception):
        onnxruntime().preload_dlls()
    return next((line.strip() for line in said.getvalue().splitlines() if line.startswith("Failed")), "")


def check_precision(precision: str, provider: str) -> None:
    """Refuse a precision that the running provider does not support.

    Raises:
        DeviceError: `tf32` needs an NVIDIA GPU, `fp16` needs TensorRT.
    """
    needs = {"fp32": (), "tf32": (CUDA, TENSORRT), "fp16": (TENSORRT,)}[precision]
    if needs and provider not in needs:
        raise DeviceError(
            f"precision={precision!r} needs {' or '.join(needs)}, but {provider} runs; use fp32"
        )


def choose_providers(
    options: EngineOptions, available: Sequence[str], weights_sha256: str
) -> list[tuple[str, dict[str, Any]]]:
    """The providers to request from ONNX Runtime, in order, each with its options.

    Args:
        options: The user's request.
        available: The providers of this build of ONNX Runtime.
        weights_sha256: Part of the key of TensorRT's engine cache, since an engine holds its weights.

    Raises:
        DeviceError: This build lacks a requested provider.
        ConfigError: The cache folder cannot be created.
    """
    kind, _, index = options.device.partition(":")
    if options.providers:
        asked = [
            (item, {}) if isinstance(item, str) else (item[0], dict(item[1])) for item in options.providers
        ]
        missing = [name for name, _ in asked if name not in available]
        if AZURE in missing:
            raise DeviceError(
                f"{AZURE} is not a device: it sends data to a service, and runs no entry; use {CPU}"
            )
        if missing:
            raise DeviceError(
                f"{missing[0]} is not in this ONNX Runtime, which has {', '.join(available)}; "
                "run `embedkit doctor` to see which wheel is installed"
            )
    elif kind == "cpu" or (kind == "auto" and CUDA not in available):
        asked = [(CPU, {})]
    elif CUDA not in available:
        raise DeviceError(
            f"device={options.device!r} needs the GPU build of ONNX Runtime, and this one has "
            f"{', '.join(available)}: pip uninstall -y onnxruntime && {install_hint('gpu')}"
        )
    else:
        asked = [(CUDA, {})]
    defaults: dict[str, dict[str, Any]] = {
        CUDA: {
            "device_id": int(index or 0),
            # TensorFloat-32 breaks the parity of 1e-4, so it runs only on request.
            "use_tf32": int(options.precision == "tf32"),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
        },
    }
    if any(name == TENSORRT for name, _ in asked):
        defaults[TENSORRT] = {"device_id": int(index or 0), **_tensorrt_cache(options, weights_sha256)}
    return [(name, {**defaults.get(name, {}), **given}) for name, given in asked]


def _tensorrt_cache(options: EngineOptions, weights_sha256: str) -> dict[str, Any]:
    """TensorRT options: an engine cache keyed by GPU, versions and weights, readable by its owner only."""
    if options.cache_dir is None:
        return {"trt_fp16_enable": options.precision == "fp16"}
    key = f"{_gpu_name()}-ort{onnxruntime().__version__}-{options.precision}-{weights_sha256[:16]}"
    root = Path(options.cache_dir)
    folder = os.path.join(root, "tensorrt", key)
    try:
        os.makedirs(root / "tensorrt", mode=0o700, exist_ok=True)
        if reason := foreign_access(root, sticky=True) or foreign_access(root / "tensorrt"):
            raise ConfigError(
                f"cache_dir: {str(root)!r} {reason}, and a compiled engine is a program; restrict its "
                "permissions, or name another folder"
            )
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)  # it may have existed, or the umask may allow more
    except OSError as error:
        raise ConfigError(
            f"cache_dir: {folder!r} cannot be made a private folder ({error.strerror})"
        ) from None
    return {
        "trt_fp16_enable": options.precision == "fp16",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": folder,
    }


def _gpu_name() -> str:
    """Model of the first GPU and its driver as the kernel module reports them; `unknown` without a GPU."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            driver = next((word for word in file.readline().split() if word[:1].isdigit()), "unknown")
        root = "/proc/driver/nvidia/gpus"
        with open(os.path.join(root, sorted(os.listdir(root))[0], "information")) as file:
            model = file.readline().partition(":")[2].strip().replace(" ", "_")
    except (OSError, IndexError):
        return "unknown"
    return f"{model}-{driver}"


def device_of(provider: tuple[str, Mapping[str, Any]]) -> tuple[str, int]:
    """ONNX Runtime's device type and index for the inputs of a provider."""
    name, options = provider
    return ("cuda", int(options.get("device_id", 0))) if name in (CUDA, TENSORRT) else ("cpu", 0)
