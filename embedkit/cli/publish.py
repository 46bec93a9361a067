"""`embedkit publish`: an entry to a folder, a bucket or the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AsJson, Token
from embedkit.errors import ConfigError


def publish(
    entry: Annotated[
        str | None,
        typer.Argument(help="A name, a URL or an entry's folder; none writes a folder's index again."),
    ] = None,
    to: Annotated[
        str, typer.Option(help="A folder, s3://bucket/zoo or another fsspec URL, or hf://organization.")
    ] = "zoo",
    private: Annotated[
        bool, typer.Option("--private", help="Make the Hub's repository a private one, when it is made.")
    ] = False,
    tag: Annotated[str | None, typer.Option(help="A tag on the Hub, such as v1.0.")] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY.pem", help="Sign the entry where it lies with this elliptic-curve key, first."
        ),
    ] = None,
    password: Annotated[
        str | None, typer.Option(envvar="EMBEDKIT_KEY_PASSWORD", help="Of the key, where it has one.")
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Publish an entry; what is there already is not written again.

    Every byte is verified first. A folder's index.json and table are written again from its entries; readers find
    the old version until the new one is whole.
    """
    from embedkit.hub.access import Access
    from embedkit.hub.publish import publish as library
    from embedkit.hub.resolve import find_entry, is_path

    if entry is None:
        index = library.refresh(to)
        print(
            json.dumps(index["entries"])
            if as_json
            else f"{safe_for_terminal(to)}: {len(index['entries'])} entries"
        )
        return
    found = find_entry(entry, access=Access(token=token))
    if sign is not None:
        from embedkit.hub.signing import sign as sign_entry

        if not is_path(entry):
            raise ConfigError(
                f"signing adds a file to the entry where it lies, and {entry!r} is a name: give the path, "
                f"{found.location}, if it is to be signed there"
            )
        found = sign_entry(found, sign, password)
    done = library.publish(found, to, private=private, tag=tag, token=token)
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    what = f"wrote {', '.join(done.files)}" if done.files else "all was there"
    print(safe_for_terminal(f"{done.zoo}/{done.name}@{done.manifest_sha256[:12]}: {what}"))
