"""Signatures: whoever changes, adds, drops, renames or swaps anything is found out, and OpenSSF's tool agrees."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("model_signing", reason="pip install '.[sign]'")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from embedkit.cli import app
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, SignatureError
from embedkit.hub.bulk import bundle, pull
from embedkit.hub.cache import Cache, open_only
from embedkit.hub.mirror import mirror
from embedkit.hub.publish.index import update_index
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
from embedkit.hub.signing import SIGNATURE, check_signature, sign
from embedkit.model.layout import MANIFEST
from embedkit.model.manifest import Manifest

NAME = "linear-tiny.noise"


def pair(folder: Path, name: str = "key", key=None, password: bytes | None = None) -> tuple[Path, Path]:
    """A private key and its public half, PEM."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    secrecy = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secrecy)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def keys(tmp_path):
    return pair(tmp_path)


@pytest.fixture
def signed(zoo, keys):
    return sign(find_entry(zoo / NAME), keys[0])


def rewrite(folder: Path, change: dict[str, bytes | None]) -> None:
    """What somebody does who can write the zoo: files changed, and a manifest that fits them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    files = {name: data for name, data in (files | change).items() if data is not None}
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(Manifest.encode(files))
    update_index(folder.parent)


def test_a_signed_entry_is_the_same_encoder(zoo, keys, by_hand):
    before = load_encoder(str(zoo / NAME))
    old = find_entry(zoo / NAME)
    entry = sign(old, keys[0])
    check_signature(entry, keys[1])
    assert set(entry.manifest.files) == {*old.manifest.files, SIGNATURE}
    after = load_encoder(str(zoo / NAME))
    assert after.fingerprint == before.fingerprint, "a signature does not change the space"
    assert json.loads((zoo / "index.json").read_text())["entries"][NAME]["manifest_sha256"] == entry.revision


def test_signing_twice_with_one_key_keeps_the_signature(signed, keys, tmp_path):
    assert sign(signed, keys[0]).revision == signed.revision
    other = pair(tmp_path, "other")
    resigned = sign(signed, other[0])
    check_signature(resigned, other[1])
    with pytest.raises(SignatureError):
        check_signature(resigned, keys[1])


def test_openssf_tool_agrees(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed.location]
    command += ["--signature", f"{signed.location}/{SIGNATURE}", "--public_key", str(keys[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"README.md": b"---\nlicense: mit\n---\nother words"},
        {"notes.txt": b"a file more"},
        {"golden.npz": None},
        {SIGNATURE: None},
        {SIGNATURE: b"{}"},
        {SIGNATURE: b"\xff\xfe"},
        {SIGNATURE: b"[" * 100_000},
    ],
    ids=["changed", "added", "dropped", "unsigned", "empty", "bytes", "deep"],
)
def test_what_was_tampered_with_is_refused_and_not_kept(signed, keys, change, tmp_path):
    rewrite(Path(signed.location), change)
    archive = tmp_path / "zoo.tar"
    bundle([], archive, zoo=str(Path(signed.location).parent), gate=open_only)
    with pytest.raises(SignatureError):
        pull([str(archive)], gate=open_only, verify_key=keys[1], lock=True)
    assert Cache(tmp_path / "cache").revisions() == [], "what was refused is in the cache"
    assert not Path("embedkit.lock").exists() or NAME not in Path("embedkit.lock").read_text()


def test_every_byte_of_the_signed_statement_counts(signed, keys):
    folder = Path(signed.location)
    bundle_json = json.loads((folder / SIGNATURE).read_bytes())
    envelope = bundle_json["dsseEnvelope"]
    payload = bytearray(base64.b64decode(envelope["payload"]))
    good = find_entry(folder)
    check_signature(good, keys[1])
    for position in range(0, len(payload), max(1, len(payload) // 16)):
        changed = payload.copy()
        changed[position] ^= 1
        envelope["payload"] = base64.b64encode(bytes(changed)).decode()
        rewrite(folder, {SIGNATURE: json.dumps(bundle_json).encode()})
        with pytest.raises(SignatureError):
            check_signature(find_entry(folder), keys[1])


def test_one_signed_entry_cannot_stand_for_another(signed, keys, zoo):
    """Both were signed by the key, so only the name tells them apart."""
    folder = Path(signed.location)
    folder.rename(zoo / "linear-tiny.hum")
    update_index(zoo)
    with pytest.raises(SignatureError, match="signed as 'linear-tiny.noise'"):
        pull(["linear-tiny.hum"], zoo=str(zoo), gate=open_only, verify_key=keys[1])


def test_an_alias_cannot_turn_one_signed_entry_into_another(signed, keys, zoo, by_hand):
    index = json.loads((zoo / "index.json").read_text())
    index["aliases"] = {"face-secure.prod": NAME}
    (zoo / "index.json").write_text(json.dumps(index))
    with pytest.raises(EntryError, match="which is another entry"):
        pull(["face-secure.prod"], zoo=str(zoo), gate=open_only, verify_key=keys[1], lock=True)


def test_bytes_that_are_cached_under_their_own_name_do_not_pass_under_another(signed, keys, zoo, tmp_path):
    pull([NAME], zoo=archive(zoo, tmp_path / "good.tar"), gate=open_only, verify_key=keys[1])
    Path(signed.location).rename(zoo / "linear-tiny.hum")
    update_index(zoo)
    with pytest.raises(SignatureError, match="signed as"):
        pull(
            ["linear-tiny.hum"],
            zoo=archive(zoo, tmp_path / "bad.tar"),
            gate=open_only,
            verify_key=keys[1],
        )


def archive(zoo: Path, out: Path) -> str:
    bundle([], out, zoo=str(zoo), gate=open_only)
    return str(out)


def test_a_signature_that_leaves_a_file_out_is_refused(zoo, keys):
    """A publisher once kept the card editable; whoever edits it now would pass model-signing's own check."""
    from model_signing import hashing, signing

    folder = zoo / NAME
    paths = [SIGNATURE, MANIFEST, "README.md"]
    ignored = hashing.Config().set_ignored_paths(paths=paths)
    signer = signing.Config().use_elliptic_key_signer(private_key=keys[0])
    signer.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)
    rewrite(folder, {"README.md": b"---\nlicense: mit\n---\nother words"})
    with pytest.raises(SignatureError, match="omits files of the entry"):
        check_signature(find_entry(folder), keys[1])
    check_signature(sign(find_entry(folder), keys[0]), keys[1])  # and signing again fixes it


