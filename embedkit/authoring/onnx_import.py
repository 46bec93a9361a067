"""Any ONNX encoder of images as an entry of a zoo, without torch.

The weights move into `model.safetensors` under their names, in the precision that they have; the graph is written again
in canonical form, and has to pass the same guard as any other. The entry then gives what the file gives: both run in
ONNX Runtime on the same images, before anything is written.

    embedkit import encoder.onnx --name own-r50.products --license Apache-2.0
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from embedkit._io.atomic import replacing_folder
from embedkit.authoring.card import render_card
from embedkit.authoring.contract import PROCESSOR, Contract, from_processor
from embedkit.authoring.golden import TOLERANCES, npz_bytes, sample_pixels, synthetic_images
from embedkit.authoring.import_request import Imported, License, Request, decide_license
from embedkit.authoring.onnx_file import MOST_BYTES, Images, add_output, images_of, parse_model, read_file
from embedkit.authoring.onnx_original import Original, choose_pool, sides
from embedkit.authoring.onnx_rewrite import (
    free_batch,
    keep_output,
    normalize_input,
    opset_of,
    pool_output,
    stored_outside,
)
from embedkit.encoder import comparable
from embedkit.errors import ConfigError, EntryError, ParityError
from embedkit.hub.folder import check_replaceable
from embedkit.hub.publish.index import update_index
from embedkit.images.transform import read_pixels
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.layout import CARD, CONFIG, GOLDEN, GRAPH, MANIFEST, WEIGHTS, sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions

__all__ = ["PARITY_LIMIT", "import_onnx"]

#: The entry against the file, largest absolute difference on L2-normalized rows, and the least cosine.
PARITY_LIMIT, LEAST_COSINE = 1e-4, 0.99999
#: Batches in which the entry is compared: a row must not depend on its batch.
_BATCHES = (1, 2, 7, 32)


def import_onnx(
    path: str | os.PathLike[str],
    request: Request,
    *,
    architecture: str | None = None,
    output: str | None = None,
) -> Imported:
    """Write the encoder of an ONNX file as an entry of the zoo.

    The file takes images as uint8 or floats, channels first or last, in a fixed or a free batch. What a
    `preprocessor_config.json` beside it states is read; `request.contract` replaces parts of it.

    Args:
        path: The file. Its weights may lie in other files of the same folder.
        request: The entry that is wanted; its license must be given.
        architecture: The network's name for the card; the middle of the entry's name when None.
        output: The output that is the embedding, or any other value of the graph, or a node; the only one that gives
            a vector an image when None.

    Returns:
        The entry.

    Raises:
        SourceError: The file cannot be read.
        ConfigError: No license, image size or normalization is known, or the output cannot be chosen.
        EntryError: Not an ONNX file, or a graph that no entry may have: foreign operators, control flow, weights in
            other folders.
        ParityError: The entry does not give what the file gives; nothing is written.
        OutputError: The zoo cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from embedkit.authoring.import_request import Request
        >>> from embedkit.authoring.onnx_export import export_onnx
        >>> from embedkit.authoring.onnx_import import import_onnx
        >>> file = export_onnx("simclr-r10", "encoder.onnx", float_input=True)
        >>> request = Request(name="own-r10.fmnist", zoo=Path("own"), license="Apache-2.0")
        >>> import_onnx(file, request).folder
        PosixPath('own/own-r10.fmnist')
    """
    path = Path(path)
    license = decide_license(request, None, stated=False, where=str(path))
    check_replaceable(request.zoo / request.name)
    content = read_file(path, MOST_BYTES)
    model = parse_model(content, path)
    taken = images_of(model, str(path))
    contract, stated_by = _contract(model, path, request.contract, taken)
    added = add_output(model, output, str(path))
    graph, weights = stored_outside(_copy(model), {}, str(path))
    original = Original(graph, weights, taken, contract, str(path))
    samples = sample_pixels(contract, request.samples)
    chosen, shape, kind = original.choose(added, samples[:2])
    pool = choose_pool(request.pool, shape, chosen, str(path))

    keep_output(model.graph, chosen)
    channels_last = bool(original.channels_last)
    if taken.batch:
        free_batch(model, taken.batch)
    normalize_input(model.graph, contract, channels_last=channels_last)
    dim = pool_output(model, shape, kind, pool=pool, channels_last=channels_last)
    about = {"method": request.method, "dim": str(dim), "onnx": onnx.__version__}
    graph, weights = stored_outside(model, about, str(path))

    images = synthetic_images(4)
    golden_pixels = np.stack([read_pixels(image, contract, decode="exact") for image in images])
    expected = [original.rows(pixels, chosen, pool) for pixels in (samples, golden_pixels)]
    difference = _check_parity(graph, weights, (samples, golden_pixels), expected, taken.batch, str(path))
    config = EntryConfig(
        architecture=architecture or request.name.partition("-")[2].partition(".")[0],
        outputs={"embedding": (dim,)},
        method=request.method,
        dim=dim,
        preprocess=contract,
        data=request.data or request.tag,
        license=license.name,
        provenance={
            **({"source": request.origin} if request.origin else {}),
            "file": path.name,
            "sha256": sha256_hex(content),
            "producer": f"{model.producer_name} {model.producer_version}".strip() or "not stated",
            "opset": opset_of(model),
            "output": chosen,
            "pool": pool,
            "preprocess_by": stated_by,
            "license_by": license.stated_by,
            "importer": "embedkit.authoring.onnx_import",
            "compared_on": "synthetic images" if request.samples is None else "images",
            "parity": {"max_difference": float(f"{difference:.1e}"), "limit": PARITY_LIMIT},
            "versions": {"onnx": onnx.__version__},
        },
        card=Card(summary=f"The encoder of the ONNX file {path.name}, with its weights as they are."),
    )
    golden = {
        "images": images,
        "embedding": comparable("embedding", expected[1]),
        **{key: np.array(value, np.float32) for key, value in TOLERANCES.items()},
    }
    _write(request, config, {WEIGHTS: weights, GRAPH: graph, GOLDEN: npz_bytes(golden)})
    return _told(request, config, license, chosen, shape, pool, stated_by)


def _contract(model: onnx.ModelProto, path: Path, given: Contract, taken: Images) -> tuple[Preprocess, str]:
    """The preprocessing, and who states it."""
    ours = next((one.value for one in model.metadata_props if one.key == "preprocess"), None)
    beside = path.parent / PROCESSOR
    color = given.color or ("gray" if taken.channels == 1 else "rgb")
    size = taken.size if all(taken.size) else (given.image_size or 0,) * 2
    if ours is not None:
        base, by = (
            Preprocess.from_json(_facts(ours, str(path)), f"{path}: preprocess"),
            "the file, as embedkit wrote it",
        )
    elif os.path.isfile(beside):
        base, by = from_processor(read_file(beside, 1 << 20), str(beside)), f"{PROCESSOR} beside the file"
    else:
        if not all(size):
            raise ConfigError(
                f"{path} takes images of any size: give --image-size, or put a {PROCESSOR} beside it"
            )
        channels = 3 if color == "rgb" else 1
        plain = taken.kind == onnx.TensorProto.UINT8
        if not plain and (given.mean is None or given.std is None):
            raise ConfigError(
                f"{path} takes floats, and how pixels become them is not known: give --mean and --std in units of "
                f"[0, 1] (0 and 1 for values of 0..1, 0 and 0.00392157 for 0..255), or put a {PROCESSOR} beside it"
            )
        base = Preprocess(
            color=color, size=size, resize_size=min(size), mean=(0.0,) * channels, std=(1.0,) * channels
        )
        by = "the person who imported it"
    if given:
        base, by = given.applied(base), "the person who imported it"
    if taken.kind == onnx.TensorProto.UINT8 and (given.mean or given.std):
        raise ConfigError(f"{path} takes uint8 and normalizes itself: leave --mean and --std out")
    if all(taken.size) and taken.size != base.size:
        fixed, wanted = ("x".join(map(str, sides)) for sides in (taken.size, base.size))
        raise ConfigError(
            f"{path} takes images of {fixed} pixels, and not of {wanted}: leave --image-size out"
        )
    if taken.channels not in (0, base.channels):
        raise ConfigError(
            f"{path} takes {taken.channels} channels, and {base.color} has {base.channels}: give --color"
        )
    return base, by


def _facts(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise EntryError(f"{where}: the preprocessing in its metadata is not JSON") from None


# --- the entry --------------------------------------------------------------------------------------------


def _check_parity(
    graph: bytes,
    weights: bytes,
    pixels: tuple[np.ndarray, ...],
    expected: list[np.ndarray],
    batch: int,
    where: str,
) -> float:
    """The largest difference between the entry, in several batches, and the file."""
    engine = OnnxEngine(graph, weights, EngineOptions(device="cpu"), where=where)
    rows = comparable("embedding", np.concatenate(expected))
    every = np.concatenate(pixels)
    difference = 0.0
    for size in _BATCHES:
        some = every if size == max(_BATCHES) else every[: 2 * size]
        parts = [engine.run(some[start : start + size]) for start in range(0, len(some), size)]
        if any(len(part) != min(size, len(some) - at * size) for at, part in enumerate(parts)):
            raise ParityError(f"{where}: the graph does not give one row an image; nothing was written")
        found = comparable("embedding", np.concatenate(parts))
        difference = float(np.max([difference, np.abs(found - rows[: len(found)]).max()]))
        cosine = np.einsum("nd,nd->n", found, rows[: len(found)], dtype=np.float64).min()
        if not (difference <= PARITY_LIMIT and cosine >= LEAST_COSINE):  # also a NaN
            reason = (
                f"it was traced with a batch of {batch}: export it with a free one"
                if batch and size > 1
                else ("a row depends on its batch, or is not finite")
            )
            raise ParityError(
                f"{where}: in batches of {size} the entry differs from the file by {difference:.1e} on L2-normalized "
                f"rows, and {PARITY_LIMIT:.0e} is allowed ({reason}); nothing was written"
            )
    return difference


def _write(request: Request, config: EntryConfig, files: Mapping[str, bytes]) -> None:
    files = {
        CONFIG: (json.dumps(config.to_json(), indent=1) + "\n").encode(),
        **files,
        CARD: render_card(request.name, config).encode(),
    }
    with replacing_folder(request.zoo / request.name) as partial:
        for name, content in {**files, MANIFEST: Manifest.encode(files)}.items():
            (partial / name).write_bytes(content)
    update_index(request.zoo)


def _told(
    request: Request,
    config: EntryConfig,
    license: License,
    chosen: str,
    shape: tuple[int, ...],
    pool: str,
    stated_by: str,
) -> Imported:
    size, channels = config.preprocess.size, config.preprocess.channels
    how = "" if pool == "none" else f", {'the mean' if pool == 'mean' else 'the first'} of {sides(shape)}"
    notes = [f"images of {channels}x{size[0]}x{size[1]}, preprocessing by {stated_by}"]
    if pool == "mean" and len(shape) == 2:
        notes.append(
            "the mean is over all tokens, a class token and registers among them if the output has any"
        )
    return Imported(
        folder=request.zoo / request.name,
        architecture=config.architecture,
        license=license.name,
        recognized=f"an ONNX file, output {chosen}{how}",
        notes=tuple(notes),
    )


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
