"""The engine: what is asked for is what runs, or an error that says how to get there."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from embedkit._io.optional import install_hint
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, DeviceError, EntryError
from embedkit.model import providers as providers_module
from embedkit.model.engines import onnx as engine_module
from embedkit.model.engines.onnx import OnnxEngine, _provider_of
from embedkit.model.providers import (
    AZURE,
    CPU,
    CUDA,
    TENSORRT,
    EngineOptions,
    available_cpus,
    available_providers,
    check_precision,
    choose_providers,
    device_of,
    installed_runtimes,
    onnxruntime,
)

CPU_WHEEL = ("AzureExecutionProvider", CPU)
GPU_WHEEL = (TENSORRT, CUDA, CPU)
WEIGHTS = "ab" * 32

needs_cpu_wheel = pytest.mark.skipif(
    CUDA in onnxruntime().get_available_providers(), reason="says what a wheel without CUDA does"
)


@pytest.fixture(scope="module")
def entry(by_hand):
    return by_hand.TinyEntry()


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


# --- what is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device):
    assert EngineOptions(device=device).device == device


@pytest.mark.parametrize(
    "device",
    [
        "",
        "gpu",
        "CUDA",
        "cpu:0",
        "cpu:",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:²",
        "cuda:١",
        "auto:0",
        "cuda:0\n",
    ],
)
def test_devices_that_are_none(device):
    with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda or cuda:<index>, found"):
        EngineOptions(device=device)


def test_other_options_that_are_none():
    with pytest.raises(ConfigError, match="precision: expected one of fp32, tf32, fp16, found 'bf16'"):
        EngineOptions(precision="bf16")
    with pytest.raises(ConfigError, match="threads: expected at least 1, found 0"):
        EngineOptions(threads=0)
    for wrong in ((CUDA,), (CUDA, "x"), (CUDA, {}, {}), ()):
        with pytest.raises(ConfigError, match=r"providers: expected names or \(name, options\) pairs"):
            EngineOptions(providers=(wrong,))
    with pytest.raises(ConfigError, match=rf"providers: expected a list of names, found '{CPU}'"):
        load_encoder(providers=CPU)


def chosen(available, **options) -> list:
    return choose_providers(EngineOptions(**options), available, WEIGHTS)


def test_auto_takes_cuda_where_it_is_and_the_cpu_elsewhere():
    assert (
        chosen(CPU_WHEEL) == chosen(CPU_WHEEL, device="cpu") == chosen(GPU_WHEEL, device="cpu") == [(CPU, {})]
    )
    assert [name for name, _ in chosen(GPU_WHEEL)] == [CUDA]  # TensorRT compiles for minutes: only when asked


def test_cuda_keeps_float32_unless_tf32_is_asked_for():
    [(name, options)] = chosen(GPU_WHEEL, device="cuda:3")
    assert name == CUDA and options["device_id"] == 3 and options["use_tf32"] == 0
    assert chosen(GPU_WHEEL, device="cuda", precision="tf32")[0][1]["use_tf32"] == 1
    assert device_of((name, options)) == ("cuda", 3)
    given = chosen(GPU_WHEEL, providers=((CUDA, {"device_id": 1, "use_tf32": 1}), CPU))
    assert given[0][1]["device_id"] == 1 and given[0][1]["use_tf32"] == 1 and given[1] == (CPU, {})
    assert device_of((CPU, {})) == device_of(("OpenVINOExecutionProvider", {})) == ("cpu", 0)


def test_cuda_on_a_cpu_wheel_gives_the_pip_line():
    with pytest.raises(DeviceError) as caught:
        chosen(CPU_WHEEL, device="cuda:1")
    message = str(caught.value)
    assert "device='cuda:1' needs the GPU build" in message
    assert message.endswith(f"pip uninstall -y onnxruntime && {install_hint('gpu')}")


def test_a_provider_that_the_wheel_lacks():
    with pytest.raises(
        DeviceError, match=f"Nope is not in this ONNX Runtime, which has .*{CPU}.*embedkit doctor"
    ):
        chosen(CPU_WHEEL, providers=(CPU, "Nope"))
    with pytest.raises(DeviceError, match="Nope is not in this ONNX Runtime"):
        load_encoder(providers=["Nope"])


def test_tensorrts_cache_is_keyed_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr(providers_module, "_gpu_name", lambda: "NVIDIA_H100-570.1")
    old = os.umask(0)
    try:
        first = dict(chosen(GPU_WHEEL, providers=(TENSORRT, CUDA), cache_dir=str(tmp_path)))[TENSORRT]
    finally:
        os.umask(old)
    folder = Path(first["trt_engine_cache_path"])
    assert first["trt_engine_cache_enable"] and first["trt_fp16_enable"] is False
    assert folder.is_dir() and folder.parent == tmp_path / "tensorrt"
    assert folder.stat().st_mode & 0o777 == 0o700
    for part in ("NVIDIA_H100-570.1", onnxruntime().__version__, "fp32", WEIGHTS[:16]):
        assert part in folder.name
    folder.chmod(0o777)
    others = [
        choose_providers(
            EngineOptions(providers=(TENSORRT,), cache_dir=str(tmp_path), **changes), GPU_WHEEL, weights
        )
        for changes, weights in (({}, WEIGHTS), ({"precision": "fp16"}, WEIGHTS), ({}, "cd" * 32))
    ]
    paths = [asked[0][1]["trt_engine_cache_path"] for asked in others]
    assert paths[0] == str(folder) and len(set(paths)) == 3
    assert folder.stat().st_mode & 0o777 == 0o700  # tightened when it was not
    assert others[1][0][1]["trt_fp16_enable"] is True
    without = chosen(GPU_WHEEL, providers=(TENSORRT,))[0][1]
    assert "trt_engine_cache_enable" not in without
    if os.name != "nt":  # who can put a compiled engine there runs code here
        for folder in (tmp_path, tmp_path / "tensorrt"):
            folder.chmod(0o777)
            with pytest.raises(
                ConfigError, match="can be written by other users, and a compiled engine is a"
            ):
                chosen(GPU_WHEEL, providers=(TENSORRT,), cache_dir=str(tmp_path))
            folder.chmod(0o755)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cache_dir: .* cannot be made a private folder"):
        chosen(GPU_WHEEL, providers=(TENSORRT,), cache_dir=str(tmp_path / "file"))


def test_no_folder_is_made_where_tensorrt_is_not_asked_for(tmp_path):
    chosen(GPU_WHEEL, cache_dir=str(tmp_path / "cache"))
    chosen(CPU_WHEEL, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("precision", "provider", "runs"),
    [
        ("fp32", CPU, True),
        ("fp32", CUDA, True),
        ("tf32", CPU, False),
        ("tf32", CUDA, True),
        ("tf32", TENSORRT, True),
        ("fp16", CPU, False),
        ("fp16", CUDA, False),
        ("fp16", TENSORRT, True),
    ],
)
def test_a_precision_that_cannot_run_is_refused(precision, provider, runs):
    if runs:
        check_precision(precision, provider)
    else:
        with pytest.raises(
            DeviceError, match=f"precision='{precision}' needs .*, but {provider} runs; use fp32"
        ):
            check_precision(precision, provider)


def test_lower_precision_on_the_cpu_is_refused_at_load(tiny_entry):
    for precision in ("tf32", "fp16"):
        with pytest.raises(DeviceError, match=f"precision='{precision}' needs"):
            load_encoder(tiny_entry, device="cpu", precision=precision)


@needs_cpu_wheel
def test_azure_is_no_provider(tiny_entry):
    """It is in every wheel for the CPU, calls any graph its own, and runs nothing of it."""
    assert AZURE not in available_providers()
    for providers in ([AZURE], [AZURE, CPU], [CPU, AZURE], [(AZURE, {})]):
        with pytest.raises(DeviceError, match=f"{AZURE} is not a device: .*; use {CPU}"):
            load_encoder(tiny_entry, providers=providers)


def test_a_provider_that_took_nothing_is_not_what_runs():
    """A session lists every provider that it was asked for."""

    def session(names, busy):
        parts = [SimpleNamespace(ep_name=name) for name in busy]
        return SimpleNamespace(get_providers=lambda: names, get_provider_graph_assignment_info=lambda: parts)

    assert _provider_of(session([AZURE, CPU], [CPU, CPU])) == CPU
    assert _provider_of(session([TENSORRT, CUDA, CPU], [CPU, CUDA])) == CUDA
    assert _provider_of(session([CUDA, CPU], [CPU, CUDA])) == CUDA
    assert _provider_of(session([CPU], [])) == CPU
    assert _provider_of(SimpleNamespace(get_providers=lambda: [CUDA, CPU])) == CUDA  # before 1.24


@needs_cpu_wheel
def test_what_was_asked_for_and_took_nothing_is_an_error(entry, monkeypatch):
    """A provider of this wheel that really registers and really runs nothing: Azure, under the check's nose."""
    if AZURE not in onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has no such provider")
    monkeypatch.setattr(engine_module, "available_providers", onnxruntime().get_available_providers)
    with pytest.raises(DeviceError, match=f"{AZURE} was requested and cannot run .{CPU} would run instead"):
        OnnxEngine(entry.graph, entry.weights, EngineOptions(providers=(AZURE, CPU)))


