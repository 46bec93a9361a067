"""Diagnosis of an installation: what is installed, what would run, and what to fix."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass

from embedkit.encoder import load_encoder
from embedkit.errors import EmbedkitError
from embedkit.hub.access import Access, default_cache_dir
from embedkit.hub.resolve import zoos
from embedkit.model.providers import (
    CPU,
    CUDA,
    TELEMETRY_VARIABLE,
    available_cpus,
    available_providers,
    installed_runtimes,
    runtime_conflict,
    telemetry_is_on,
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Facts by name, and problems with their remedy, one sentence each."""

    facts: dict[str, str]
    problems: list[str]


def examine() -> Diagnosis:
    """Look at the installation; nothing is changed and no connection is opened.

    Examples:
        >>> diagnosis = embedkit.workflows.examine()
        >>> diagnosis.facts["embedkit"] == embedkit.__version__
        True
    """
    facts = {"python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}"}
    problems: list[str] = []
    for name in ("embedkit", "numpy", "pillow", "pyarrow"):
        facts[name] = importlib.metadata.version(name)
    facts["cores"] = str(available_cpus())
    facts["onnxruntime wheels"] = ", ".join(f"{n} {v}" for n, v in installed_runtimes().items()) or "none"
    conflict = runtime_conflict()
    if conflict:
        problems.append(conflict)
    try:
        facts["onnxruntime telemetry"] = "on" if telemetry_is_on() else "off"
        facts["providers"] = ", ".join(available_providers())
    except EmbedkitError as error:
        return Diagnosis(facts=facts, problems=[*problems, str(error)])
    if telemetry_is_on():
        problems.append(
            "ONNX Runtime's telemetry is on and may open connections: this process imported it before embedkit did, "
            f"or {TELEMETRY_VARIABLE} is not 1; set {TELEMETRY_VARIABLE}=1 in the environment"
        )
    try:
        facts["zoos"] = ", ".join(zoo.uri for zoo in zoos(Access(local_files_only=True)))
        encoder = load_encoder(local_files_only=True)
        facts["would run"] = f"{encoder.provider} ({encoder.name})"
        if encoder.note:
            problems.append(encoder.note)
    except EmbedkitError as error:
        problems.append(str(error))
    if CUDA in facts["providers"] and facts.get("would run", CPU).startswith(CPU) and not problems:
        problems.append("the GPU build of ONNX Runtime is installed and no GPU can be used")
    facts["cache"] = default_cache_dir()
    return Diagnosis(facts=facts, problems=problems)
