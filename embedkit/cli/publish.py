"""`embedkit publish`: an entry to a folder, a bucket or the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedkit.cli.completion import entry_names
from embedkit.cli.options import AsJson, LookIn, Private, Quiet, To, Token
from embedkit.cli.output import Id, Number, print_json, print_table
from embedkit.errors import ConfigError

if TYPE_CHECKING:
    from embedkit.hub.publish.published import Published

#: The table of what was written to a zoo.
PUBLISHED = (Id("zoo"), Id("entry"), "revision", "files written")


def published_row(done: Published) -> tuple[str | None, ...]:
    """One row of that table; no files where all were there already."""
    return done.zoo, done.name, done.manifest_sha256[:12], ", ".join(done.files) or None


def publish(
    entry: Annotated[
        str | None,
        typer.Argument(
            help="A name, a URL or an entry's folder; none writes a folder's index again.",
            autocompletion=entry_names,
        ),
    ] = None,
    to: To = "zoo",
    private: Private = False,
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
    zoo: LookIn = None,
    token: Token = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish an entry to a folder, a bucket or the Hub.

    What is there already is not written again. Every byte is verified first. A folder's index.json and table are
    written again from its entries; readers find the old version until the new one is whole.

    Examples:
        embedkit publish runs/first/zoo/simclr-r10.photos --to zoo
        embedkit publish simclr-r10 --to hf://my-team --private
    """
    from embedkit.hub.access import Access
    from embedkit.hub.publish import publish as library
    from embedkit.hub.resolve import find_entry, is_path

    if entry is None:
        index = library.refresh(to)
        if as_json:
            print_json(index["entries"])
        else:
            print_table([Id("zoo"), Number("entries")], [(to, len(index["entries"]))])
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
        print_json(dataclasses.asdict(done))
    else:
        print_table(PUBLISHED, [published_row(done)])
