"""`embedkit zoo list|info|pull|verify|mirror|bundle|evict|unpublish`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.outputs import check_outputs
from embedkit.cli.app import App, examples
from embedkit.cli.completion import entry_names
from embedkit.cli.options import (
    AcceptLicense,
    Architecture,
    AsJson,
    Device,
    EntriesArgument,
    EntryArgument,
    License,
    LocalFilesOnly,
    Lock,
    OptionalZoo,
    Private,
    Quiet,
    To,
    Token,
    TrainedOn,
    Zoo,
    output,
)
from embedkit.cli.output import Id, Number, print_json, print_table, print_text, tell
from embedkit.cli.publish import PUBLISHED, published_row

zoo = App(
    name="zoo",
    help="List, pull, check and copy the encoders that names reach.",
    epilog=examples("embedkit zoo list", "embedkit zoo info simclr-r10"),
)


@zoo.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or shell wildcards, as '*-r10'.")] = "*",
    zoo: OptionalZoo = None,
    method: Annotated[str | None, typer.Option(help="Part of the method's name.")] = None,
    architecture: Architecture = None,
    trained_on: TrainedOn = None,
    license: License = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of the embedding.")] = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List entries, and where each would come from.

    A part of the method, the architecture, the license or the training images is enough to filter by.

    Examples:
        embedkit zoo list simclr
        embedkit zoo list '*-r10' --zoo zoo --trained-on fashion
    """
    from embedkit.hub.listing import list_encoders

    wanted = {"method": method, "architecture": architecture, "data": trained_on, "license": license}
    rows = [
        row
        for row in list_encoders(pattern, kind="", zoo=zoo, local_files_only=local_files_only, token=token)
        if all(
            part is None or part.casefold() in getattr(row, key).casefold() for key, part in wanted.items()
        )
        and dim in (None, row.dim)
    ]
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    if not rows:
        tell(f"no encoder matches {pattern!r}")
    print_table(
        ["name", Id("entry"), "kind", Number("dim"), "method", Id("trained on"), "license", Id("zoo")],
        (
            (
                *(row.alias or row.name, row.name, row.kind, row.dim, row.method, row.data, row.license),
                row.zoo or "in none of the configured zoos",
            )
            for row in rows
        ),
    )