# --- what runs --------------------------------------------------------------------------------------------


def test_rows_are_the_matrix_product(entry):
    engine = OnnxEngine(entry.graph, entry.weights, EngineOptions(device="cpu"))
    batch = pixels(5)
    assert (engine.provider, engine.input_shape, engine.output_shape, engine.note) == (
        CPU,
        (3, 8, 8),
        (4,),
        "",
    )
    np.testing.assert_allclose(engine.run(batch), entry.embed(batch, normalize=False), rtol=1e-5, atol=1e-5)
    assert engine.run(batch).dtype == np.float32
    assert engine.run(batch[:0]).shape == (0, 4)


def test_the_code_path_of_a_gpu_gives_the_same_rows_on_the_cpu(entry, encoder):
    """IOBinding with uint8 pixels on the device, here the CPU."""
    engine = OnnxEngine(entry.graph, entry.weights, EngineOptions(device="cpu"))
    for count in (1, 7):
        batch = pixels(count)
        np.testing.assert_array_equal(engine._run_bound(batch, ("cpu", 0))["embedding"], engine.run(batch))
    photographs = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    rows = encoder._engine._run_bound(photographs, ("cpu", 0))["embedding"]
    np.testing.assert_array_equal(rows, encoder._engine.run(photographs))
    assert rows.shape == (2, 1280)


