"""`embedkit zoo list|info|pull|verify|mirror|bundle|evict|unpublish` and `embedkit doctor`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from embedkit._io.outputs import check_outputs
from embedkit._io.text import safe_for_terminal
from embedkit.cli.options import AcceptLicense, AsJson, Device, Offline, Token, Zoo
from embedkit.cli.terminal import tell

zoo = typer.Typer(
    name="zoo", help="The encoders that names reach.", no_args_is_help=True, rich_markup_mode=None
)


@zoo.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell wildcards, as '*-r10'.")] = "*",
    zoo: Zoo = None,
    method: Annotated[str | None, typer.Option(help="Part of the method's name.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Part of the network's name.")] = None,
    data: Annotated[str | None, typer.Option(help="Part of the training data's description.")] = None,
    license: Annotated[str | None, typer.Option(help="Part of the license's name.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of the embedding.")] = None,
    token: Token = None,
    local_files_only: Offline = False,
    as_json: AsJson = False,
) -> None:
    """List entries: name, width, method, training data, license and where each would come from."""
    from embedkit.hub.listing import list_encoders

    wanted = {"method": method, "architecture": architecture, "data": data, "license": license}
    rows = [
        row
        for row in list_encoders(pattern, kind="", zoo=zoo, local_files_only=local_files_only, token=token)
        if all(
            part is None or part.casefold() in getattr(row, key).casefold() for key, part in wanted.items()
        )
        and dim in (None, row.dim)
    ]
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    if not rows:
        tell(f"no encoder matches {repr(pattern)}")
    for row in rows:
        where = row.zoo or "in none of the configured zoos"
        fields = (row.alias or row.name, row.name, str(row.dim), row.method, row.data, row.license, where)
        print("\t".join(map(safe_for_terminal, fields)))


@zoo.command()
def info(
    name: Annotated[str, typer.Argument(help="A name, name@revision, a URL, or an entry's folder.")],
    zoo: Zoo = None,
    token: Token = None,
    local_files_only: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Print an entry's model card, or with --json its configuration, revision and files."""
    from embedkit.hub.access import Access
    from embedkit.hub.resolve import find_entry

    access = Access(token=token, local_files_only=local_files_only)
    entry = find_entry(name, zoo=zoo, access=access)
    if not as_json:
        print(safe_for_terminal(entry.card, lines=True))
        return
    files = {name: dataclasses.asdict(record) for name, record in entry.manifest.files.items()}
    facts = {"name": entry.name, "revision": entry.revision, "location": entry.location, "files": files}
    print(json.dumps({**facts, "config": entry.config.to_json()}, indent=1))


