"""ONNX Runtime as an engine: pixels in, embeddings or other named outputs out.

Weights are never looked up by path: the bytes that were hashed are the bytes that run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from embedkit.errors import DeviceError, EntryError
from embedkit.model.layout import WEIGHTS, sha256_hex
from embedkit.model.onnx_guard import check_graph
from embedkit.model.providers import (
    CPU,
    CUDA,
    TENSORRT,
    EngineOptions,
    _one_line,
    _preload_cuda,
    available_providers,
    check_precision,
    choose_providers,
    device_of,
    onnxruntime,
)


class OnnxEngine:
    """ONNX Runtime over one entry's graph and weights.

    On the CPU, one intra-op thread runs each call, and `concurrency` calls run in parallel. A core never waits for
    another one, and the embedding of an image does not depend on the number of threads.

    Attributes:
        note: One sentence when `auto` could not use its first choice, else empty.
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
            EntryError: The graph does not pass the guard, or ONNX Runtime refuses it.
            DeviceError: Something else than what was requested would run.
            MissingDependencyError: No ONNX Runtime is installed.
        """
        check_graph(graph, weights, where)
        # ONNX Runtime holds a bare pointer to these bytes, so they must live as long as the session.
        self._weights = weights
        self._threads = options.threads
        automatic = options.device == "auto" and not options.providers
        asked = choose_providers(options, available_providers(), sha256_hex(weights))
        on_gpu = any(provider in (CUDA, TENSORRT) for provider, _ in asked)
        unloaded = _preload_cuda() if on_gpu else ""
        try:
            self._session = open_session(graph, weights, asked, options.threads)
            running = _provider_of(self._session)
            fault = "" if running == asked[0][0] else unloaded or f"{running} would run instead"
        except Exception as error:  # ONNX Runtime's errors have no common base class
            running, fault = "", _one_line(error)
        if fault and asked[0][0] != CPU:
            if not automatic:
                raise DeviceError(
                    f"{asked[0][0]} was requested and cannot run ({fault}); run `embedkit doctor`, or use "
                    "device='cpu'"
                )
            self.note = f"{asked[0][0]} cannot run here ({fault}), so the CPU runs instead"
            asked, running, fault = [(CPU, {})], CPU, ""
            try:
                self._session = open_session(graph, weights, asked, options.threads)
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
        # One stream of work per device: copies that several threads interleave bring no gain.
        self._device_lock = threading.Lock() if self._provider != CPU else None

    @property
    def provider(self) -> str:
        """The provider that runs, by ONNX Runtime's name."""
        return self._provider

    @property
    def concurrency(self) -> int:
        """Useful number of concurrent calls of `run`: one per core on the CPU, one on a device."""
        return self._threads if self._provider == CPU else 1

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Embed one batch.

        Args:
            pixels: uint8 (N, C, H, W), C-contiguous.

        Returns:
            float32 (N, D), not normalized.
        """
        return next(iter(self.run_all(pixels).values()))

    def run_all(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch, uint8 (N, C, H, W) C-contiguous, for every output: name -> float32 (N, ...).

        Raises:
            DeviceError: ONNX Runtime cannot run it, most often because memory is short.
        """
        try:
            if self._device_lock is None:
                names = list(self.output_shapes)
                return dict(zip(names, self._session.run(names, {"pixels": pixels}), strict=True))
            return self._run_bound(pixels, device_of(self._providers[0]))
        except Exception as error:  # ONNX Runtime's errors share no base class, only a module
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            reason = " ".join(str(error).split())[:300]
            raise DeviceError(
                f"{self.provider} cannot run a batch of {len(pixels)} ({reason}); use smaller batches, or free memory"
            ) from None

    def _run_bound(self, pixels: np.ndarray, device: tuple[str, int]) -> dict[str, np.ndarray]:
        with self._device_lock or contextlib.nullcontext():
            binding = self._session.io_binding()
            value = onnxruntime().OrtValue.ortvalue_from_numpy(pixels, *device)
            binding.bind_ortvalue_input("pixels", value)
            for name in self.output_shapes:
                binding.bind_output(name, *device)
            self._session.run_with_iobinding(binding)
            return dict(zip(self.output_shapes, binding.copy_outputs_to_cpu(), strict=True))


def open_session(
    graph: bytes, weights: bytes, providers: list[tuple[str, dict[str, Any]]], threads: int
) -> Any:
    """A session on exactly these providers and over these bytes; no file is opened by its path."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1 if providers[0][0] == CPU else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.load_model_format", "ONNX"
    )  # do not guess the format from the bytes
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Also for a graph without external tensors: a name is looked up in this table and never as a file.
    options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    # A fallback is an error here, so its warnings are silenced; 2 (warning) is its default.
    ort.set_default_logger_severity(4)
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    finally:
        ort.set_default_logger_severity(2)
    session.disable_fallback()
    return session


def _provider_of(session: Any) -> str:
    """The provider that runs the graph: the first one of the session that any operator was assigned to.

    A session lists every provider that was requested, also one without operators. ONNX Runtime before 1.24 does not
    report the assignment; then the first provider is assumed.
    """
    names: list[str] = session.get_providers()
    if len(names) < 2 or not hasattr(session, "get_provider_graph_assignment_info"):
        return names[0]
    busy: set[str] = {part.ep_name for part in session.get_provider_graph_assignment_info()}
    return next((name for name in names if name in busy), names[0])