def test_concurrency_is_one_call_a_core(entry):
    assert OnnxEngine(entry.graph, entry.weights, EngineOptions(device="cpu", threads=3)).concurrency == 3


def test_the_weights_live_as_long_as_the_session(entry):
    """ONNX Runtime is given the bytes of a buffer that it does not own."""
    weights = bytes(bytearray(entry.weights))  # a copy that nobody else holds
    engine = OnnxEngine(bytes(bytearray(entry.graph)), weights, EngineOptions(device="cpu"))
    # Whether freed bytes show depends on the operators and the version, so the reference itself is looked for.
    assert any(value is weights for value in vars(engine).values())
    del weights
    gc.collect()
    litter = [bytes([255]) * len(entry.weights) for _ in range(2000)]
    batch = pixels(3)
    np.testing.assert_allclose(engine.run(batch), entry.embed(batch, normalize=False), rtol=1e-5, atol=1e-5)
    del litter


def test_weights_of_the_default_entry_survive_a_collection(default_entry):
    rows = []
    for _ in range(2):
        encoder = load_encoder(default_entry, device="cpu", threads=1)
        gc.collect()
        litter = bytearray(b"\xff" * 15_000_000)
        rows.append(encoder.encode(np.full((224, 224, 3), 90, np.uint8)))
        del encoder, litter
    np.testing.assert_array_equal(rows[0], rows[1])
    assert np.isfinite(rows[0]).all()


