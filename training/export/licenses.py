"""The license of an encoder that was trained from the weights of others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from embedkit.errors import ConfigError
from embedkit.hub.licenses import is_open, may_bind

__all__ = ["license_of"]

#: Licenses that ask for themselves of what is made from their weights, or allow no such thing to be passed on.
_BINDING = re.compile(r"(?<![a-z])([al]?gpl|sa|nd|mpl|epl|eupl)(?![a-z])", re.IGNORECASE)


def license_of(parents: Sequence[Mapping[str, str]], given: str | None) -> str:
    """The license of an entry: that of its parents, unless another one is given.

    Which license may follow which is a question for a lawyer. Refused is only what is more open on its face: another
    license after one that binds what is made from it, and an open one after one that restricts use.

    Args:
        parents: `RunConfig.parents`; one without `license` is a run, whose own parents follow it.
        given: As the user names it; None for none.

    Raises:
        ConfigError: None is given and the parents' differ or are not known, or one is given that is more open.
    """
    stated = {parent["name"]: parent["license"] for parent in parents if "license" in parent}
    listed = ", ".join(f"{name} ({license})" for name, license in stated.items())
    known = {license.casefold(): license for license in stated.values()}
    if given is None:
        if not known:
            return "other"
        if len(known) > 1 or not set(known).isdisjoint(("unknown", "other")):
            raise ConfigError(
                f"the encoder was trained from {listed}: no one license follows from that; look up what theirs allow "
                "and give --license"
            )
        return next(iter(known.values()))
    for name, license in stated.items():
        if license.casefold() == given.casefold():
            continue
        if _BINDING.search(license) or (may_bind(license) and is_open(given)):
            raise ConfigError(
                f"--license {given} is more open than that of {name}, from whose weights the encoder was trained: "
                f"expected {license}, or leave --license out"
            )
    return given
