"""Sign entries with a key and check signatures, by OpenSSF's model-signing.

The manifest proves that bytes are complete; a signature proves who published them. `model.sig` is a file of the entry
like any other, so it is published, mirrored and bundled with it. It covers every file except itself and the manifest. A
manifest that changes, adds or omits a file breaks the signature. Without embedkit, check an entry with
`model_signing verify key ENTRY --signature ENTRY/model.sig --public_key PUB`.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from embedkit._io.atomic import replacing_folder
from embedkit._io.optional import requires
from embedkit._io.text import quoted
from embedkit.errors import ConfigError, SignatureError
from embedkit.hub.access import Access
from embedkit.hub.folder import FolderEntry, package_zoo
from embedkit.hub.publish.index import update_index
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME, INDEX, MANIFEST
from embedkit.model.manifest import Manifest

SIGNATURE = "model.sig"
#: Greatest size in bytes; a usual one has about 3,000.
SIGNATURE_LIMIT = 1_000_000


def sign(
    entry: VerifiedEntry, private_key: str | os.PathLike[str], password: str | None = None
) -> VerifiedEntry:
    """Sign an entry in its folder, unless it already has a valid signature of this key.

    Args:
        entry: An entry in a folder of the user's own; every byte is verified.
        private_key: An elliptic-curve key (P-256, P-384 or P-521), PEM.
        password: The password of the key, if it has one.

    Returns:
        The signed entry, of another revision, since it has one file more.

    Raises:
        ConfigError: The key is invalid, or the entry is in the package or the cache.
        MissingDependencyError: model-signing is not installed.
        OutputError: The folder cannot be written.
    """
    folder = _own_folder(entry)
    _check_name(entry)
    signing = _module("signing")
    with _usable_key(private_key):
        config = signing.Config().use_elliptic_key_signer(
            private_key=Path(private_key), password=password.encode() if password else None
        )
    if SIGNATURE in entry.manifest.files:
        with contextlib.suppress(SignatureError), _public_half(private_key, password) as public_key:
            check_signature(entry, public_key)
            return entry
    files = {name: entry.read(name) for name in entry.manifest.files if name != SIGNATURE}
    with _laid_out(entry.name, files) as scratch:
        ignored = _module("hashing").Config().set_ignored_paths(paths=[SIGNATURE, MANIFEST])
        config.set_hashing_config(ignored).sign(scratch, scratch / SIGNATURE)
        files[SIGNATURE] = (scratch / SIGNATURE).read_bytes()
    with replacing_folder(folder) as partial:
        shutil.copytree(
            folder, partial, dirs_exist_ok=True, symlinks=True
        )  # also files that are not part of the entry
        for name, content in ((SIGNATURE, files[SIGNATURE]), (MANIFEST, Manifest.encode(files))):
            (partial / name).unlink(missing_ok=True)  # it may be a link
            (partial / name).write_bytes(content)
    if os.path.isfile(folder.parent / INDEX):
        update_index(folder.parent)
    return VerifiedEntry(entry.name, FolderEntry(folder, entry.name))


def check_signature(entry: VerifiedEntry, public_key: str | os.PathLike[str]) -> None:
    """Check that a key signed exactly this entry: all of its files, under this name.

    An older version that the key signed is accepted too; to require one version, pin it (`embedkit.lock`).

    Args:
        entry: The entry; its verified bytes are checked.
        public_key: PEM.

    Raises:
        SignatureError: It has no signature, or one of another key or another entry.
        ConfigError: The key is invalid.
        MissingDependencyError: model-signing is not installed.
    """
    with _usable_key(public_key):
        config = _module("verifying").Config().use_elliptic_key_verifier(public_key=Path(public_key))
    record = entry.manifest.files.get(SIGNATURE)
    if record is None or record.size > SIGNATURE_LIMIT:
        raise SignatureError(
            f"{entry.location} is not signed: ask its publisher for `embedkit publish --sign`, or pull it without "
            "--verify-key"
        )
    _check_name(entry)
    files = {name: entry.read(name) for name in entry.manifest.files}
    with _laid_out(entry.name, files) as scratch:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # model-signing prints warnings there
                config.verify(scratch, scratch / SIGNATURE)
            name, signed = _signed(files[SIGNATURE])
        except Exception as error:  # of JSON, of cryptography, or for a missing file
            reason = quoted(error) or type(error).__name__
            raise SignatureError(
                f"{entry.location}: {SIGNATURE} is not a signature of these files by this key ({reason}); do not use it"
            ) from None
    if signed != sorted(files.keys() - {SIGNATURE}):
        raise SignatureError(
            f"{entry.location}: {SIGNATURE} is valid but omits files of the entry; ask its publisher to sign all"
        )
    if name != entry.name:
        raise SignatureError(
            f"{entry.location}: these files were signed as {name[:80]!r}, and are published as {entry.name!r}; do not "
            "use it"
        )


def _signed(signature: bytes) -> tuple[str, list[str]]:
    """The name and the files that were signed; call it only for a signature that was checked.

    A signature lists the files that it ignores, and model-signing does not check those.
    """
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    return str(statement["subject"][0]["name"]), sorted(
        str(one["name"]) for one in statement["predicate"]["resources"]
    )


def _check_name(entry: VerifiedEntry) -> None:
    if not ENTRY_NAME.fullmatch(entry.name):
        raise SignatureError(
            f"{entry.location}: {entry.name[:80]!r} cannot be signed: expected the name <method>-<arch>.<data>"
        )


@contextlib.contextmanager
def _laid_out(name: str, files: dict[str, bytes]) -> Iterator[Path]:
    """The verified bytes as plain files in a folder of the entry's name, since caches consist of links."""
    with tempfile.TemporaryDirectory(prefix="embedkit-signing-") as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        for path, content in files.items():
            (folder / path).write_bytes(content)
        yield folder


def _own_folder(entry: VerifiedEntry) -> Path:
    folder = Path(entry.location).resolve()
    for root in (Access().cache.root, package_zoo().path):
        if root.resolve() in folder.parents:
            raise ConfigError(
                f"{folder} is a copy that embedkit manages: publish {entry.name} to a folder of your own first, and "
                "sign that one"
            )
    return folder


@contextlib.contextmanager
def _usable_key(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = quoted(getattr(error, "strerror", None) or error, longest=120)
        if isinstance(error, AttributeError):
            reason = "a key of another kind"
        raise ConfigError(
            f"{os.fspath(path)}: expected a PEM key of the curve P-256, P-384 or P-521 ({reason}); make a pair with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out KEY` and `openssl ec -in KEY -pubout -out PUB`"
        ) from None


@contextlib.contextmanager
def _public_half(private_key: str | os.PathLike[str], password: str | None) -> Iterator[Path]:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(
        Path(private_key).read_bytes(), password.encode() if password else None
    )
    text = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with tempfile.TemporaryDirectory(prefix="embedkit-signing-") as scratch:
        path = Path(scratch, "public.pem")
        path.write_bytes(text)
        yield path


def _module(name: str) -> ModuleType:
    with requires("a signature", "sign", package="model-signing"):
        return importlib.import_module(f"model_signing.{name}")
