"""The wheel in an environment that has the runtime's own dependencies and nothing else: pretrained weights by name."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import servers

ROOT = Path(__file__).parents[1]
NAME = "simclr-r50.photos"

pytestmark = pytest.mark.skipif(
    not (ROOT / "zoo" / NAME).is_dir() or os.name == "nt", reason="made from the checkout, under POSIX"
)

#: Loads an encoder by its bare name, and says what it is, where it comes from, and which package loaded it.
LOAD = """
import sys, embedkit
encoder = embedkit.load_encoder("simclr-r50", threads=1)
rows = encoder.encode(sys.argv[1])
print(encoder.name, rows.shape, rows.tobytes().hex()[:64], sep="\\n")
print(encoder._entry.location)
print(embedkit.__file__)
assert not {"torch", "timm"} & set(sys.modules)
"""
NO_SOCKETS = """
import sys
def refuse(event, _):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"a forbidden {event}")
sys.addaudithook(refuse)
"""


def closure(*names: str) -> dict[str, list[Path]]:
    """The distributions that these need, themselves included -> their top-level files and folders here."""
    packaging = pytest.importorskip("packaging.requirements")
    found: dict[str, list[Path]] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        tops = {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}
        found[name] = [Path(str(dist.locate_file(top))) for top in sorted(tops)]
        for line in dist.requires or ():
            needed = packaging.Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                queue.append(needed.name)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources: setuptools leaves files beside them."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("embedkit", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("zoo/supervised-efficientnet_lite0.in1k", "zoo/__init__.py", "zoo/index.json"):
        (source / path).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile)(ROOT / path, source / path)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (source / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """A virtual environment of the wheel: what it needs is linked from here, so that nothing is downloaded."""
    home = tmp_path_factory.mktemp("bare")
    run = subprocess.run
    run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    own = distribution("embedkit")
    extras = [line for line in own.requires or () if "extra" not in line]
    for paths in closure(*(re.match(r"[\w.-]+", line)[0] for line in extras), "onnxruntime").values():
        for path in paths:
            if path.exists() and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]
    done = run(
        [*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "timm", "fsspec", "huggingface_hub"} & {path.name for path in packages.iterdir()}
    return home


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An empty cache, and no setting of whoever runs this."""
    ours = {
        key: value for key, value in os.environ.items() if not key.startswith(("EMBEDKIT", "PYTHON", "HF_"))
    }
    return {
        **ours,
        "EMBEDKIT_CACHE": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "TERM": "xterm",
        "COLUMNS": "100",
    }


@pytest.fixture
def load(bare, environment, tmp_path):
    """`load(folder, program=LOAD)`: a program of the bare environment in a folder; the process."""

    def run(folder: Path, program: str = LOAD) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(program)
        command = [bare / "bin" / "python", tmp_path / "program.py", ROOT / "samples" / "cat.jpg"]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_in_a_checkouts_root(bare, load, environment, tmp_path):
    done = load(ROOT)
    assert done.returncode == 0, done.stderr
    name, shape, row, location, package = done.stdout.splitlines()
    assert (name, shape, location) == (NAME, "(1, 2048)", str(ROOT / "zoo" / NAME))
    assert Path(package).is_relative_to(bare), "the wheel loads it, not the checkout's sources"
    command = [bare / "bin" / "embedkit", "embed", "samples/cat.jpg", "--encoder", "simclr-r50"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "cat.parquet"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "dim 2048" in done.stderr
    assert not (tmp_path / "cache" / "zoo").exists()


def test_elsewhere_the_message_names_the_three_ways(load, tmp_path):
    done = load(tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    for way in (
        "EMBEDKIT_ZOO=",
        "`embedkit zoo pull simclr-r50 --zoo URL`",
        "`embedkit zoo pull BUNDLE.tar`",
    ):
        assert way in message


@pytest.fixture
def released(bare, tmp_path, monkeypatch) -> Iterator[servers.Server]:
    """A site that `scripts/release_zoo` wrote, and the wheel with the line that it printed, as a release has it."""
    (tmp_path / "site").mkdir()
    server = servers.site(tmp_path / "site")
    (setting,) = bare.glob("lib/python*/site-packages/embedkit/hub/resolve.py")
    text = setting.read_text("utf-8")
    script = [sys.executable, ROOT / "scripts" / "release_zoo", tmp_path / "site", "--url", server.url]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = re.sub(r'^DEFAULT_ZOO = ""\n', done.stdout, text, flags=re.MULTILINE)
    assert changed != text
    setting.write_text(changed, "utf-8")
    server.requests.clear()
    yield server
    server.close()
    setting.write_text(text, "utf-8")


def test_from_a_site_as_the_default_zoo(bare, released, load, environment, tmp_path):
    """Downloaded with a bar on a terminal, verified, and there a second time without a connection."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    (tmp_path / "program.py").write_text(LOAD)
    screen, stderr = pty.openpty()
    command = [bare / "bin" / "python", tmp_path / "program.py", ROOT / "samples" / "cat.jpg"]
    process = subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    os.close(stderr)
    drawn = b""
    try:
        while part := os.read(screen, 65536):
            drawn += part
    except OSError:  # Linux ends a pty so
        pass
    os.close(screen)
    first, _ = process.communicate(timeout=60)
    assert process.returncode == 0, drawn
    shown = drawn.decode()
    assert NAME in shown and "━" in shown and "MB" in shown
    assert any(path.endswith(f"/{NAME}/model.safetensors") for path in released.paths())
    name, shape, row, location, _ = first.splitlines()
    assert (name, shape) == (NAME, "(1, 2048)") and location.startswith(str(tmp_path / "cache"))
    for file in (ROOT / "zoo" / NAME).iterdir():
        assert (Path(location) / file.name).read_bytes() == file.read_bytes()

    released.close()
    again = load(here, NO_SOCKETS + LOAD)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first and again.stderr == "", "a pipe gets no bar"
    files = list((tmp_path / "cache").rglob("model.safetensors"))
    files[0].write_bytes(b"x" + files[0].read_bytes()[1:])
    damaged = load(here, NO_SOCKETS + LOAD)
    assert damaged.returncode == 1 and "IntegrityError" in damaged.stderr