def test_no_file_is_opened_by_its_path_even_behind_the_guards_back(entry, by_hand, monkeypatch, tmp_path):
    """With the table in memory, ONNX Runtime looks a location up there and nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine_module, "check_graph", lambda *_: [])
    Path("secret.bin").write_bytes(entry.weight.tobytes())
    for location in ("secret.bin", str(tmp_path / "secret.bin")):
        external = entry.external(location=location, offset=0)
        graph = entry.make_graph(weight=by_hand.tensor_proto("weight", (192, 4), 10, external=external))
        with pytest.raises(EntryError, match="not found from the table"):
            OnnxEngine(graph, entry.weights, EngineOptions(device="cpu"))


def test_a_graph_that_holds_all_its_weights_runs(entry, by_hand):
    """Such a graph gets the table, too."""
    outside = by_hand.tensor_proto(
        "bias", (4,), 1, external=entry.external(offset=entry.start + entry.weight.nbytes, length=16)
    )
    body = entry.graph_proto(weight=by_hand.tensor_proto("weight", (192, 4), 10, raw=entry.weight.tobytes()))
    inside = by_hand.tensor_proto("bias", (4,), 1, raw=entry.bias.tobytes())
    assert by_hand.field(5, outside) in body
    graph = by_hand.model_proto(body.replace(by_hand.field(5, outside), by_hand.field(5, inside)))
    engine = OnnxEngine(graph, entry.weights, EngineOptions(device="cpu"))
    rows = entry.embed(pixels(2), normalize=False)
    np.testing.assert_allclose(engine.run(pixels(2)), rows, rtol=1e-5, atol=1e-5)


# --- falling back -----------------------------------------------------------------------------------------


@needs_cpu_wheel
@pytest.mark.parametrize("quiet", [True, False])
def test_auto_says_when_the_gpu_cannot_run_and_cuda_is_an_error(entry, monkeypatch, quiet):
    """A GPU wheel on a machine without a GPU: it offers CUDA, and a session on CUDA is not to be had."""
    import warnings

    monkeypatch.setattr(onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    with warnings.catch_warnings():
        # ONNX Runtime warns and goes on, or with warnings as errors raises: both mean that CUDA does not run.
        warnings.simplefilter("ignore" if quiet else "error")
        engine = OnnxEngine(entry.graph, entry.weights, EngineOptions(device="auto", threads=2))
        assert engine.provider == CPU and engine.concurrency == 2
        assert engine.note.startswith(f"{CUDA} cannot run here (") and engine.note.endswith(
            "so the CPU runs instead"
        )
        assert "\n" not in engine.note
        batch = pixels(2)
        np.testing.assert_allclose(
            engine.run(batch), entry.embed(batch, normalize=False), rtol=1e-5, atol=1e-5
        )
        for options in (EngineOptions(device="cuda"), EngineOptions(providers=(CUDA, CPU))):
            with pytest.raises(DeviceError, match=f"{CUDA} was requested and cannot run .*use device='cpu'"):
                OnnxEngine(entry.graph, entry.weights, options)
        with pytest.raises(DeviceError, match="precision='tf32' needs"):
            OnnxEngine(entry.graph, entry.weights, EngineOptions(precision="tf32"))


@needs_cpu_wheel
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_bad_graph_is_the_graphs_fault_on_the_way_back_to_the_cpu_too(entry, by_hand, monkeypatch):
    monkeypatch.setattr(onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    bad = entry.make_graph(nodes=by_hand.field(1, by_hand.node("NoSuchOperator", ["flat"], ["y"])))
    with pytest.raises(EntryError, match=r"model.onnx: ONNX Runtime refuses the graph \(.*NoSuchOperator"):
        OnnxEngine(bad, entry.weights, EngineOptions(device="auto"))


def test_loading_prints_nothing(tiny_entry, capfd):
    load_encoder(tiny_entry, threads=1)
    assert capfd.readouterr() == ("", "")


# --- wheels -----------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def fake_wheel(folder: Path, name: str, version: str = "1.2.3") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_two_wheels_give_one_warning_with_the_mend(tmp_path, tiny_entry):
    """The fix removes both, since they overwrote each other's files, and installs the one with more in it."""
    names = sorted(installed_runtimes())
    assert len(names) == 1
    other = "onnxruntime-gpu" if names[0] != "onnxruntime-gpu" else "onnxruntime"
    fake_wheel(tmp_path, other)
    fake_wheel(tmp_path, "onnxruntime-extensions")  # does not own the import name
    (tmp_path / "broken-1.0.dist-info").mkdir()
    code = f"import embedkit\nfor _ in range(2): print(embedkit.load_encoder({str(tiny_entry)!r}).dim)"
    done = python(code, PYTHONPATH=str(tmp_path))
    assert done.stdout == "4\n4\n", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    ) in done.stderr


def test_no_wheel_gives_the_pip_line(tiny_entry):
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import embedkit\n"
        f"try: embedkit.load_encoder({str(tiny_entry)!r})\n"
        "except embedkit.MissingDependencyError as error: print(error)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ONNX Runtime cannot be imported (")
    assert f"{install_hint('cpu')}, or the extra `gpu`" in done.stdout and done.stdout.count("\n") == 1


def test_cores():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        done = python("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
                      "from embedkit.model.providers import available_cpus; print(available_cpus())")  # fmt: skip
        assert done.stdout == "1\n"
