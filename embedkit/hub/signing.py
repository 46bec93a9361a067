"""Signatures of entries by a key, made and checked by OpenSSF's model-signing: who published this?

The manifest says that bytes are whole, a signature who made them. `model.sig` is a file of the entry like any other,
so it is published, mirrored and bundled with it. It names every file but itself and the manifest, and the manifest
can say nothing that the signature does not: a file that it changes, adds or leaves out breaks the signature. Whoever
has no embedkit checks with `model_signing verify key ENTRY --signature ENTRY/model.sig --public_key PUB`.
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
from embedkit._io.messages import quoted
from embedkit._io.optional import requires
from embedkit.errors import ConfigError, SignatureError
from embedkit.hub.access import Access
from embedkit.hub.folder import FolderEntry, package_zoo
from embedkit.hub.publish.index import update_index
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import ENTRY_NAME, INDEX, MANIFEST
from embedkit.model.manifest import Manifest

SIGNATURE = "model.sig"
#: Bytes; one of ours has about 3,000.
SIGNATURE_LIMIT = 1_000_000


def sign(
    entry: VerifiedEntry, private_key: str | os.PathLike[str], password: str | None = None
) -> VerifiedEntry:
    """Sign an entry where it lies, unless it holds a good signature of this key already.

    Args:
        entry: An entry in a folder of the user's own; every byte is verified on its way.
        private_key: An elliptic-curve key (P-256, P-384 or P-521), PEM.
        password: Of the key, when it has one.

    Returns:
        The signed entry: of another revision, since it has a file more.

    Raises:
        ConfigError: The key is not one, or the entry lies in the package or in the cache.
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
        shutil.copytree(folder, partial, dirs_exist_ok=True, symlinks=True)  # with what is not the entry's
        for name, content in ((SIGNATURE, files[SIGNATURE]), (MANIFEST, Manifest.encode(files))):
            (partial / name).unlink(missing_ok=True)  # a link, perhaps
            (partial / name).write_bytes(content)
    if (folder.parent / INDEX).is_file():
        update_index(folder.parent)
    return VerifiedEntry(entry.name, FolderEntry(folder, entry.name))


def check_signature(entry: VerifiedEntry, public_key: str | os.PathLike[str]) -> None:
    """Check that the holder of a key signed exactly this entry, all files of it, under this name.

    An older version that the key signed passes, too: to hold on to one version, pin it (`embedkit.lock`).

    Args:
        entry: The entry; what is checked are its verified bytes.
        public_key: PEM.

    Raises:
        SignatureError: It has no signature, or the signature is another key's or another entry's.
        ConfigError: The key is not one.
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
            with contextlib.redirect_stdout(sys.stderr):  # where it warns
                config.verify(scratch, scratch / SIGNATURE)
            name, signed = _signed(files[SIGNATURE])
        except Exception as error:  # of its JSON, of its cryptography, of a file that is missing
            reason = quoted(error) or type(error).__name__
            raise SignatureError(
                f"{entry.location}: {SIGNATURE} is no signature of these files by this key ({reason}); do not use it"
            ) from None
    if signed != sorted(files.keys() - {SIGNATURE}):
        raise SignatureError(
            f"{entry.location}: {SIGNATURE} is good and leaves files of the entry out; ask its publisher to sign all"
        )
    if name != entry.name:
        raise SignatureError(
            f"{entry.location}: these files were signed as {name[:80]!r}, and are offered as {entry.name!r}; do not "
            "use it"
        )


def _signed(signature: bytes) -> tuple[str, list[str]]:
    """Under which name which files were signed; only for a signature that was checked.

    A signature names what it leaves out, and model-signing leaves that out of its check.
    """
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    return str(statement["subject"][0]["name"]), sorted(
        str(one["name"]) for one in statement["predicate"]["resources"]
    )


def _check_name(entry: VerifiedEntry) -> None:
    if not ENTRY_NAME.fullmatch(entry.name):
        raise SignatureError(
            f"{entry.location}: {entry.name[:80]!r} is no name of an entry (<method>-<arch>.<data>) to sign"
        )


@contextlib.contextmanager
def _laid_out(name: str, files: dict[str, bytes]) -> Iterator[Path]:
    """The verified bytes as plain files in a folder of the entry's name: caches are made of links."""
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
                f"{folder} is a copy that embedkit keeps: publish {entry.name} to a folder of your own first, and "
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
