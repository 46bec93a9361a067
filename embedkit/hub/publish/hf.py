"""Publishing to the Hugging Face Hub: one commit per version, a tag of its digest, and a commit to the index.

A commit is atomic, so a publisher may be killed at any moment. For huggingface.co its client chooses the transfer
(Xet). Other endpoints get buffers, since the client would try Xet on hubs that do not have it and fail, and the only
other way to turn it off is a switch for the whole process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embedkit._io.text import quoted
from embedkit.errors import AccessError, ConfigError, EntryError, ZooError
from embedkit.hub.catalog import REVISION_DIGITS
from embedkit.hub.download import persistent
from embedkit.hub.hf import HUB, INDEX_REPOSITORY, HubZoo, ask, hub_module
from embedkit.hub.limits import CONFIG_LIMIT, INDEX_LIMIT, MANIFEST_LIMIT
from embedkit.hub.publish.index import build_facts, merged_index
from embedkit.hub.publish.published import Published
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import CARD, CONFIG, INDEX, MANIFEST
from embedkit.model.manifest import Manifest
from embedkit.storage.http import WebStorage

#: Attempts: another publisher may commit to the index between our reading and writing it.
_INDEX_TRIES = 10
#: Seconds before another attempt.
_PAUSE = 0.1


def publish_to_hub(
    entry: VerifiedEntry, organization: str, *, private: bool, tag: str | None, token: str | None
) -> Published:
    """Publish an entry as `organization/<name>`; see `publish`."""
    zoo = HubZoo(organization, token)
    if zoo.token is None:
        raise ConfigError(
            f"publishing to {zoo.uri} needs a token with write access: give it with --token, or log in"
        )
    _check_card(zoo, entry.card)
    row = build_facts(entry)
    _merged(
        zoo, _index(zoo), lambda entries: {**entries, entry.name: row}
    )  # refuse before anything is written
    _make(zoo, entry.name, private)
    old = _old_manifest(zoo, entry.name)
    if not old:
        _check_repository(zoo, entry.name)
    files = entry.manifest.files
    changed = [name for name, record in files.items() if old.get(name) != record]
    gone = [name for name in old if name not in files]
    current = zoo.commit(entry.name, "main")
    if _small(zoo, entry.name, MANIFEST, MANIFEST_LIMIT) != entry.manifest_bytes:
        content: dict[str, bytes | None] = {name: entry.read(name) for name in changed}
        content |= {MANIFEST: entry.manifest_bytes, **dict.fromkeys(gone)}
        current = _commit(zoo, entry.name, content, f"{entry.name}@{entry.revision[:12]}", current)
        changed.append(MANIFEST)
    _tag(zoo, entry.name, entry.revision[:REVISION_DIGITS], str(current))
    if tag is not None and _tag(zoo, entry.name, tag, str(current)) != current:
        raise ConfigError(f"{zoo.uri}/{entry.name}: the tag {tag!r} is on another version; choose a new one")
    _make(zoo, INDEX_REPOSITORY, private)
    if _change_index(zoo, lambda entries: {**entries, entry.name: row}, f"publish {entry.name}"):
        changed.append(INDEX)
    return Published(
        name=entry.name,
        zoo=zoo.uri,
        manifest_sha256=entry.revision,
        files=tuple(changed),
        version=str(current),
    )


def unlist_on_hub(name: str, organization: str, *, token: str | None) -> None:
    """Remove an entry from the organization's index; its repository stays."""
    zoo = HubZoo(organization, token)
    if name not in zoo.index().rows:
        raise ConfigError(f"{zoo.uri} lists no entry {name!r}")
    _change_index(zoo, lambda entries: {k: v for k, v in entries.items() if k != name}, f"remove {name}")


def _check_card(zoo: HubZoo, card: str) -> None:
    """Let the hub validate the card's YAML before anything is created."""
    web = WebStorage(zoo.endpoint, zoo.token)
    status, answer = web.post_json("api/validate-yaml", {"content": card, "repoType": "model"})
    if status == 400 and isinstance(answer, dict):
        errors = answer.get("errors")
        listed = [one for one in errors if isinstance(one, dict)] if isinstance(errors, list) else []
        faults = [str(one.get("message", one)) for one in listed]
        said = quoted("; ".join(faults), zoo.token, longest=300)
        raise EntryError(f"{CARD}: {zoo.endpoint} refuses its YAML: {said}")


