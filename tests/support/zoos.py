"""Fixtures over the servers: zoos to read from, a cache of its own for each test, and fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers

NAME = "linear-tiny.noise"

#: Put before a program: opening a socket ends it.
NO_SOCKETS = """
import sys
def _refuse(event, _):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"a forbidden {event}")
sys.addaudithook(_refuse)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache and a working folder of its own, quick time-outs, nothing of the environment's hub."""
    for variable in (
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "EMBEDKIT_ZOO",
        "EMBEDKIT_LOCK",
        "EMBEDKIT_TOKEN",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("EMBEDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMBEDKIT_TIMEOUT", "5")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr("embedkit.hub.download.PAUSE", 0.01)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def always_cache(cache) -> None:
    """In a folder whose conftest imports this, every test has `cache`."""


@pytest.fixture
def zoo(by_hand, tmp_path) -> Path:
    """A zoo folder of one entry, with its index."""
    by_hand.TinyEntry().write(tmp_path / "zoo" / NAME)
    return by_hand.write_index(tmp_path / "zoo")


@pytest.fixture
def site(zoo) -> Iterator:
    """A web site over `zoo`."""
    server = servers.site(zoo)
    yield server
    server.close()


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator:
    """A local hub, which `HF_ENDPOINT` names."""
    pytest.importorskip("huggingface_hub")
    server = servers.Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def python():
    """`python(program, *arguments, sockets=True, wait=True)`: a fresh interpreter; its output, or the process."""

    def run(program: str, *arguments: object, sockets: bool = True, wait: bool = True):
        text = program if sockets else NO_SOCKETS + program
        command = [sys.executable, "-W", "default", "-c", text, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator[str]:
    """`s3://<a fresh bucket>/zoo`."""
    import fsspec

    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"bucket-{os.urandom(6).hex()}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/zoo"
    fsspec.filesystem("s3").clear_instance_cache()
