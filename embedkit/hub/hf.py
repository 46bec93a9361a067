"""The Hugging Face Hub as a zoo: one repository per entry, and `embedkit-index` for the list.

huggingface_hub finds the token and, when publishing, makes the commits. Files are read with embedkit's own
HTTP client: the one of huggingface_hub does not bound an answer, checks only the size of a file, cannot resume in
another process, and names the files of its cache by what the server answers. Only its functions and its own errors are
used, since its HTTP library changed between 1.x and 2.x.

`HF_ENDPOINT` and `HF_TOKEN` of the environment are respected, with one limit: a token that was not passed as `token`
is sent to huggingface.co only.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from embedkit._io.optional import requires
from embedkit._io.text import quoted
from embedkit.errors import (
    AccessError,
    EmbedkitError,
    EntryNotFoundError,
    MissingDependencyError,
    UnreachableError,
    ZooError,
)
from embedkit.hub.base import EntryFiles, Located
from embedkit.hub.catalog import NAME, REVISION_DIGITS, Index
from embedkit.hub.download import persistent
from embedkit.hub.folder import FolderEntry
from embedkit.hub.limits import INDEX_LIMIT, MANIFEST_LIMIT
from embedkit.model.layout import INDEX, MANIFEST, REVISION, sha256_hex
from embedkit.storage.http import WebStorage
from embedkit.storage.origins import check_web

HUB = "https://huggingface.co"
INDEX_REPOSITORY = "embedkit-index"

#: Greatest size in bytes of the hub's description of a repository, mostly its list of files.
_INFO_LIMIT = 16 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_ANSWER = re.compile("Connect|Timeout|Transport|Network|Protocol|ReadError|WriteError")

Value = TypeVar("Value")


class HubZoo:
    """The entries of one organization."""

    tagged = True

    def __init__(self, organization: str, token: str | None = None, endpoint: str | None = None):
        """Take an organization; nothing is opened yet.

        Args:
            organization: The organization or user.
            token: Sent to this endpoint only.
            endpoint: `HF_ENDPOINT`, or huggingface.co, when None.

        Raises:
            ConfigError: The endpoint is neither `https://` nor on this machine.
        """
        self.organization = organization
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        check_web(self.endpoint)
        self._given = token
        self._token: str | None = None

    @property
    def uri(self) -> str:
        """`hf://organization`."""
        return f"hf://{self.organization}"

    @property
    def token(self) -> str | None:
        """The token that was passed; for huggingface.co, else the environment's."""
        if self._given is None and self._token is None and self.endpoint == HUB:
            self._token = hub_module().get_token()
        return self._given or self._token

    def api(self) -> Any:
        """huggingface_hub's client for this endpoint; it does not look up a token itself."""
        return hub_module().HfApi(endpoint=self.endpoint, token=self.token or False)

    def repository(self, name: str) -> str:
        """The repository of an entry."""
        return f"{self.organization}/{name}"

    def storage(self, name: str, revision: str = "main") -> WebStorage:
        """The files of a repository at a revision."""
        root = f"{self.endpoint}/{self.repository(name)}/resolve/{revision}"
        return _HubStorage(root, self.token, f"{self.uri}/{name}")

    def index_bytes(self) -> bytes:
        """See `RemoteZoo`."""
        try:
            return persistent(lambda: self.storage(INDEX_REPOSITORY).read(INDEX, INDEX_LIMIT))
        except AccessError:
            if self.token is not None:
                raise
            # A hub gives the same answer for a missing repository and for a private one.
            raise FileNotFoundError(2, "No such repository", f"{self.uri}/{INDEX_REPOSITORY}") from None

    def index(self) -> Index:
        """The parsed index, empty where the organization has none."""
        try:
            return Index.from_json(self.index_bytes(), f"{self.uri}/{INDEX_REPOSITORY}/{INDEX}")
        except FileNotFoundError:
            return Index()

    def locate(self, name: str, revision: str | None) -> Located | None:
        """See `RemoteZoo`; a revision may also be a tag or a commit."""
        if not NAME.fullmatch(name) or "--" in name or ".." in name:
            return None
        index = self.index()
        name = index.folder_of(name) or name
        row = index.rows.get(name)
        digest = revision is not None and bool(REVISION.fullmatch(revision))
        current = row is not None and (revision is None or row.manifest_sha256.startswith(revision))
        tries: list[str] = []
        if revision is not None and not current:
            # Each published version is tagged with the first digits of its digest.
            tries += [revision[:REVISION_DIGITS]] if digest else [revision]
            tries += [revision] if _COMMIT.fullmatch(revision) else []
        tries += ["main"] if revision is None or digest else []
        for tried in tries:
            commit = self.commit(name, tried)
            if commit is None:
                continue
            storage = self.storage(name, commit)
            try:
                manifest = persistent(lambda storage=storage: storage.read(MANIFEST, MANIFEST_LIMIT))  # type: ignore[misc]
            except FileNotFoundError:
                continue
            return Located(
                name=name,
                zoo=self.uri,
                storage=storage,
                revision=commit,
                manifest_sha256=sha256_hex(manifest),
            )
        if revision is not None and self.commit(name, "main") is not None:
            raise EntryNotFoundError(f"{self.uri}/{name} has no revision {revision}")
        return None

    def elsewhere(self, name: str, revision: str | None) -> EntryFiles | None:
        """A snapshot in huggingface_hub's own cache (`HF_HOME`), made by `hf download`; verified like any other."""
        try:
            find = hub_module().try_to_load_from_cache
        except MissingDependencyError:
            return None
        found = find(self.repository(name), MANIFEST, revision=revision or "main")
        return FolderEntry(Path(found).parent, name) if isinstance(found, str) else None

    def commit(self, name: str, revision: str) -> str | None:
        """The commit of a branch, tag or commit; None where the repository or the revision does not exist."""
        where = f"{self.uri}/{name}"
        path = f"api/models/{self.repository(name)}/revision/{quote(revision, safe='')}"
        web = WebStorage(self.endpoint, self.token)
        status, fault, info = persistent(lambda: web.get_json(path, _INFO_LIMIT))
        if fault == "GatedRepo":
            raise ZooError(f"{where} is gated: accept its conditions on the Hub and give a token")
        if status == 403 or (status == 401 and fault not in ("", "RepoNotFound")):
            raise AccessError(f"{where}: access is refused ({status}); give a token with that right")
        if status != 200:  # the same answer for a missing repository and for a private one
            return None
        sha = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
            raise ZooError(f"{where}: the hub gives no usable commit for {revision}")
        return sha