def _check_repository(zoo: HubZoo, name: str) -> None:
    """Refuse a repository of another model, whose files of the same names would be replaced.

    Raises:
        ConfigError: It is such a repository.
    """
    if _small(zoo, name, MANIFEST, MANIFEST_LIMIT) is not None:
        return
    for path in (CONFIG, CARD):
        if _small(zoo, name, path, CONFIG_LIMIT) is not None:
            raise ConfigError(
                f"{zoo.uri}/{name} holds {path} and is not an entry of embedkit: rename that repository, or publish "
                "to another organization"
            )


def _make(zoo: HubZoo, name: str, private: bool) -> None:
    ask(
        f"{zoo.uri}/{name}",
        lambda: zoo.api().create_repo(zoo.repository(name), private=private, exist_ok=True),
        zoo.token,
    )


def _old_manifest(zoo: HubZoo, name: str) -> Mapping[str, object]:
    text = _small(zoo, name, MANIFEST, MANIFEST_LIMIT)
    try:
        return Manifest.from_json(text).files if text is not None else {}
    except EntryError:
        return {}


def _small(zoo: HubZoo, name: str, path: str, limit: int) -> bytes | None:
    try:
        return persistent(lambda: zoo.storage(name).read(path, limit))
    except (FileNotFoundError, AccessError):
        return None


def _commit(
    zoo: HubZoo, name: str, content: Mapping[str, bytes | None], message: str, parent: str | None
) -> str:
    """Commit files, or remove those whose content is None; returns the new commit."""
    hub = hub_module()

    def commit() -> str:
        operations: list[Any] = []
        for path, data in sorted(content.items()):
            if data is None:
                operations.append(hub.CommitOperationDelete(path_in_repo=path))
            else:
                operations.append(
                    hub.CommitOperationAdd(
                        path_in_repo=path, path_or_fileobj=data if zoo.endpoint == HUB else io.BytesIO(data)
                    )
                )
        with _quiet():
            info = zoo.api().create_commit(
                zoo.repository(name), operations, commit_message=message, parent_commit=parent
            )
        return str(info.oid)

    return ask(f"{zoo.uri}/{name}", commit, zoo.token)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the client's note that buffers are not sent by Xet, which is intended."""
    logger = logging.getLogger("huggingface_hub._commit_api")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tag(zoo: HubZoo, name: str, tag: str, commit: str) -> str:
    """Tag a commit, unless the tag exists; returns the commit that the tag is on."""
    there = zoo.commit(name, tag)
    if there is None:
        tagged = zoo.repository(name)
        ask(
            f"{zoo.uri}/{name}",
            lambda: zoo.api().create_tag(tagged, tag=tag, revision=commit, exist_ok=True),
            zoo.token,
        )
    return there or commit


def _change_index(zoo: HubZoo, change: Callable[[dict[str, Any]], Mapping[str, Any]], message: str) -> bool:
    """Commit a changed index on top of the one that was read; repeat when another publisher was faster."""
    for turn in range(_INDEX_TRIES):
        parent = zoo.commit(INDEX_REPOSITORY, "main")
        old = _index(zoo)
        new = _merged(zoo, old, change)
        if new == old:
            return False
        try:
            _commit(zoo, INDEX_REPOSITORY, {INDEX: new}, message, parent)
        except ZooError:
            if turn == _INDEX_TRIES - 1 or zoo.commit(INDEX_REPOSITORY, "main") == parent:
                raise
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))
            continue
        return True
    return False


def _index(zoo: HubZoo) -> bytes | None:
    return _small(zoo, INDEX_REPOSITORY, INDEX, INDEX_LIMIT)


def _merged(zoo: HubZoo, old: bytes | None, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> bytes:
    return merged_index(old, f"{zoo.uri}/{INDEX_REPOSITORY}/{INDEX}", change)