@zoo.command()
def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names, name@revision, URLs, or a .tar of `zoo bundle`; all of --zoo when left out."
        ),
    ] = None,
    zoo: Zoo = None,
    accept_license: AcceptLicense = False,
    lock: Annotated[
        bool, typer.Option("--lock", help="Pin what was pulled in embedkit.lock, in place of an older pin.")
    ] = False,
    verify_key: Annotated[
        Path | None,
        typer.Option(
            metavar="PUB.pem", help="Refuse what the holder of this key's private half has not signed."
        ),
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Bring entries into the cache, every byte verified; what is there is checked, and fixed if need be.

    The license is shown before the download, and one that forbids commercial use asks for --accept-license. A
    download that was cut short goes on where it stopped.
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
        print(json.dumps([dataclasses.asdict(one) for one in pulled], indent=1))
        return
    for one in pulled:
        fields = (one.name, one.revision[:12], f"{one.bytes / 1e6:.1f} MB", one.license, one.location)
        print("\t".join(map(safe_for_terminal, fields)))


@zoo.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One entry; all that are at hand when left out.")] = None,
    zoo: Zoo = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check every file of an entry against its manifest, and its golden vectors on this machine."""
    from embedkit.errors import EmbedkitError
    from embedkit.hub.listing import list_encoders
    from embedkit.hub.resolve import find_entry
    from embedkit.workflows.check_entry import EntryCheck, verify_entry

    rows = list_encoders(kind="", zoo=zoo, local_files_only=zoo is None) if name is None else []
    names = [name] if name is not None else [row.name for row in rows if row.zoo and (row.at_hand or zoo)]
    results = []
    for one in names:
        try:
            entry = find_entry(one, zoo=zoo).location if zoo is not None else one
            results.append(verify_entry(entry, device=device))
        except EmbedkitError as error:
            results.append(EntryCheck(name=one, ok=False, files=0, bytes=0, detail=str(error)))
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    else:
        for result in results:
            size = f"{result.files} files, {result.bytes / 1e6:.1f} MB"
            fields = ("ok" if result.ok else "FAILED", result.name, size, result.detail)
            print("\t".join(map(safe_for_terminal, fields)))
    if not all(result.ok for result in results):
        raise typer.Exit(1)


@zoo.command()
def mirror(
    to: Annotated[str, typer.Argument(help="A folder, s3://bucket/zoo, or hf://organization.")],
    zoo: Annotated[str, typer.Option("--zoo", help="The zoo that is copied.")],
    pattern: Annotated[str, typer.Option(help="Shell wildcards over the entries' names.")] = "*",
    accept_license: AcceptLicense = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the Hub's repositories private ones.")
    ] = False,
    token: Token = None,
    to_token: Annotated[
        str | None,
        typer.Option(envvar="EMBEDKIT_TO_TOKEN", help="Credential for the zoo that is written to."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a zoo to another one and verify every byte; entries that are already there are not written again."""
    from embedkit.cli.download import Download
    from embedkit.hub.access import Access
    from embedkit.hub.mirror import mirror as copy

    done = []
    with Download(accept_license=accept_license) as download:
        access = Access(token=token, gate=download.gate, watcher=download)
        for one in copy(zoo, to, pattern=pattern, access=access, private=private, token=to_token):
            done.append(one)
            if not as_json:
                what = f"wrote {', '.join(one.files)}" if one.files else "all was there"
                print(safe_for_terminal(f"{one.zoo}/{one.name}@{one.manifest_sha256[:12]}: {what}"))
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in done], indent=1))


@zoo.command()
def bundle(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, URLs or entries' folders; all of --zoo when left out.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.tar")] = Path("zoo.tar"),
    zoo: Zoo = None,
    accept_license: AcceptLicense = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write entries as one tar for machines without a network; it serves wherever a zoo is named."""
    from embedkit.cli.download import Download
    from embedkit.hub.bulk import bundle as write

    check_outputs({"--output": output}, {"--zoo": zoo, **{repr(name): name for name in names or ()}})
    with Download(accept_license=accept_license) as download:
        written = write(names or [], output, zoo=zoo, gate=download.gate, watcher=download, token=token)
    if as_json:
        print(json.dumps({"output": str(output), "entries": written}))
        return
    print(safe_for_terminal(f"{output}: {', '.join(written)}"))


@zoo.command()
def evict(
    name: Annotated[str, typer.Argument(help="An entry's whole name, or name@revision.")],
    as_json: AsJson = False,
) -> None:
    """Remove an entry from the cache of this machine; a zoo that has it still has it."""
    from embedkit.hub.bulk import evict as remove

    gone = [f"{name.partition('@')[0]}@{sha256[:12]}" for sha256 in remove(name)]
    print(json.dumps(gone) if as_json else safe_for_terminal("\n".join(gone), lines=True))


@zoo.command()
def unpublish(
    name: Annotated[str, typer.Argument(help="An entry's whole name.")],
    zoo: Annotated[str, typer.Option("--zoo", help="The zoo: a folder, s3://bucket/zoo, hf://organization.")],
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Remove an entry from a zoo, for everybody: its files in a folder or a bucket, its row in the Hub's index."""
    from embedkit.hub.publish.publish import unpublish as remove

    remove(name, zoo, token=token)
    print(json.dumps([f"{zoo}/{name}"]) if as_json else safe_for_terminal(f"{zoo}/{name}"))


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which providers there are, what would run, and what to fix."""
    from embedkit.workflows.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        for key, value in report.facts.items():
            print(f"{key}: {safe_for_terminal(value)}")
        for problem in report.problems:
            print(f"problem: {safe_for_terminal(problem)}")
        if not report.problems:
            print("no problems found")
    if report.problems:
        raise typer.Exit(1)
