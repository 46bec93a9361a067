"""Publishing to the Hugging Face Hub: one commit per version, a tag of its digest, and a commit to the index.

A commit is there whole or not at all, so a publisher may be killed at any moment. Bytes go to huggingface.co as its
client sees fit (Xet); to other endpoints as buffers, since the client would try Xet on hubs that have none and fail,
and the only other way to say no is a switch for the whole process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embedkit._io.messages import quoted
from embedkit.errors import AccessError, ConfigError, EntryError, ZooError
from embedkit.hub.catalog import REVISION_DIGITS
from embedkit.hub.download import persistent
from embedkit.hub.hf import HUB, INDEX_REPOSITORY, HubZoo, ask, hub_module
from embedkit.hub.limits import CONFIG_LIMIT, INDEX_LIMIT, MANIFEST_LIMIT
from embedkit.hub.publish.index import build_facts
from embedkit.hub.publish.publish import Published, merged_index
from embedkit.hub.verified import VerifiedEntry
from embedkit.model.layout import CARD, CONFIG, INDEX, MANIFEST
from embedkit.model.manifest import Manifest
from embedkit.storage.http import WebStorage

#: Somebody else may commit to the index between our reading and writing it.
_INDEX_TRIES = 10
#: Seconds before another try.
_PAUSE = 0.1


def publish_to_hub(
    entry: VerifiedEntry, organization: str, *, private: bool, tag: str | None, token: str | None
) -> Published:
    """Publish an entry as `organization/<name>`; see `publish`."""
    place = HubZoo(organization, token)
    if place.token is None:
        raise ConfigError(
            f"publishing to {place.uri} needs a token that may write: give it with --token, or log in"
        )
    _check_card(place, entry.card)
    row = build_facts(entry)
    _merged(place, _index(place), lambda entries: {**entries, entry.name: row})  # what is refused ends here
    _make(place, entry.name, private)
    old = _old_manifest(place, entry.name)
    if not old:
        _check_repository(place, entry.name)
    files = entry.manifest.files
    changed = [name for name, record in files.items() if old.get(name) != record]
    gone = [name for name in old if name not in files]
    current = place.commit(entry.name, "main")
    if _small(place, entry.name, MANIFEST, MANIFEST_LIMIT) != entry.manifest_bytes:
        content: dict[str, bytes | None] = {name: entry.read(name) for name in changed}
        content |= {MANIFEST: entry.manifest_bytes, **dict.fromkeys(gone)}
        current = _commit(place, entry.name, content, f"{entry.name}@{entry.revision[:12]}", current)
        changed.append(MANIFEST)
    _tag(place, entry.name, entry.revision[:REVISION_DIGITS], str(current))
    if tag is not None and _tag(place, entry.name, tag, str(current)) != current:
        raise ConfigError(
            f"{place.uri}/{entry.name}: the tag {tag!r} is on another version; choose a new one"
        )
    _make(place, INDEX_REPOSITORY, private)
    if _change_index(place, lambda entries: {**entries, entry.name: row}, f"publish {entry.name}"):
        changed.append(INDEX)
    return Published(
        name=entry.name,
        place=place.uri,
        manifest_sha256=entry.revision,
        files=tuple(changed),
        version=str(current),
    )


def unlist_on_hub(name: str, organization: str, *, token: str | None) -> None:
    """Take an entry off the organization's index; its repository stays."""
    place = HubZoo(organization, token)
    if name not in place.index().rows:
        raise ConfigError(f"{place.uri} lists no entry {name!r}")
    _change_index(place, lambda entries: {k: v for k, v in entries.items() if k != name}, f"remove {name}")


