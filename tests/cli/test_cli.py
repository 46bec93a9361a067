"""`embedkit zoo` and `embedkit doctor`: what goes to which stream, exit statuses, JSON, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedkit
from embedkit import cli as commands
from embedkit._io.text import safe_for_terminal
from embedkit.embeddings.metadata import Metadata
from embedkit.embeddings.table import Embeddings
from embedkit.errors import MissingDependencyError
from embedkit.hub import resolve as load
from embedkit.hub.folder import FolderZoo
from embedkit.model import providers
from embedkit.model.engines import onnx as engine
from embedkit.model.providers import CPU, CUDA
from embedkit.workflows import doctor


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: `run("zoo", "list")` -> exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["embedkit", *map(str, arguments)])
        with warnings.catch_warnings():  # `main` shows them in its own way
            with pytest.raises(SystemExit) as end:
                commands.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def package(by_hand, tmp_path, monkeypatch) -> Path:
    """A package's zoo of two small entries, one of which only its index knows."""
    zoo = tmp_path / "package"
    by_hand.TinyEntry().write(zoo / "linear-tiny.noise")
    by_hand.TinyEntry(seed=1).write(zoo / "linear-far.noise")
    by_hand.write_index(zoo)
    shutil.rmtree(zoo / "linear-far.noise")
    monkeypatch.setattr(load, "package_zoo", lambda: FolderZoo(zoo))
    monkeypatch.setattr(load, "DEFAULT_ENCODER", "linear-tiny")
    return zoo


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    code = "from embedkit.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("zoo",), ("--help",), ("zoo", "--help"), ("doctor", "--help")])
def test_help(run, arguments):
    status, out, err = run(*arguments)
    assert status == (0 if "--help" in arguments else 2)  # no arguments at all is wrong usage
    assert "Usage: " in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("--nope",),
        ("zoo", "nope"),
        ("zoo", "list", "a", "b"),
        ("zoo", "list", "--nope"),
        ("zoo", "info"),
        ("zoo", "verify", "--device"),
        ("doctor", "x"),
        ("embed",),
        ("embed", "x", "--worker", "3/2"),
        ("embed", "x", "--batch-size", "0"),
    ],
)
def test_wrong_usage_is_status_two(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert err.startswith("embedkit: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "option", "expected"),
    [
        (("embed", ".", "--on-error", "fail"), "--on-error", "expected skip or stop, found 'fail'"),
        (("embed", ".", "--max-failures", "1.5"), "--max-failures", "expected a number of images or a share"),
        (("embed", ".", "--dtype", "f8"), "--dtype", "expected float32 or float16"),
        (("embed", ".", "-o", "x.csv"), "--output", "expected X.parquet"),
        (("embed", ".", "--threads", "many"), "--threads", "expected 'auto' or a whole number"),
        (("embed", ".", "--device", "tpu"), "--device", "expected auto, cpu, cuda"),
        (("embed", ".", "--decode", "fast"), "--decode", "expected one of"),
        (("cluster", "e.parquet", "--algorithm", "dbscan"), "--algorithm", "expected one of kmeans"),
        (("cluster", "e.parquet", "-n", "99"), "--n-clusters", "expected "),
        (("cluster", "e.parquet", "--reduce", "tsne:2"), "--reduce", ""),
        (("duplicates", "e.parquet", "--threshold", "95"), "--threshold", "expected a cosine in (-1, 1]"),
        (("leaks", "e.parquet", "e.parquet", "--threshold", "95"), "--threshold", "expected a cosine"),
        (("search", "a", "e.parquet", "-k", "3", "--draw-sheet", "x.pdf"), "--draw-sheet", "expected a name"),
        (("lint", "e.parquet", "--threshold", "95"), "--threshold", "expected a cosine"),
        (("atlas", "e.parquet", "--map", "tsne"), "--map", "expected one of auto"),
        (("verify", "a.png", "a.png", "--threshold", "95"), "--threshold", "expected a cosine"),
        (
            ("verify", "a.png", "a.png", "--encoder", "linear-tiny"),
            "--threshold",
            "linear-tiny.noise has none",
        ),
        (
            ("calibrate", "e.parquet", "--label", "who", "--target-fmr", "1"),
            "--target-fmr",
            "expected a rate",
        ),
        (("zoo", "bundle", "linear-tiny", "-o", "x.zip"), "--output", "expected a name that ends in .tar"),
    ],
)
def test_a_bad_value_of_an_option_is_status_two_and_told_by_its_name(
    run, package, tmp_path, monkeypatch, arguments, option, expected
):
    monkeypatch.chdir(tmp_path)
    facts = Metadata(entry="x.y", manifest_sha256="a" * 64, fingerprint="b" * 64, dim=8, normalized=True)
    labels = {"who": list("aabbccdd")}
    Embeddings.from_arrays(np.eye(8, dtype=np.float32), list("abcdefgh"), facts, labels=labels).save(
        "e.parquet"
    )
    Image.new("RGB", (8, 8)).save("a.png")
    status, out, err = run(*arguments)
    assert err.startswith(f"embedkit: {option}: {expected}"), err
    assert (status, out, err.count("\n")) == (2, "", 1), err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("cluster", "e.parquet", "-k", "5"), "there are -n (--n-clusters), -o (--output), -q (--quiet)"),
        (("search", "a", "e.parquet", "-n", "3"), "there are -k (--neighbors), -q (--quiet)"),
        (("dedupe", "e.parquet"), "did you mean 'duplicates'"),
    ],
)
def test_wrong_usage_names_what_is_near(run, arguments, near):
    status, _, err = run(*arguments)
    assert status == 2 and near in err