@zoo.command()
def info(
    name: EntryArgument,
    zoo: OptionalZoo = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print what an entry is, and its model card.

    With --json its configuration, revision and files.

    Examples:
        embedkit zoo info simclr-r10
        embedkit zoo info simclr-r10 --json
    """
    from embedkit.hub.access import Access
    from embedkit.hub.resolve import find_entry

    access = Access(token=token, local_files_only=local_files_only)
    entry = find_entry(name, zoo=zoo, access=access)
    if not as_json:
        config = entry.config
        height, width = config.preprocess.size
        print_table(
            ["fact", "value"],
            [
                ("entry", entry.name),
                ("kind", config.kind),
                ("dim", config.dim),
                ("license", config.license),
                ("input", f"{width}x{height} {config.preprocess.color}"),
                ("trained on", config.data),
                (
                    "used by",
                    "embed, search" if config.kind == "encoder" else "verify --faces, calibrate --faces",
                ),
            ],
        )
        _, mark, text = entry.card.removeprefix("---\n").partition("\n---\n")
        print_text("\n" + (text if mark and entry.card.startswith("---\n") else entry.card).strip())
        return
    files = {name: dataclasses.asdict(record) for name, record in entry.manifest.files.items()}
    facts = {"name": entry.name, "revision": entry.revision, "location": entry.location, "files": files}
    print_json({**facts, "config": entry.config.to_json()})


@zoo.command()
def pull(
    names: EntriesArgument = None,
    zoo: OptionalZoo = None,
    accept_license: AcceptLicense = False,
    lock: Lock = False,
    verify_key: Annotated[
        Path | None,
        typer.Option(
            metavar="PUB.pem", help="Refuse what the holder of this key's private half has not signed."
        ),
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring entries into the cache, every byte verified.

    What is there is checked, and fixed if need be. The license is shown before the download, and one that is not
    open asks for --accept-license. A download that was cut short goes on where it stopped. A .tar of `zoo
    bundle` is an entry's URL, too.

    Examples:
        embedkit zoo pull simclr-r10 --zoo hf://my-team
        embedkit zoo pull --zoo zoo.tar
    """
    from embedkit.cli.download import Download
    from embedkit.hub.bulk import pull as pull_entries

    with Download(accept_license=accept_license) as download:
        pulled = pull_entries(
            names or [],
            zoo=zoo,
            gate=download.gate,
            watcher=download,
            token=token,
            lock=lock,
            verify_key=verify_key,
        )
    if as_json:
        print_json([dataclasses.asdict(one) for one in pulled])
        return
    print_table(
        [Id("entry"), "revision", Number("MB", ".1f"), "license", Id("folder")],
        ((one.name, one.revision[:12], one.bytes / 1e6, one.license, one.location) for one in pulled),
    )
    if there := [one.name for one in pulled if not one.copied]:
        tell(
            f"{', '.join(there)}: in a zoo on this machine, so every byte was checked there and nothing was copied"
        )


@zoo.command()
def verify(
    name: Annotated[
        str | None,
        typer.Argument(help="One entry; all that are at hand when left out.", autocompletion=entry_names),
    ] = None,
    zoo: OptionalZoo = None,
    token: Token = None,
    local_files_only: LocalFilesOnly = False,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check an entry's files and its golden vectors.

    The files are compared with the manifest, and the vectors computed on this machine. The exit status is 1 if an
    entry fails.

    Examples:
        embedkit zoo verify
        embedkit zoo verify simclr-r10 --zoo zoo --device cpu
    """
    from embedkit.errors import EmbedkitError
    from embedkit.hub.access import Access
    from embedkit.hub.listing import list_encoders
    from embedkit.hub.resolve import find_entry
    from embedkit.workflows.check_entry import EntryCheck, verify_entry

    rows = list_encoders(kind="", zoo=zoo, local_files_only=zoo is None, token=token) if name is None else []
    names = [name] if name is not None else [row.name for row in rows if row.zoo and (row.at_hand or zoo)]
    results = []
    for one in names:
        try:
            entry = one
            if zoo is not None or token is not None:
                entry = find_entry(one, zoo=zoo, access=Access(token=token)).location
            results.append(verify_entry(entry, device=device))
        except EmbedkitError as error:
            results.append(EntryCheck(name=one, ok=False, files=0, bytes=0, detail=str(error)))
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        print_table(
            ["result", Id("entry"), Number("files"), Number("MB", ".1f"), "detail"],
            (
                ("ok" if one.ok else "FAILED", one.name, one.files, one.bytes / 1e6, one.detail)
                for one in results
            ),
        )
    if not all(result.ok for result in results):
        raise typer.Exit(1)


@zoo.command()
def mirror(
    zoo: Zoo,
    to: To,
    pattern: Annotated[str, typer.Argument(help="Shell wildcards, as '*-r10'.")] = "*",
    accept_license: AcceptLicense = False,
    private: Private = False,
    token: Token = None,
    to_token: Annotated[
        str | None,
        typer.Option(envvar="EMBEDKIT_TO_TOKEN", help="Credential for the zoo that is written to."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy a zoo to another one, every byte verified.

    Entries that are already there are not written again.

    Examples:
        embedkit zoo mirror --zoo hf://my-team --to zoo
        embedkit zoo mirror '*-r10.*' --zoo zoo --to shared/
    """
    from embedkit.cli.download import Download
    from embedkit.hub.access import Access
    from embedkit.hub.mirror import mirror as copy

    with Download(accept_license=accept_license) as download:
        access = Access(token=token, gate=download.gate, watcher=download)
        copied = copy(zoo, to, pattern=pattern, access=access, private=private, token=to_token)
        if as_json:
            print_json([dataclasses.asdict(one) for one in copied])
        else:
            print_table(PUBLISHED, map(published_row, copied))


@zoo.command()
def bundle(
    names: EntriesArgument = None,
    output: Annotated[Path, output("OUT.tar", "The bundle.")] = Path("zoo.tar"),
    zoo: OptionalZoo = None,
    accept_license: AcceptLicense = False,
    token: Token = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write entries as one tar, for machines without a network.

    The tar serves wherever a zoo is named: --zoo zoo.tar.

    Examples:
        embedkit zoo bundle simclr-r10 -o zoo.tar
        embedkit zoo bundle --zoo zoo
    """
    from embedkit.cli.download import Download
    from embedkit.hub.bulk import bundle as write

    check_outputs({"--output": output}, {"--zoo": zoo, **{repr(name): name for name in names or ()}})
    with Download(accept_license=accept_license) as download:
        written = write(names or [], output, zoo=zoo, gate=download.gate, watcher=download, token=token)
    if as_json:
        print_json({"output": output, "entries": written})
    else:
        print_table([Id("entry")], ((name,) for name in written))
    tell(f"{output} holds {len(written)} entries")


@zoo.command()
def evict(
    name: Annotated[str, typer.Argument(help="An entry's whole name, or name@revision.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove an entry from the cache of this machine.

    A zoo that has it still has it.

    Examples:
        embedkit zoo evict simclr-r10.fmnist
    """
    from embedkit.hub.bulk import evict as remove

    gone = [f"{name.partition('@')[0]}@{sha256[:12]}" for sha256 in remove(name)]
    _print_removed(gone, as_json)


@zoo.command()
def unpublish(
    name: Annotated[str, typer.Argument(help="An entry's whole name.", autocompletion=entry_names)],
    zoo: Zoo,
    token: Token = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove an entry from a zoo, for everybody.

    In a folder or a bucket its files are removed, on the Hub its row in the index.

    Examples:
        embedkit zoo unpublish vae-r10.fmnist --zoo shared/
    """
    from embedkit.hub.publish.publish import unpublish as remove

    remove(name, zoo, token=token)
    _print_removed([f"{zoo}/{name}"], as_json)


def _print_removed(entries: list[str], as_json: bool) -> None:
    if as_json:
        print_json(entries)
    else:
        print_table([Id("entry")], ((entry,) for entry in entries))
