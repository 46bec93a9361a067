"""`embedkit.embed`: settle the options, the sources, the output and the encoder, and run the job."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from embedkit.embeddings.earlier import EarlierRows
from embedkit.embeddings.metadata import Metadata
from embedkit.encoder import Encoder, load_encoder
from embedkit.errors import ConfigError, SourceError
from embedkit.images.sources import Listing, PathList, list_sources
from embedkit.pipeline.checkpoint import JobRecord, ShardStore
from embedkit.pipeline.job import Job
from embedkit.pipeline.options import EmbedOptions
from embedkit.pipeline.parts import PartFinder
from embedkit.pipeline.report import EmbedReport, Progress
from embedkit.pipeline.scope import Scope
from embedkit.pipeline.target import Target

__all__ = ["embed"]

_T = TypeVar("_T")


def embed(
    source: str | os.PathLike[str] | PathList | Sequence[str | os.PathLike[str] | PathList],
    output: str | os.PathLike[str] = "images.parquet",
    *,
    encoder: str | os.PathLike[str] | Encoder | None = EmbedOptions.encoder,
    revision: str | None = EmbedOptions.revision,
    batch_size: int | None = EmbedOptions.batch_size,
    device: str = EmbedOptions.device,
    providers: Sequence[str] | None = EmbedOptions.providers,
    precision: str = EmbedOptions.precision,
    threads: int | str = EmbedOptions.threads,
    decode: str | None = EmbedOptions.decode,
    max_pixels: int | None = EmbedOptions.max_pixels,
    image_column: str | None = EmbedOptions.image_column,
    normalize: bool = EmbedOptions.normalize,
    dtype: str | None = EmbedOptions.dtype,
    root: str | os.PathLike[str] | None = EmbedOptions.root,
    recursive: bool = EmbedOptions.recursive,
    exclude: Sequence[str] | None = EmbedOptions.exclude,
    label_from_folder: bool = EmbedOptions.label_from_folder,
    on_error: str = EmbedOptions.on_error,
    max_failures: int | str | None = EmbedOptions.max_failures,
    prune: bool = EmbedOptions.prune,
    verify_content: bool = EmbedOptions.verify_content,
    worker: tuple[int, int] | None = EmbedOptions.worker,
    overwrite: bool = EmbedOptions.overwrite,
    local_files_only: bool = EmbedOptions.local_files_only,
    lock: bool = EmbedOptions.lock,
    parts: PartFinder | None = EmbedOptions.parts,
    progress: Progress | None = None,
) -> EmbedReport:
    """Embed folders, lists, tars and Parquet files of images into one file or folder.

    The same call continues a job that was killed. Into a finished output it embeds only what is new or changed
    (size and modification time). The options and their defaults are those of
    `embedkit.pipeline.options.EmbedOptions`.

    Args:
        source: One source or several: a file, a folder, a glob, a `.tar`, a Parquet file with an image column, or a
            `PathList`.
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
        dtype: How the numbers of rows are stored: `float32`, or `float16` in half the size. They are read as float32.
            None is what the output holds already, else `float32`.
        root: Ids are paths relative to this folder.
        recursive: Whether folders inside folders are entered.
        exclude: Patterns of images and folders to leave out: names (`thumb_*`), or with a `/` paths from the source on
            (`raw/**`). They are added to `._*`, `@eaDir` and `#recycle`, which an empty pattern turns off.
        label_from_folder: Whether a column `label` gets the name of each image's class folder: the first folder below
            the source, of members of archives and of images in lists the folder that holds them. The column is
            `folder_label` where a source has a column `label`.
        on_error: `skip` lists images that cannot be read in `X.errors.parquet` (of `X.parquet`; elsewhere
            `X.npy.errors.parquet`); `stop` raises at the first.
        max_failures: How many images may fail, as a number or a share of all such as `1%`. The batch that exceeds it
            is the last; the failures are listed, what is embedded is kept, and the same call continues and tries
            the failed images again.
        prune: Whether rows are dropped whose files are gone, or that lie in the sources and are not among their
            images any more. Rows of other sources stay.
        verify_content: Find changed images by sha256 instead of size and modification time.
        worker: (I, N), counted from 1: embed the I-th of N parts into a folder.
        overwrite: Start again, replacing the output.
        local_files_only: Never open a connection.
        lock: As for `load_encoder`.
        parts: Finds the parts of images that get a row each, such as `embedkit.workflows.FaceParts`, and what is
            stored of each beside its row. Images without one have no row, and the next run looks at them again.
        progress: Told how the job goes.

    Returns:
        What was done.

    Raises:
        ConfigError: An option out of its range, or other than in the unfinished job.
        SourceError: A source does not exist, holds no image, or not one of its images could be read.
        SpaceMismatchError: The output holds embeddings of another space.
        OutputError: The output cannot be written.
        ImageError: `on_error="stop"` and an image that cannot be read.
        TooManyFailuresError: More images failed than `max_failures` allows.

    Examples:
        >>> embedkit.embed(["samples/cat.jpg", "samples/rocket.jpg"], "two.parquet").images
        2
        >>> report = embedkit.embed("samples/", "two.parquet")
        >>> report.images, report.kept
        (8, 2)
    """
    options = EmbedOptions(
        encoder=encoder,
        revision=revision,
        batch_size=batch_size,
        device=device,
        providers=providers,
        precision=precision,
        threads=threads,
        decode=decode,
        max_pixels=max_pixels,
        image_column=image_column,
        normalize=normalize,
        dtype=dtype,
        root=root,
        recursive=recursive,
        exclude=exclude,
        label_from_folder=label_from_folder,
        on_error=on_error,
        max_failures=max_failures,
        prune=prune,
        verify_content=verify_content,
        worker=worker,
        overwrite=overwrite,
        local_files_only=local_files_only,
        lock=lock,
        parts=parts,
    )
    given = [source] if isinstance(source, (str, os.PathLike, PathList)) else source
    sources = [one if isinstance(one, PathList) else os.fspath(one) for one in given]
    target = Target.of(output, worker)
    target.check_sources(sources)
    store = target.open_store()
    try:
        if overwrite:
            target.check_replaceable()
            store.clear()
        unfinished = store.read_job()
        if unfinished is not None:
            options = _settled(options, unfinished)
        loaded = options.encoder if isinstance(options.encoder, Encoder) else _load(options)
        started = time.perf_counter()
        listing = _list(sources, options)
        earlier = None if overwrite else target.earlier()
        if unfinished is None:
            options = _as_stored(options, listing, target, _existing(target, store, earlier))
        job = Job(
            options,
            target=target,
            store=store,
            encoder=loaded,
            listing=listing,
            scope=_scope(sources, options, listing),
            earlier=earlier,
            unfinished=unfinished.metadata if unfinished is not None else None,
        )
        return job.run(progress or Progress(), started)
    finally:
        store.close()


def _settled(options: EmbedOptions, unfinished: JobRecord) -> EmbedOptions:
    """The options as the unfinished job chose them: rows must not depend on the interruption.

    Raises:
        ConfigError: An option was given that the unfinished job has another value for.
    """
    return replace(
        options,
        batch_size=_same("batch_size", options.batch_size, unfinished.batch_size),
        decode=_same("decode", options.decode, unfinished.decode),
        dtype=_same("dtype", options.dtype, unfinished.metadata.dtype),
        exclude=_same(
            "exclude", None if options.exclude is None else tuple(options.exclude), unfinished.exclude
        ),
        label_from_folder=_same(
            "label_from_folder", options.label_from_folder or None, unfinished.label_from_folder
        ),
        threads=unfinished.threads if options.threads == "auto" else options.threads,
        verify_content=options.verify_content or unfinished.verify_content,
    )


def _existing(
    target: Target, store: ShardStore, earlier: EarlierRows | None
) -> tuple[Metadata, Collection[str]] | None:
    """The metadata and the label columns, among others, of the rows that the job extends; None where there are none."""
    if earlier is not None:
        return earlier.metadata, earlier.labels
    return store.first() if target.format.sharded else None


def _as_stored(
    options: EmbedOptions,
    listing: Listing,
    target: Target,
    existing: tuple[Metadata, Collection[str]] | None,
) -> EmbedOptions:
    """The options with the number type of the rows that the job extends.

    Raises:
        ConfigError: Another type was given, or the rows have no labels and the job's shall have some.
    """
    if existing is None:
        return options
    metadata, columns = existing
    step = "write to another file, or start again with --overwrite"
    if options.dtype not in (None, metadata.dtype):
        raise ConfigError(
            f"dtype: {target} holds rows of {metadata.dtype}, and {options.dtype} was given; leave it out, {step}"
        )
    if listing.folder_column is not None and listing.folder_column not in columns:
        raise ConfigError(
            f"label_from_folder: the rows of {target} have no column {listing.folder_column!r}; leave it out, {step}"
        )
    return replace(options, dtype=metadata.dtype)


def _same(name: str, asked: _T | None, stored: _T) -> _T:
    if asked is not None and asked != stored:
        raise ConfigError(
            f"{name}: the unfinished job here runs with {stored!r}; leave it out, or start again with --overwrite"
        )
    return stored


def _load(options: EmbedOptions) -> Encoder:
    assert not isinstance(options.encoder, Encoder)
    return load_encoder(
        options.encoder,
        revision=options.revision,
        local_files_only=options.local_files_only,
        lock=options.lock,
        device=options.device,
        providers=options.providers,
        precision=options.precision,
        threads=options.threads,
    )


def _list(sources: Sequence[str | PathList], options: EmbedOptions) -> Listing:
    """The images of the sources.

    Raises:
        SourceError: There is none, or one that cannot be listed and the job stops at the first.
    """
    listing = list_sources(
        sources,
        root=options.root,
        recursive=options.recursive,
        image_column=options.image_column,
        exclude=options.exclude or (),
        label_from_folder=options.label_from_folder,
    )
    if not listing.items and not listing.errors:
        raise listing.empty(", ".join(map(str, sources)))
    if listing.errors and options.on_error == "stop":
        raise SourceError("{0}: {2}; --on-error skip continues past it".format(*listing.errors[0]))
    return listing


def _scope(sources: Sequence[str | PathList], options: EmbedOptions, listing: Listing) -> Scope:
    root = os.fspath(options.root) if options.root is not None else None
    return Scope(sources, root, options.recursive, [item.id for item in listing.items])