# --- zoo list ---------------------------------------------------------------------------------------------


def test_zoo_list(run, package):
    status, out, err = run("zoo", "list")
    assert (status, err) == (0, "")
    head, far, tiny = out.splitlines()
    assert head == "name\tentry\tkind\tdim\tmethod\ttrained on\tlicense\tzoo"
    assert far.split("\t")[:3] == ["linear-far", "linear-far.noise", "encoder"]
    assert far.endswith("\tin none of the configured zoos")
    assert tiny.split("\t") == [
        "linear-tiny", "linear-tiny.noise", "encoder", "4", "linear", "noise", "CC0-1.0", str(package)
    ]  # fmt: skip


def test_zoo_list_with_a_pattern(run, package):
    assert run("zoo", "list", "far")[1].count("\n") == run("zoo", "list", "ar-fa")[1].count("\n") == 2
    assert run("zoo", "list", "*-far*")[1].splitlines()[1].startswith("linear-far\t")
    status, out, err = run("zoo", "list", "x*")
    assert (status, out.count("\n"), err) == (0, 1, "embedkit: no encoder matches 'x*'\n")
    assert run("zoo", "list", "x*", "--json")[:2] == (0, "[]\n")


def test_zoo_list_as_json(run, package):
    status, out, _ = run("zoo", "list", "--json")
    far, tiny = json.loads(out)
    assert status == 0
    assert set(far) == set(tiny) == {
        "name", "manifest_sha256", "method", "architecture", "data", "dim", "license", "bytes", "metrics",
        "alias", "zoo", "path", "at_hand", "kind",
    }  # fmt: skip
    assert (far["zoo"], tiny["zoo"], tiny["dim"]) == ("", str(package), 4)
    assert len(tiny["manifest_sha256"]) == 64


def test_text_of_an_index_cannot_drive_the_terminal(run, package, by_hand):
    by_hand.write_index(package, data="a\tb\nc\x1b[2Jd")
    status, out, _ = run("zoo", "list")
    assert status == 0 and out.count("\n") == 2 and out.count("\t") == 2 * 7
    assert r"a\tb\nc\x1b[2Jd" in out
    assert json.loads(run("zoo", "list", "--json")[1])[0]["data"] == "a\tb\nc\x1b[2Jd"


def test_safe_for_terminal():
    assert safe_for_terminal("a\n\t\x1b\u202eé\udcff") == "a\\n\\t\\x1b\\u202eé\udcff"
    assert safe_for_terminal("a\r\nb\t\x9b", lines=True) == "a\nb\t\\x9b"


# --- zoo info ---------------------------------------------------------------------------------------------


def test_zoo_info_prints_the_card(run, package):
    for name in ("linear-tiny", "linear-tiny@latest", package / "linear-tiny.noise"):
        status, out, err = run("zoo", "info", name)
        assert (status, err) == (0, "")
        facts, _, card = out.partition("\n\n")
    assert facts.splitlines()[1:] == [
        "entry\tlinear-tiny.noise",
        "kind\tencoder",
        "dim\t4",
        "license\tCC0-1.0",
        "input\t8x8 rgb",
        "trained on\tnoise",
        "used by\tembed, search",
    ]
    assert card == "# A tiny entry\n"


def test_zoo_info_as_json(run, package):
    status, out, _ = run("zoo", "info", "linear-tiny", "--json")
    facts = json.loads(out)
    assert status == 0
    assert set(facts) == {"name", "revision", "location", "files", "config"}
    assert facts["name"] == "linear-tiny.noise" and facts["location"] == str(package / "linear-tiny.noise")
    assert facts["files"]["model.onnx"].keys() == {"size", "sha256"}
    assert facts["config"]["embedkit"]["dim"] == 4


