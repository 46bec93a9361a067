"""One word, one meaning: the options of all commands, as the parser has them."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main
from typer.models import OptionInfo
from typer.testing import CliRunner

from embedkit.cli import app, options
from embedkit.cli.options import label, output

#: Options whose help each command writes: what `-o` writes, and what `--label` is for.
OWN_HELP = {"--output", "--label"}
#: Verbs that an option which writes begins with.
VERBS = ("write", "draw", "copy", "link", "cache", "lock")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its name, such as `zoo list`."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield " ".join(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def infos(command: Any) -> dict[str, OptionInfo]:
    """Option -> its definition, from the annotations of the command's function."""
    found = {}
    function = command.callback
    function = getattr(function, "__wrapped__", function)
    for name, hint in get_type_hints(function, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                long = [one for one in names_of(info) if one.startswith("--")]
                found[long[0].partition("/")[0] if long else f"--{name.replace('_', '-')}"] = info
    return found


def names_of(info: OptionInfo) -> tuple[str, ...]:
    """As they were given: Typer takes the first one for the default value until it builds the parser."""
    return (*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ()))


ALL = dict(commands())


def test_an_option_of_several_commands_is_defined_once():
    uses: dict[str, dict[str, OptionInfo]] = defaultdict(dict)
    for name, command in ALL.items():
        for option, info in infos(command).items():
            uses[option][name] = info
    assert len(uses) > 80 and len(uses["--json"]) == len(ALL), "the options are found"
    for option, found in uses.items():
        if len(found) == 1:
            continue
        if option == "--zoo":  # the same words; commands that load an encoder look it up there, too
            assert {info.help for info in found.values()} == {options._ZOO}
        elif option in OWN_HELP:
            same = output("", "") if option == "--output" else label("")
            for info in found.values():
                assert names_of(info) == names_of(same), option
            assert option == "--output" or {info.metavar for info in found.values()} == {"COLUMN"}
        else:
            assert len({id(info) for info in found.values()}) == 1, (option, sorted(found))


def test_the_parser_agrees():
    """The same short form, metavar, kind and environment variable wherever an option is taken."""
    forms: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for command in ALL.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                metavar = None if "--output" in parameter.opts else parameter.metavar
                names = tuple(sorted((*parameter.opts, *parameter.secondary_opts)))
                for one in names:
                    forms[one].add((names, metavar, parameter.is_flag, parameter.envvar))
    assert {name: found for name, found in forms.items() if len(found) > 1} == {}


def test_arguments_are_named_alike():
    found = {
        parameter.metavar
        for command in ALL.values()
        for parameter in command.params
        if parameter.param_type_name == "argument"
    }
    assert {"EMB", "NAME", "QUERY", "SOURCE"} <= found
    assert all(one is not None and re.fullmatch(r"[A-Z]+(\.csv)?(\|[A-Z]+)*", one) for one in found), found


@pytest.mark.parametrize("name", ALL)
def test_every_command_takes_json_and_quiet(name):
    taken = {option for parameter in ALL[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= taken


@pytest.mark.parametrize("name", [name for name in ALL if "--encoder" in infos(ALL[name])])
def test_what_loads_an_encoder_is_told_alike_where_from(name):
    assert {"--zoo", "--token", "--local-files-only", "--device", "--threads"} <= set(infos(ALL[name]))


def test_what_is_written_begins_with_a_verb():
    """`-o`, or a verb: whatever a command checks as an output; and nothing that it checks as an input."""
    written, read = set(), set()
    for file in Path(options.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_outputs":
                written |= named(node.args[0])
                read |= set().union(*map(named, node.args[1:]))
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "outputs":
                written |= named(node.value)
    assert {"--output", "--write-pairs", "--draw-sheet"} <= written and {"--pairs", "--clusters"} <= read
    assert {one for one in written - {"--output"} if verb_of(one) not in VERBS} == set()
    assert {one for one in read if verb_of(one) in VERBS} == set() and not written & read


def named(node: ast.AST) -> set[str]:
    """The options that are keys of a dictionary."""
    keys = [key for one in ast.walk(node) if isinstance(one, ast.Dict) for key in one.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant) and str(key.value).startswith("--")}


def verb_of(option: str) -> str:
    return option.removeprefix("--").partition("-")[0]


def test_a_wrong_option_gets_the_near_one():
    for arguments, near in (
        (["cluster", "e.parquet", "--labels", "kind"], "--label"),
        (["search", "a.jpg", "e.parquet", "--neighbours", "3"], "--neighbors"),
        (["zoo", "list", "--local-file-only"], "--local-files-only"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and near in done.output, done.output


def test_one_zoo_is_named():
    done = CliRunner().invoke(app, ["search", "a.jpg", "e.parquet", "--zoo", "one,other"])
    assert done.exit_code == 2 and "one zoo" in done.output


def test_options_that_take_effect_by_themselves_end_with_the_command(monkeypatch, tmp_path, by_hand):
    """`--zoo` and `--local-files-only` are seen by whatever a command calls, and by nothing after it."""
    by_hand.TinyEntry().write(tmp_path / "zoo" / "linear-tiny.noise")
    by_hand.write_index(tmp_path / "zoo")
    monkeypatch.setenv("EMBEDKIT_ZOO", "before")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen = []
    monkeypatch.setattr(
        "embedkit.encoder.find_entry", lambda *_, **__: seen.append(dict(os.environ)) or 1 / 0
    )
    (tmp_path / "a.jpg").write_bytes(b"x")
    arguments = [
        "embed",
        str(tmp_path / "a.jpg"),
        "-o",
        str(tmp_path / "e.parquet"),
        "--encoder",
        "linear-tiny",
    ]
    CliRunner().invoke(app, [*arguments, "--zoo", str(tmp_path / "zoo"), "--local-files-only"])
    (environment,) = seen
    assert environment["EMBEDKIT_ZOO"] == str(tmp_path / "zoo") and environment["HF_HUB_OFFLINE"] == "1"
    assert os.environ["EMBEDKIT_ZOO"] == "before" and "HF_HUB_OFFLINE" not in os.environ


def test_an_entry_of_a_zoo_that_is_named(tmp_path, by_hand, monkeypatch):
    """An encoder of a zoo that nothing else names: embedded with, and searched with by the name in the file."""
    from PIL import Image

    by_hand.TinyEntry().write(tmp_path / "zoo" / "linear-tiny.noise")
    by_hand.write_index(tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for value in range(3):
        Image.new("RGB", (8, 8), (value * 90, 0, 255 - value * 90)).save(tmp_path / "images" / f"{value}.png")
    images = ["images", "-o", "e.parquet", "--encoder", "linear-tiny", "--threads", "1"]
    assert CliRunner().invoke(app, ["embed", *images]).exception is not None
    done = CliRunner().invoke(app, ["embed", *images, "--zoo", "zoo"])
    assert done.exit_code == 0, (done.output, done.exception)
    shutil.copy("images/0.png", "query.png")
    done = CliRunner().invoke(app, ["search", "query.png", "e.parquet", "-k", "1", "--zoo", "zoo"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == "query\tid\tcosine\nquery.png\timages/0.png\t1.0000\n"
