"""Finds commands that install packages in any text, and in Python's strings however they are put together."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

#: A tool, its verb, and what may be arguments: to the end of the command, of the code span, or of the sentence.
_COMMAND = re.compile(
    r"\b(?:pip[\d.]*|pipx|uv(?: pip| tool)?|poetry|pdm|rye|conda|mamba|micromamba|easy_install)\s+"
    r"(?:install|add|inject|download)\b([^&|;`\n]*)",
    re.IGNORECASE,
)
#: The end of the project's own hint: a checkout, not a package of that name.
_OWN_HINT = re.compile(r"in (?:a|the) checkout(?: of embedkit)?")
#: A requirement on the distribution beside any command, as `embedkit[hub]` or `embedkit>=1`.
_REQUIREMENT = re.compile(r"(?<![\w.\"'/-])[Ee]mbed[-_]?[Kk]it(?:\[[a-z0-9, -]+\]|\s*(?:==|>=|~=|<=)\s*\d)")

#: What stands for a value that is not known before the program runs.
HOLE = "{}"


def is_hole(word: str) -> bool:
    """Whether a target is a value that is filled in later, here or by `str.format`."""
    return word.startswith("{")


def targets(text: str) -> Iterator[str]:
    """What the commands of a text install: names, paths, and `{}` for a value that is filled in later."""
    # A command may go on in the next line: after a backslash, or where its verb ends a line of prose or of a comment.
    text = re.sub(r"\\\n[\s#]*", " ", text)
    text = re.sub(r"(?<=\binstall)\s*\n[\s#]*", " ", text)
    for found in _COMMAND.finditer(_OWN_HINT.sub(";", text)):
        for word in found[1].split():
            word = word.strip("\"'()[],:.") if not word.strip("\"'(").startswith(".") else word.strip("\"'(")
            if word and not word.startswith("-"):
                yield word


def names_of_ours(text: str, name: str = "embedkit") -> list[str]:
    """The commands' targets, and other requirements in a text, that are the distribution `name` of an index."""
    found = [
        word for word in targets(text) if _name(word) == name and not word.startswith((".", "/", "$", "~"))
    ]
    return found + [match[0] for match in _REQUIREMENT.finditer(text)]


def _name(word: str) -> str:
    """The distribution in a requirement such as `Embed_Kit[hub]>=1`, or at the end of a URL."""
    word = re.split(r"[\[=<>~!;@#]", word.removesuffix("/").rpartition("/")[2].removesuffix(".git"))[0]
    return re.sub(r"[-_.]", "", word).lower()


def strings(source: str) -> Iterator[str]:
    """Every string of a Python program: adjacent, added and formatted parts joined, with `{}` for values."""
    tree = ast.parse(source)
    inside: set[int] = set()
    for node in ast.walk(tree):  # outer nodes come first
        if id(node) in inside:
            continue
        text = _text(node)
        if text is not None:
            inside |= {id(part) for part in ast.walk(node)}
            yield text


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        left = _text(node.left)
        return None if left is None else re.sub(r"%[-\d.]*[sdr]|%\(\w+\)s", HOLE, left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        left = _text(node.func.value)
        return None if left is None else re.sub(r"\{[^{}]*\}", HOLE, left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        separator, parts = _text(node.func.value), node.args[0] if node.args else None
        if separator is not None and isinstance(parts, (ast.List, ast.Tuple)):
            return separator.join(_text(part) or HOLE for part in parts.elts)
    return None