def _check_card(place: HubZoo, card: str) -> None:
    """Let the hub look at the card's YAML before anything is made."""
    web = WebStorage(place.endpoint, place.token)
    status, answer = web.post_json("api/validate-yaml", {"content": card, "repoType": "model"})
    if status == 400 and isinstance(answer, dict):
        errors = answer.get("errors")
        listed = [one for one in errors if isinstance(one, dict)] if isinstance(errors, list) else []
        faults = [str(one.get("message", one)) for one in listed]
        said = quoted("; ".join(faults), place.token, longest=300)
        raise EntryError(f"{CARD}: {place.endpoint} refuses its YAML: {said}")


def _check_repository(place: HubZoo, name: str) -> None:
    """Refuse a repository that holds another model: its files of these names would be replaced.

    Raises:
        ConfigError: It is such a repository.
    """
    if _small(place, name, MANIFEST, MANIFEST_LIMIT) is not None:
        return
    for path in (CONFIG, CARD):
        if _small(place, name, path, CONFIG_LIMIT) is not None:
            raise ConfigError(
                f"{place.uri}/{name} holds {path} and is no entry of embedkit: rename that repository, or publish "
                "to another organization"
            )


def _make(place: HubZoo, name: str, private: bool) -> None:
    ask(
        f"{place.uri}/{name}",
        lambda: place.api().create_repo(place.repository(name), private=private, exist_ok=True),
        place.token,
    )


def _old_manifest(place: HubZoo, name: str) -> Mapping[str, object]:
    text = _small(place, name, MANIFEST, MANIFEST_LIMIT)
    try:
        return Manifest.from_json(text).files if text is not None else {}
    except EntryError:
        return {}


def _small(place: HubZoo, name: str, path: str, limit: int) -> bytes | None:
    try:
        return persistent(lambda: place.storage(name).read(path, limit))
    except (FileNotFoundError, AccessError):
        return None


def _commit(
    place: HubZoo, name: str, content: Mapping[str, bytes | None], message: str, parent: str | None
) -> str:
    """Commit files (None removes one); the new commit."""
    hub = hub_module()

    def commit() -> str:
        operations: list[Any] = []
        for path, data in sorted(content.items()):
            if data is None:
                operations.append(hub.CommitOperationDelete(path_in_repo=path))
            else:
                operations.append(
                    hub.CommitOperationAdd(
                        path_in_repo=path, path_or_fileobj=data if place.endpoint == HUB else io.BytesIO(data)
                    )
                )
        with _quiet():
            info = place.api().create_commit(
                place.repository(name), operations, commit_message=message, parent_commit=parent
            )
        return str(info.oid)

    return ask(f"{place.uri}/{name}", commit, place.token)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's note that buffers do not go by Xet: it is on purpose."""
    logger = logging.getLogger("huggingface_hub._commit_api")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tag(place: HubZoo, name: str, tag: str, commit: str) -> str:
    """Put a tag on a commit, unless it is on one already; the commit that it is on."""
    there = place.commit(name, tag)
    if there is None:
        tagged = place.repository(name)
        ask(
            f"{place.uri}/{name}",
            lambda: place.api().create_tag(tagged, tag=tag, revision=commit, exist_ok=True),
            place.token,
        )
    return there or commit


def _change_index(place: HubZoo, change: Callable[[dict[str, Any]], Mapping[str, Any]], message: str) -> bool:
    """Commit a changed index, on top of what was read; again when somebody else was quicker."""
    for turn in range(_INDEX_TRIES):
        parent = place.commit(INDEX_REPOSITORY, "main")
        old = _index(place)
        new = _merged(place, old, change)
        if new == old:
            return False
        try:
            _commit(place, INDEX_REPOSITORY, {INDEX: new}, message, parent)
        except ZooError:
            if turn == _INDEX_TRIES - 1 or place.commit(INDEX_REPOSITORY, "main") == parent:
                raise
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))
            continue
        return True
    return False


def _index(place: HubZoo) -> bytes | None:
    return _small(place, INDEX_REPOSITORY, INDEX, INDEX_LIMIT)


def _merged(place: HubZoo, old: bytes | None, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> bytes:
    return merged_index(old, f"{place.uri}/{INDEX_REPOSITORY}/{INDEX}", change)