def test_zoo_info_of_the_default_entry(run):
    status, out, _ = run("zoo", "info", "supervised-efficientnet_lite0")
    assert status == 0 and out.startswith(
        "fact\tvalue\nentry\tsupervised-efficientnet_lite0.in1k\nkind\tencoder\n"
    )
    assert "license\tApache-2.0\ninput\t224x224 rgb\n" in out and "\n# " in out and "pipeline_tag" not in out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear-tinny", "there is no encoder 'linear-tinny' (did you mean 'linear-tiny'"),
        ("linear-far", "is an entry of the zoo that this package does not contain"),
        ("linear-tiny@123", "revision: expected at least 12 hex digits"),
        ("./no/such", "'./no/such' is not a folder"),
        ("http://example.org/zoo/x", "is not encrypted"),
        ("", "there is no encoder ''"),
    ],
)
def test_user_errors_are_one_sentence_and_status_one(run, package, name, expected):
    for command in ("info", "verify"):
        status, out, err = run("zoo", command, name)
        assert status == 1
        text = err if command == "info" else out
        assert expected in text and text.count("\n") == (1 if command == "info" else 2)


def test_a_place_that_is_missing(run, package, monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(tmp_path / "gone\nnewline"))
    for arguments in (("list",), ("list", "--json"), ("info", "linear-tiny"), ("verify",)):
        status, out, err = run("zoo", *arguments)
        assert (status, out) == (1, "")
        assert err.startswith("embedkit: the zoo ") and err.count("\n") == 1 and "gone\\nnewline" in err


# --- zoo verify -------------------------------------------------------------------------------------------


def test_zoo_verify_of_what_is_at_hand(run, package):
    status, out, err = run("zoo", "verify")
    assert (status, err, out.count("\n")) == (0, "", 2)
    assert out.startswith(
        "result\tentry\tfiles\tMB\tdetail\nok\tlinear-tiny.noise\t5\t0.0\tgolden vectors within "
    )
    assert out.endswith(f"of 1e-04 on {CPU}\n")
    [result] = json.loads(run("zoo", "verify", "linear-tiny", "--device", "cpu", "--json")[1])
    assert set(result) == {"name", "ok", "files", "bytes", "detail"}
    assert result["ok"] is True and result["files"] == 5


def test_zoo_verify_names_what_is_wrong_and_fails(run, package, by_hand, monkeypatch, tmp_path):
    """Every entry is checked, also after one that fails."""
    zoo = tmp_path / "zoo"
    for name in ("linear-bad.x", "linear-good.x"):
        by_hand.TinyEntry().write(zoo / name)
    by_hand.write_index(zoo)
    (zoo / "linear-bad.x" / "model.safetensors").write_bytes(b"other bytes")
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    status, out, err = run("zoo", "verify")
    _, bad, good, _ = out.splitlines()
    assert (status, err) == (1, "")
    assert bad.startswith("FAILED\tlinear-bad.x\t") and "model.safetensors: expected" in bad
    assert good.startswith("ok\tlinear-good.x\t")
    assert run("zoo", "verify", "linear-good")[0] == 0
    results = json.loads(run("zoo", "verify", "--json")[1])
    assert [result["ok"] for result in results] == [False, True, True]


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_zoo_verify_on_a_device_that_cannot_be(run, package, device):
    if device == "cuda" and CUDA in engine.onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    status, out, _ = run("zoo", "verify", "linear-tiny", "--device", device)
    assert status == 1 and out.splitlines()[1].startswith("FAILED\t") and "device" in out


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_of_a_healthy_machine(run, monkeypatch):
    monkeypatch.setattr(engine.onnxruntime(), "get_available_providers", lambda: [CPU])
    status, out, err = run("doctor")
    assert (status, err) == (0, "embedkit: no problems found\n")
    facts = dict(line.split("\t", 1) for line in out.splitlines())
    assert facts.pop("fact") == "value"
    assert facts["would run"] == f"{CPU} (supervised-efficientnet_lite0.in1k)"
    assert facts["onnxruntime wheels"].startswith("onnxruntime") and facts["providers"] == CPU
    assert int(facts["cores"]) >= 1 and "python" in facts and "cache" in facts and "zoos" in facts
    report = json.loads(run("doctor", "--json")[1])
    assert set(report) == {"facts", "problems"} and report["problems"] == []


