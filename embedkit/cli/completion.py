"""Names that a shell completes, without a connection."""

from __future__ import annotations

from contextlib import suppress

import typer


def entry_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names of entries that begin with `incomplete`: of the zoo that `--zoo` names, else of all zoos.

    Only the package's index, folders and the lists in the cache are read. A zoo that cannot be read has no names.
    """
    from embedkit.errors import EmbedkitError
    from embedkit.hub.access import Access
    from embedkit.hub.open import open_zoo
    from embedkit.hub.resolve import zoos

    access, zoo = Access(local_files_only=True), context.params.get("zoo")
    names: set[str] = set()
    with suppress(EmbedkitError):
        for one in zoos(access) if zoo is None else [open_zoo(zoo, access)]:
            with suppress(EmbedkitError):
                names.update(one.index().names)
    return sorted(name for name in names if name.startswith(incomplete))
