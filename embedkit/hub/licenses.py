"""Which licenses of weights are open, and what is known of those that are not.

A license is open here if anyone may use the weights for anything, also commercially, under conditions that a user can
meet alone (attribution, the same license for changes). Whether those conditions are met is not checked. What is not on
the list is not refused: the user is asked first.
"""

from __future__ import annotations

import re

__all__ = ["OPEN_LICENSES", "is_open", "may_bind", "restriction"]

#: SPDX identifiers in small letters, and the Hub's names where these differ.
#: Source: the licenses that OSI or the FSF approve for software (spdx.org/licenses, release 3.27), the open ones of
#: Creative Commons and of the Open Data Commons, and those written for weights that restrict no use.
OPEN_LICENSES = frozenset(
    """
    0bsd afl-3.0 agpl-3.0 agpl-3.0-only agpl-3.0-or-later apache-1.1 apache-2.0 artistic-2.0 blueoak-1.0.0
    bsd bsd-1-clause bsd-2-clause bsd-2-clause-patent bsd-3-clause bsd-3-clause-clear bsd-3-clause-lbnl bsd-4-clause
    bsl-1.0 cc0-1.0 cc-by-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-2.0 cc-by-sa-2.5 cc-by-sa-3.0
    cc-by-sa-4.0 cc-pddc cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 cecill-2.1 cecill-b cecill-c
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fsfap gfdl-1.3 gpl gpl-2.0 gpl-2.0-only gpl-2.0-or-later
    gpl-3.0 gpl-3.0-only gpl-3.0-or-later hpnd isc lgpl lgpl-2.1 lgpl-2.1-only lgpl-2.1-or-later lgpl-3.0
    lgpl-3.0-only lgpl-3.0-or-later mit mit-0 mit-cmu mpl-2.0 ms-pl ms-rl mulanpsl-2.0 ncsa odbl odbl-1.0 odc-by
    odc-by-1.0 ofl-1.1 openmdw openmdw-1.0 openssl osl-3.0 pddl pddl-1.0 postgresql psf-2.0 python-2.0 unicode-3.0
    unlicense upl-1.0 w3c wtfpl x11 zlib zpl-2.1
    """.split()
)

#: Licenses of weights that are often met, by what they begin with, and what they do.
_RESTRICTED = {
    "apple-amlr": "allows research only",
    "apple-ascl": "has custom terms",
    "bigcode-openrail": "has custom terms, which restrict uses",
    "bigscience": "has custom terms, which restrict uses",
    "creativeml-openrail": "has custom terms, which restrict uses",
    "deepfloyd": "allows research only",
    "dinov3": "has custom terms",
    "fair-noncommercial": "forbids commercial use",
    "gemma": "has custom terms",
    "health-ai-developer-foundations": "has custom terms",
    "intel-research": "allows research only",
    "llama": "has custom terms",
    "nvidia-open-model": "has custom terms",
    "nvidia-source-code": "forbids commercial use",
    "openrail": "has custom terms, which restrict uses",
    "sam-license": "has custom terms",
    "seer": "forbids commercial use",
}
_UNNAMED = ("", "other", "unknown", "none", "noassertion")

_RESEARCH = re.compile(r"(?<![a-z])research(?![a-z])", re.IGNORECASE)
_NON_COMMERCIAL = re.compile(r"(?<![a-z])(nc|non-?commercial)(?![a-z])", re.IGNORECASE)
_NO_DERIVATIVES = re.compile(r"(?<![a-z])nd(?![a-z])", re.IGNORECASE)
_EXCEPTION = re.compile(r"\s+with\s+[\w.-]+", re.IGNORECASE)


def is_open(license: str) -> bool:
    """Whether a license is on the list of open ones.

    Args:
        license: An SPDX identifier or expression, or a hub's name of a license. Of `A OR B` one has to be open, of
            `A AND B` both.
    """
    return not restriction(license)


def restriction(license: str) -> str:
    """What a license does that an open one does not, as words that follow "which"; "" for an open license."""
    name = _EXCEPTION.sub("", license.strip()).casefold()
    # An expression in parentheses is read as if all of it applied, which may ask once too often.
    either = "(" not in name and re.split(r"\s+or\s+", name)
    if either and len(either) > 1:
        found = [restriction(part) for part in either]
        return "" if "" in found else found[0]
    parts = [part for part in re.split(r"\s+(?:and|or)\s+|[()]", name) if part.strip()] or [""]
    return next(filter(None, (_of_one(part.strip()) for part in parts)), "")


def may_bind(license: str) -> bool:
    """Whether a license is known to restrict use: it is named, and not an open one."""
    return license.strip().casefold() not in _UNNAMED and not is_open(license)


def _of_one(name: str) -> str:
    if name in OPEN_LICENSES or (name.endswith("+") and name[:-1] in OPEN_LICENSES):
        return ""
    if name in _UNNAMED:
        return "names no license"
    known = next((what for start, what in _RESTRICTED.items() if name.startswith(start)), "")
    if known:
        return known
    if _NON_COMMERCIAL.search(name):
        return "forbids commercial use"
    if _RESEARCH.search(name):
        return "allows research only"
    if _NO_DERIVATIVES.search(name):
        return "forbids changed versions"
    return "is not on the list of open licenses"