def test_doctor_names_problems_with_their_remedy(run, package, monkeypatch):
    wheels = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(providers, "installed_runtimes", lambda: wheels)
    monkeypatch.setattr(doctor, "installed_runtimes", lambda: wheels)
    status, out, _ = run("doctor")
    assert status == 1
    assert "onnxruntime wheels\tonnxruntime 1.31.1, onnxruntime-gpu 1.31.1" in out
    assert "problem\tonnxruntime and onnxruntime-gpu are both installed" in out
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in out
    report = json.loads(run("doctor", "--json")[1])
    assert len(report["problems"]) == 1


def test_doctor_without_a_runtime(run, package, monkeypatch):
    def missing():
        raise MissingDependencyError("ONNX Runtime cannot be imported (no): pip install '.[cpu]'")

    for module in (engine, providers):
        monkeypatch.setattr(module, "onnxruntime", missing)
    monkeypatch.setattr(doctor, "installed_runtimes", dict)
    status, out, _ = run("doctor")
    assert status == 1
    assert "onnxruntime wheels\tnone" in out and "problem\tONNX Runtime cannot be imported" in out


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_doctor_of_a_gpu_wheel_without_a_gpu(run, package, monkeypatch):
    if CUDA in engine.onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(engine.onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    status, out, _ = run("doctor")
    assert status == 1
    assert f"would run\t{CPU}" in out and out.count("problem\t") == 1
    assert f"problem\t{CUDA} cannot run here" in out


def test_doctor_with_a_zoo_that_is_missing(run, package, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", "/no/such/zoo")
    status, out, _ = run("doctor")
    assert status == 1 and "problem\tthe zoo '/no/such/zoo' is not a folder" in out


# --- the process ------------------------------------------------------------------------------------------


def test_statuses_and_streams_of_the_real_command():
    done = process("zoo", "list", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert "supervised-efficientnet_lite0.in1k" in {row["name"] for row in json.loads(done.stdout)}
    done = process("zoo", "info", "supervised-efficientnet_light0")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("embedkit: there is no encoder") and done.stderr.count("\n") == 1
    assert "did you mean 'supervised-efficientnet_lite0'" in done.stderr
    done = process("zoo", "nope")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_quiet_leaves_errors_and_data(tmp_path):
    done = process("zoo", "list", "no*")
    assert "no encoder matches" in done.stderr
    done = process("zoo", "list", "no*", "-q")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    done = process("zoo", "info", "linear-none", "--quiet")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(
        "embedkit: there is no encoder"
    )


def test_the_installed_script_and_cli_py_are_the_same(default_entry):
    script = Path(sys.executable).with_name("embedkit")
    checkout = default_entry.parent.parent / "cli.py"
    commands = [[str(script)]] if script.exists() else []
    commands += [[sys.executable, str(checkout)]] if checkout.exists() else []
    if not commands:
        pytest.skip("neither a script nor a checkout is at hand")
    for command in commands:
        done = subprocess.run([*command, "zoo", "list", "no*"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("name\tentry\t")


def test_a_card_in_letters_that_the_terminal_lacks(by_hand, tmp_path):
    entry = by_hand.TinyEntry()
    folder = entry.write(tmp_path / "x", {**entry.files(), "README.md": "naïve 画像".encode()})
    done = process("zoo", "info", folder, PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\nna\\xefve \\u753b\\u50cf\n")


SLOW = """
import sys, time
from embedkit import cli as commands
@commands.app.command()
def slow():
    print("x" * 200_000, flush=True)
    time.sleep(30)
commands.main()
"""


def test_an_interrupt_says_that_the_work_is_kept():
    # A child of a job in the background would ignore the interrupt, as its parent does.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", heard + SLOW, "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stderr
        child.stdout.read(200_001)  # it has begun
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        text = child.stderr.read().decode()
        assert child.wait(20) == 130
    assert (
        text
        == "embedkit: interrupted; finished work is saved, and the same command continues it (a training run: "
        "embedkit train --resume RUN)\n"
    )


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_failure(buffered):
    """As in `embedkit zoo list | head -0`, also after `set -o pipefail`."""
    quick = SLOW.replace("sleep(30)", "sleep(0)")  # it runs to its end
    code = quick if buffered else "from embedkit.cli import main; main()"
    arguments = ["slow"] if buffered else ["zoo", "list"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as child:
        assert child.stdout and child.stderr
        child.stdout.close()
        text = child.stderr.read().decode()
        assert child.wait(20) == 0
    assert text == ""


def test_version(run):
    assert run("--version") == (0, f"embedkit {embedkit.__version__}\n", "")
