"""The engine: pixels in, embeddings (or other outputs by name) out, and the truth about what runs.

`Engine` is the protocol; `OnnxEngine` is ONNX Runtime behind it. Weights are never looked up by path: the
bytes that were hashed are the bytes that run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from embedkit._io.ownership import foreign_access
from embedkit.entry import WEIGHTS, sha256_hex
from embedkit.errors import ConfigError, DeviceError, EntryError, MissingDependencyError
from embedkit.graph import check_graph

Provider: TypeAlias = "str | tuple[str, Mapping[str, Any]]"

PRECISIONS = ("fp32", "tf32", "fp16")

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
#: Sends the input of special operators to a service; of a graph that has none it runs nothing, and calls it its own.
AZURE = "AzureExecutionProvider"

#: Since 1.32 ONNX Runtime looks a host up some seconds after its import, and writes an identifier into the user's
#: cache; `disable_telemetry_events()` does not stop it, nor does a forked child end that inherits its threads.
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"

_MEND = "pip uninstall -y {names} && pip install {keep}"


class Engine(Protocol):
    """What the encoder needs of a runtime."""

    @property
    def provider(self) -> str:
        """The provider that really runs, by ONNX Runtime's name."""

    @property
    def concurrency(self) -> int:
        """How many calls of `run` are worth having in flight at once."""

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> float32 (N, D); called from several threads at once."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What was asked for.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        providers: ONNX Runtime providers in order of preference; overrides `device`.
        precision: `fp32`; `tf32` allows TensorFloat-32 on CUDA; `fp16` lets TensorRT use half precision.
        threads: How many cores to keep busy, at least 1.
        cache_dir: Where TensorRT keeps compiled engines.
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
    """The installed distributions that own the import name `onnxruntime`: name -> version."""
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
    """One sentence with the mend when more than one onnxruntime wheel is installed, else None."""
    names = sorted(installed_runtimes())
    if len(names) < 2:
        return None
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in names else names[0]
    mend = _MEND.format(names=" ".join(names), keep=keep)
    return f"{' and '.join(names)} are both installed and overwrite each other's files: {mend}"


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
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}): pip install 'embedkit[cpu]', "
            "or 'embedkit[gpu]' on a machine with an NVIDIA GPU"
        ) from None
    return ort


@functools.cache
def telemetry_is_on() -> bool:
    """Whether ONNX Runtime may open connections of its own in this process. The first call turns that off if it can.

    It can not where the host process imported ONNX Runtime first, or the user's environment asks for telemetry.
    """
    if "onnxruntime" not in sys.modules:
        os.environ.setdefault(TELEMETRY_VARIABLE, "1")
    return os.environ.get(TELEMETRY_VARIABLE) != "1"


def available_providers() -> list[str]:
    """The providers of this ONNX Runtime that can run an entry."""
    return [name for name in onnxruntime().get_available_providers() if name != AZURE]


