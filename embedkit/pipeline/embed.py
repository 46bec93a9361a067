"""The folder job: settle the sources, the output and the encoder, and run the job."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from embedkit.embeddings.metadata import Metadata
from embedkit.encoder import Encoder, load_encoder
from embedkit.errors import ConfigError, SourceError
from embedkit.images.sources import list_sources
from embedkit.pipeline.job import Job, Progress, Report
from embedkit.pipeline.scope import Scope
from embedkit.pipeline.target import Target

ON_ERROR = ("skip", "stop")


def embed(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "images.parquet",
    *,
    encoder: str | os.PathLike[str] | Encoder | None = None,
    revision: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    providers: Sequence[str] | None = None,
    precision: str = "fp32",
    threads: int | str = "auto",
    decode: str | None = None,
    max_pixels: int | None = None,
    image_column: str | None = None,
    normalize: bool = True,
    root: str | os.PathLike[str] | None = None,
    recursive: bool = True,
    on_error: str = "skip",
    prune: bool = False,
    verify_content: bool = False,
    worker: tuple[int, int] | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    null: bool = False,
    stdin: BinaryIO | None = None,
    progress: Progress | None = None,
) -> Report:
    """Embed folders, lists, tars and Parquet files of images into one file or folder.

    The same call goes on where a killed one stopped. Into a finished output it embeds only what is new or
    changed (size and modification time).

    Args:
        source: One source or several: a file, a folder, a glob, `-` for a list on `stdin`, a `.tar`, a Parquet
            file with an image column.
        output: `X.parquet`, `X.npy` (with `X.ids.jsonl` and `X.metadata.json`), or a folder (ending in `/`, or
            existing) for a Parquet data set of shards, or `lance://FOLDER/TABLE` for a table of a LanceDB database.
        encoder: A name, an entry's folder or a loaded `Encoder`; the default encoder when None.
        revision: As for `load_encoder`.
        batch_size: Images in one batch; chosen for the device when None.
        device: As for `load_encoder`.
        providers: As for `load_encoder`.
        precision: As for `load_encoder`.
        threads: As for `load_encoder`.
        decode: `auto` (the default) or `exact`.
        max_pixels: Greatest number of pixels of an image file; 179 million when None.
        image_column: The column of Parquet files that holds the images; found by type and name when None.
        normalize: Whether rows have Euclidean length 1.
        root: Ids are paths relative to this folder.
        recursive: Whether folders are walked to the bottom.
        on_error: `skip` lists images that cannot be read in `X.errors.parquet` (of `X.parquet`; elsewhere
            `X.npy.errors.parquet`); `stop` raises at the first.
        prune: Whether rows are dropped whose files are gone, or that lie in the sources and are not among their
            images any more. Rows of other sources stay.
        verify_content: Tell changed images by sha256 instead of size and modification time.
        worker: (I, N), counted from 1: embed the I-th of N parts into a folder.
        overwrite: Start again, replacing what is there.
        local_files_only: Never open a connection.
        null: The list on `stdin` is separated by NUL bytes.
        stdin: Where `-` reads its list from.
        progress: Told how the job goes.

    Returns:
        What was done.

    Raises:
        SourceError: A source does not exist, holds no image, or not one of its images could be read.
        SpaceMismatchError: The output holds embeddings of another space.
        OutputError: The output cannot be written.
        ImageError: `on_error="stop"` and an image that cannot be read.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ConfigError(f"max_pixels: expected at least 1, found {max_pixels}")
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error: expected skip or stop, found {on_error!r}")
    target = Target.of(output, worker)
    sources = [os.fspath(one) for one in ([source] if isinstance(source, (str, os.PathLike)) else source)]
    target.check_sources(sources)
    store = target.open_store()
    try:
        if overwrite:
            target.check_replaceable()
            store.clear()
        job = store.read_job() or {}
        batch_size = _settle("batch_size", batch_size, job.get("batch_size"))
        decode = _settle("decode", decode, job.get("decode")) or "auto"
        if not isinstance(encoder, Encoder):
            encoder = load_encoder(
                encoder,
                revision=revision,
                local_files_only=local_files_only,
                device=device,
                providers=providers,
                precision=precision,
                threads=job.get("threads", threads) if threads == "auto" else threads,
            )
        started = time.perf_counter()
        listing = list_sources(
            sources,
            root=os.fspath(root) if root is not None else None,
            recursive=recursive,
            null=null,
            image_column=image_column,
            stdin=stdin,
        )
        if not len(listing.items) and not listing.errors:
            raise listing.empty(", ".join(sources))
        if listing.errors and on_error == "stop":
            raise SourceError("{0}: {2}; --on-error skip goes on past it".format(*listing.errors[0]))
        work = Job(
            target=target,
            store=store,
            encoder=encoder,
            listing=listing,
            scope=Scope(
                sources,
                os.fspath(root) if root is not None else None,
                recursive,
                [item.id for item in listing.items],
            ),
            batch_size=batch_size or encoder.default_batch_size,
            decode=decode,
            max_pixels=max_pixels,
            normalize=normalize,
            prune=prune,
            verify_content=verify_content or bool(job.get("verify_content")),
            old=None if overwrite else target.finished(),
            metadata=Metadata.from_json(job["metadata"], str(store.folder)) if job else None,
        )
        return work.run(on_error, progress or Progress(), started)
    finally:
        store.close()


def _settle(name: str, asked: Any, stored: Any) -> Any:
    """An unfinished job goes on with what it began with: its rows must not depend on the interruption."""
    if asked is not None and stored is not None and asked != stored:
        raise ConfigError(
            f"{name}: the unfinished job here runs with {stored!r}; leave it out, or start again with --overwrite"
        )
    return stored if asked is None else asked