class _HubStorage(WebStorage):
    """Files of a repository, named by their `hf://` address in messages."""

    def __init__(self, root: str, token: str | None, shown: str):
        super().__init__(root, token)
        self._shown = shown

    @property
    def uri(self) -> str:
        return self._shown


def hub_module(name: str = "") -> Any:
    """huggingface_hub, or a module of it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    with requires("hf://", "hub"):
        return importlib.import_module("huggingface_hub" + (f".{name}" if name else ""))


def ask(where: str, function: Callable[[], Value], secret: str | None = None) -> Value:
    """The result of a call of huggingface_hub, retried where there was no answer.

    Raises:
        ZooError: The Hub refuses, or (UnreachableError) does not answer.
    """

    def once() -> Value:
        try:
            return function()
        except EmbedkitError:
            raise
        except Exception as error:  # httpx in 1.x, httpx2 in 2.x, both also as the cause of something else
            raise _fault(where, error, secret) from None

    return persistent(once)


def _fault(where: str, error: BaseException, secret: str | None) -> ZooError:
    """The error for an exception of the client, by the status of the answer or the lack of one."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    status = next((one for one in statuses if one is not None), None)
    if status in (401, 403):
        return AccessError(f"{where}: access is refused ({status}); give a token with that right")
    if status is not None and (status in (408, 429) or status >= 500):
        return UnreachableError(f"{where}: the hub is overloaded or broken ({status})")
    kind = type(chain[-1]).__name__
    said = getattr(chain[0], "server_message", None) or chain[-1]
    reason = quoted(re.sub(r"(?<=\?)\S+", "...", str(said)), secret)  # the signature of a link
    if status is None and any(
        isinstance(one, OSError) or _NO_ANSWER.search(type(one).__name__) for one in chain
    ):
        return UnreachableError(f"{where}: no answer ({kind}: {reason})")
    return ZooError(f"{where}: {kind}: {reason}")