class OnnxEngine:
    """ONNX Runtime over one entry's graph and weights.

    On the CPU, one intra-op thread runs each call and `concurrency` calls run side by side: a core that works on
    a batch of its own never waits for another one, and a picture's embedding does not depend on how many threads
    there are.

    Attributes:
        note: One sentence when `auto` could not take what it would have taken, else empty.
        input_shape: (C, H, W) of the graph's input.
        output_shape: (D,) of the graph's output, or the shape of the first one.
        output_shapes: Name -> shape of each output, without the batch axis.
    """

    note: str = ""

    def __init__(
        self,
        graph: bytes,
        weights: bytes,
        options: EngineOptions,
        *,
        where: str = "model.onnx",
        outputs: Sequence[str] = ("embedding",),
    ):
        """Check the graph and open a session.

        Args:
            graph: Bytes of `model.onnx`.
            weights: Bytes of `model.safetensors`.
            options: Device, providers, precision and threads.
            where: The entry, for messages.
            outputs: Names of the graph's float outputs; `run` gives the first.

        Raises:
            EntryError: The graph is not one of ours, or ONNX Runtime refuses it.
            DeviceError: What was asked for is not what would run.
            MissingDependencyError: No ONNX Runtime is installed.
        """
        check_graph(graph, weights, where)
        # Kept alive as long as the session: ONNX Runtime holds a bare pointer to these bytes.
        self._weights = weights
        self._threads = options.threads
        automatic = options.device == "auto" and not options.providers
        asked = choose_providers(options, available_providers(), sha256_hex(weights))
        on_gpu = any(provider in (CUDA, TENSORRT) for provider, _ in asked)
        unloaded = _preload_cuda() if on_gpu else ""
        try:
            self._session = _open_session(graph, weights, asked, options.threads)
            running = _provider_of(self._session)
            fault = "" if running == asked[0][0] else unloaded or f"{running} would run instead"
        except Exception as error:  # ONNX Runtime raises a family of its own
            running, fault = "", _one_line(error)
        if fault and asked[0][0] != CPU:
            if not automatic:
                raise DeviceError(
                    f"{asked[0][0]} was asked for and cannot run ({fault}); run `embedkit doctor`, or take "
                    "device='cpu'"
                )
            self.note = f"{asked[0][0]} cannot run here ({fault}), so the CPU does"
            asked, running, fault = [(CPU, {})], CPU, ""
            try:
                self._session = _open_session(graph, weights, asked, options.threads)
            except Exception as error:
                fault = _one_line(error)
        if fault:
            raise EntryError(f"{where}: ONNX Runtime refuses the graph ({fault})")
        check_precision(options.precision, running)
        self._providers = asked
        self._provider: str = running
        inputs, found = self._session.get_inputs(), self._session.get_outputs()
        if (
            [i.name for i in inputs] != ["pixels"]
            or inputs[0].type != "tensor(uint8)"
            or not {(name, "tensor(float)") for name in outputs} <= {(o.name, o.type) for o in found}
        ):
            wanted = " and ".join(f"`{name}` (float)" for name in outputs)
            raise EntryError(
                f"{where}: expected the input `pixels` (uint8) and the output {wanted}, found "
                f"{[(i.name, i.type) for i in inputs]} and {[(o.name, o.type) for o in found]}"
            )
        self.input_shape = tuple(inputs[0].shape[1:])
        shapes = {o.name: tuple(o.shape[1:]) for o in found}
        self.output_shapes = {name: shapes[name] for name in outputs}
        self.output_shape = self.output_shapes[outputs[0]]
        # One stream of work per device: interleaved copies from several threads gain nothing there.
        self._device_lock = threading.Lock() if self._provider != CPU else None

    @property
    def provider(self) -> str:
        """The provider that really runs, by ONNX Runtime's name."""
        return self._provider

    @property
    def concurrency(self) -> int:
        """Calls of `run` worth having in flight: one a core on the CPU, one on a device."""
        return self._threads if self._provider == CPU else 1

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Embed one batch.

        Args:
            pixels: uint8 (N, C, H, W), C-contiguous.

        Returns:
            float32 (N, D), not normalised.
        """
        return next(iter(self.run_all(pixels).values()))

    def run_all(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch, uint8 (N, C, H, W) C-contiguous, for every output: name -> float32 (N, ...).

        Raises:
            DeviceError: ONNX Runtime cannot run it, most often for want of memory.
        """
        try:
            if self._device_lock is None:
                names = list(self.output_shapes)
                return dict(zip(names, self._session.run(names, {"pixels": pixels}), strict=True))
            return self._run_bound(pixels, device_of(self._providers[0]))
        except Exception as error:  # ONNX Runtime's own errors have no common base but this
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            reason = " ".join(str(error).split())[:300]
            raise DeviceError(
                f"{self.provider} cannot run a batch of {len(pixels)} ({reason}); make it smaller, or free memory"
            ) from None

    def run_bound(self, pixels: np.ndarray, device: tuple[str, int]) -> np.ndarray:
        """Embed one batch through an I/O binding: uint8 pixels cross to the device once, rows come back once.

        Args:
            pixels: uint8 (N, C, H, W), C-contiguous.
            device: ONNX Runtime's device type (`cuda`, `cpu`) and index.

        Returns:
            float32 (N, D), not normalised.
        """
        return next(iter(self._run_bound(pixels, device).values()))

    def _run_bound(self, pixels: np.ndarray, device: tuple[str, int]) -> dict[str, np.ndarray]:
        with self._device_lock or contextlib.nullcontext():
            binding = self._session.io_binding()
            value = onnxruntime().OrtValue.ortvalue_from_numpy(pixels, *device)
            binding.bind_ortvalue_input("pixels", value)
            for name in self.output_shapes:
                binding.bind_output(name, *device)
            self._session.run_with_iobinding(binding)
            return dict(zip(self.output_shapes, binding.copy_outputs_to_cpu(), strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open_session(graph: bytes, weights: bytes, providers: list[tuple[str, dict[str, Any]]], threads: int):
    """A session on exactly these providers, over these very bytes: no file is opened by its path."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1 if providers[0][0] == CPU else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.load_model_format", "ONNX"
    )  # not told by what the bytes look like
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Even for a graph without external tensors: a name that is looked up finds this table, and no file.
    options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    # Its warnings about a fall-back are our errors; 2 (warning) is its own default.
    ort.set_default_logger_severity(4)
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    finally:
        ort.set_default_logger_severity(2)
    session.disable_fallback()
    return session


def _provider_of(session: Any) -> str:
    """The provider that runs the graph: the first one of the session that any operator was given to.

    A session names every provider that it was asked for, also one that took nothing. ONNX Runtime before 1.24 does not
    say what was given to which; there the first one is believed.
    """
    names = session.get_providers()
    if len(names) < 2 or not hasattr(session, "get_provider_graph_assignment_info"):
        return names[0]
    busy = {part.ep_name for part in session.get_provider_graph_assignment_info()}
    return next((name for name in names if name in busy), names[0])


def _preload_cuda() -> str:
    """Load the CUDA libraries of pip wheels, which are found only when they are loaded first.

    Returns:
        What could not be loaded, one line, or nothing.
    """
    said = io.StringIO()
    # It prints its failures, and stdout belongs to the user's data.
    with contextlib.redirect_stdout(said), contextlib.suppress(Exception):
        onnxruntime().preload_dlls()
    return next((line.strip() for line in said.getvalue().splitlines() if line.startswith("Failed")), "")


def check_precision(precision: str, provider: str) -> None:
    """Refuse a precision that the running provider does not have.

    Raises:
        DeviceError: `tf32` needs an NVIDIA GPU, `fp16` needs TensorRT.
    """
    needs = {"fp32": (), "tf32": (CUDA, TENSORRT), "fp16": (TENSORRT,)}[precision]
    if needs and provider not in needs:
        raise DeviceError(
            f"precision={precision!r} needs {' or '.join(needs)}, and {provider} runs; take fp32"
        )


def choose_providers(
    options: EngineOptions, available: Sequence[str], weights_sha256: str
) -> list[tuple[str, dict[str, Any]]]:
    """The providers to ask ONNX Runtime for, in order, each with its options.

    Args:
        options: What the user asked for.
        available: What this ONNX Runtime was built with.
        weights_sha256: Part of the key of TensorRT's engine cache: an engine compiled for other weights is stale.

    Raises:
        DeviceError: What was asked for is not in this build.
        ConfigError: The cache folder cannot be made.
    """
    kind, _, index = options.device.partition(":")
    if options.providers:
        asked = [
            (item, {}) if isinstance(item, str) else (item[0], dict(item[1])) for item in options.providers
        ]
        missing = [name for name, _ in asked if name not in available]
        if AZURE in missing:
            raise DeviceError(
                f"{AZURE} is no device: it sends data to a service, and runs no entry; take {CPU}"
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
            f"{', '.join(available)}: pip uninstall -y onnxruntime && pip install 'embedkit[gpu]'"
        )
    else:
        asked = [(CUDA, {})]
    defaults: dict[str, dict[str, Any]] = {
        CUDA: {
            "device_id": int(index or 0),
            # TensorFloat-32 breaks the parity of 1e-4, so it runs only when asked for.
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
                f"cache_dir: {str(root)!r} {reason}, and a compiled engine is a program; close it, or name another one"
            )
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)  # one that was there already, or was made under another umask
    except OSError as error:
        raise ConfigError(f"cache_dir: {folder!r} cannot be a folder of yours ({error.strerror})") from None
    return {
        "trt_fp16_enable": options.precision == "fp16",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": folder,
    }


def _gpu_name() -> str:
    """The first GPU's model and driver as the kernel module reports them, `unknown` without one."""
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
    """ONNX Runtime's device type and index of a provider: where its inputs have to lie."""
    name, options = provider
    return ("cuda", int(options.get("device_id", 0))) if name in (CUDA, TENSORRT) else ("cpu", 0)