def test_what_else_lies_in_the_folder_stays(zoo, keys, tmp_path):
    (zoo / NAME / "notes.txt").write_text("mine")
    (zoo / NAME / "sub").mkdir()
    manifest = (zoo / NAME / MANIFEST).rename(tmp_path / "elsewhere.json")
    (zoo / NAME / MANIFEST).symlink_to(manifest)
    before = manifest.read_bytes()
    sign(find_entry(zoo / NAME), keys[0])
    assert manifest.read_bytes() == before, "written through a link"
    assert (zoo / NAME / "notes.txt").read_text() == "mine" and (zoo / NAME / "sub").is_dir()


def test_a_wrong_key_takes_nothing_out_of_the_cache(signed, keys, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_CACHE", "relative")
    uri = archive(zoo, tmp_path / "zoo.tar")
    with pytest.raises(SignatureError):
        pull([NAME], zoo=uri, gate=open_only, verify_key=pair(tmp_path, "other")[1])
    assert Cache("relative").revisions() == []
    pull([NAME], zoo=uri, gate=open_only, verify_key=keys[1])
    with pytest.raises(SignatureError):
        pull([NAME], zoo=uri, gate=open_only, verify_key=pair(tmp_path, "other")[1])
    assert Cache("relative").revisions() == [signed.revision]


def test_a_name_is_not_signed_behind_the_users_back(zoo, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDKIT_ZOO", str(zoo))
    before = (zoo / NAME / MANIFEST).read_bytes()
    arguments = ["publish", NAME, "--to", str(tmp_path / "out"), "--sign", str(keys[0])]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError) and str(zoo / NAME) in str(refused.exception)
    assert (zoo / NAME / MANIFEST).read_bytes() == before


def test_it_travels_with_the_entry(signed, keys, tmp_path, hub):
    publish(signed, str(tmp_path / "b"))
    publish(signed, "hf://team", token="hf_writer")
    assert publish(signed, "hf://team", token="hf_writer").files == ()
    list(mirror(str(tmp_path / "b"), str(tmp_path / "c")))
    for uri in ("hf://team", str(tmp_path / "b"), str(tmp_path / "c")):
        (pulled,) = pull([NAME], zoo=uri, gate=open_only, verify_key=keys[1])
        assert pulled.revision == signed.revision
    with pytest.raises(SignatureError):
        pull([NAME], zoo="hf://team", gate=open_only, verify_key=pair(tmp_path, "other")[1])


def test_what_is_not_signed_is_refused_by_the_command_alone_with_a_key(zoo, keys, tmp_path):
    plain = CliRunner().invoke(app, ["zoo", "pull", NAME, "--zoo", str(zoo)])
    assert plain.exit_code == 0, plain.output
    refused = CliRunner().invoke(app, ["zoo", "pull", NAME, "--zoo", str(zoo), "--verify-key", str(keys[1])])
    assert isinstance(refused.exception, SignatureError)
    assert "not signed" in str(refused.exception)
    published = CliRunner().invoke(
        app, ["publish", str(zoo / NAME), "--to", str(tmp_path / "out"), "--sign", str(keys[0])]
    )
    assert published.exit_code == 0, published.output
    arguments = ["zoo", "pull", NAME, "--zoo", str(tmp_path / "out"), "--verify-key", str(keys[1])]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_keys(zoo, tmp_path, monkeypatch):
    entry = find_entry(zoo / NAME)
    locked, public = pair(tmp_path, "locked", password=b"secret")
    with pytest.raises(ConfigError, match=r"locked\.pem: expected a PEM key"):
        sign(entry, locked)
    with pytest.raises(ConfigError, match="expected a PEM key"):
        sign(entry, locked, "wrong")
    for path in (
        tmp_path / "missing.pem",
        public,
        pair(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())[0],
    ):
        with pytest.raises(ConfigError, match="expected a PEM key"):
            sign(entry, path)
    for curve in (ec.SECP384R1(), ec.SECP521R1()):
        private, half = pair(tmp_path, curve.name, ec.generate_private_key(curve))
        check_signature(sign(find_entry(zoo / NAME), private), half)
    with pytest.raises(ConfigError, match="expected a PEM key"):
        sign(entry, pair(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1()))[0])
    check_signature(sign(find_entry(zoo / NAME), locked, "secret"), public)


def test_a_copy_that_embedkit_keeps_is_not_signed(zoo, keys, tmp_path):
    bundle([NAME], tmp_path / "zoo.tar", zoo=str(zoo), gate=open_only)
    copy = find_entry(NAME, zoo=str(tmp_path / "zoo.tar"))
    with pytest.raises(ConfigError, match="a folder of your own"):
        sign(copy, keys[0])
    assert issubclass(SignatureError, EntryError)
