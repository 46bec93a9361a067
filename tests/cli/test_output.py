"""The output module: tables for a terminal and for a pipe, JSON, notes, and what `--quiet` leaves."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import servers

from embedkit.cli import output
from embedkit.cli.output import Id, Number, print_json, print_table

LONG = "photographs/2019/" + "x" * 80 + "/DSC_0001.jpg"
COLUMNS = [Number("row"), Id("id"), Number("cosine", ".3f"), "note"]
ROWS = [(1, "b.jpg", 0.5, "a\tb\x1b[31m"), (10, "画像.jpg", 1, None), (100, LONG, None, "")]
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """Print a table on a terminal of 60 columns: `shown(columns, rows)` -> its lines."""
    for name, value in {"COLUMNS": "60", "NO_COLOR": "", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)

    def call(columns, rows, encoding: str = "utf-8", error: type[Exception] | None = None) -> list[str]:
        screen = Terminal()
        screen.encoding = encoding
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            if error is None:
                print_table(columns, rows)
            else:
                with pytest.raises(error):
                    print_table(columns, rows)
        return screen.getvalue().splitlines()

    return call


def test_a_pipe_gets_whole_cells_between_tabs_below_a_heading(capsys):
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out == (
        f"row\tid\tcosine\tnote\n1\tb.jpg\t0.500\ta\\tb\\x1b[31m\n10\t画像.jpg\t1.000\t\n100\t{LONG}\t\t\n"
    )


def test_a_pipe_gets_rows_as_they_come_and_a_heading_without_any(capsys):
    def rows():
        yield 1, "a", 0.0, "n"
        assert capsys.readouterr().out.count("\n") == 2
        yield 2, "b", 0.0, "n"

    print_table(COLUMNS, rows())
    print_table(COLUMNS, [])
    assert capsys.readouterr().out.splitlines() == ["2\tb\t0.000\tn", "row\tid\tcosine\tnote"]


def test_a_terminal_gets_aligned_columns_and_ids_shortened_in_the_middle(shown):
    head, *lines = shown(COLUMNS, ROWS)
    # 60 columns: 3 + 2 + id + 2 + 6 + 2 + 12 for the note with its escapes, so 33 for the id.
    assert head == f"\x1b[1mrow  {'id':<33}  cosine  note\x1b[0m"
    assert (
        lines
        == [
            f"  1  {'b.jpg':<33}   0.500  a\\tb\\x1b[31m",
            f" 10  画像.jpg{' ' * (33 - 8)}   1.000  -",  # each of the two letters takes two columns
            f"100  {LONG[:16]}…{LONG[-16:]}       -  -",
        ]
    )


def test_a_terminal_that_is_too_narrow_keeps_texts_and_numbers_whole(shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    _, first, _, last = shown(COLUMNS, ROWS)
    assert first.endswith("0.500  a\\tb\\x1b[31m") and last.split()[1] == LONG[:8] + "…" + LONG[-7:]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_styles_where_they_are_not_wanted(shown, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not any("\x1b" in line for line in shown(COLUMNS, ROWS))


def test_a_mark_that_the_terminal_has(shown):
    (_, line) = shown([Id("id")], [(LONG,)], encoding="ascii")
    assert len(line) == 60 and line == LONG[:29] + "..." + LONG[-28:]


def test_rows_are_printed_on_a_terminal_when_the_next_one_fails(shown):
    def rows():
        yield ("done",)
        raise ValueError

    assert shown(["entry"], rows(), error=ValueError)[1:] == ["done"]


def test_json_is_strict_and_ascii(capsys):
    print_json(
        {"a": float("nan"), "b": [np.float32(0.5), np.arange(2)], "c": Path("é\x7f"), "d": (1, np.inf)}
    )
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None, "b": [0.5, [0, 1]], "c": "é\x7f", "d": [1, None]
    }  # fmt: skip
    assert text.isascii() and "\x7f" not in text


def test_quiet_silences_notes_and_neither_warnings_nor_errors(capsys):
    output.set_quiet(True)
    try:
        output.tell("note")
        output.warn("found")
        output.tell_error("cannot")
    finally:
        output.set_quiet(False)
    output.tell("note\n\x1b")
    assert capsys.readouterr().err.splitlines() == [
        "embedkit: warning: found",
        "embedkit: cannot",
        "embedkit: note\\n\\x1b",
    ]


def test_quiet_on_a_terminal_draws_no_bar_and_tells_nothing(by_hand, tmp_path):
    """A pull from a site, whose bar would be drawn, and its license told."""
    by_hand.TinyEntry().write(tmp_path / "zoo" / "linear-tiny.noise")
    by_hand.write_index(tmp_path / "zoo")
    site = servers.site(tmp_path / "zoo")
    command = [
        sys.executable,
        "-c",
        "from embedkit.cli import main; main()",
        "zoo",
        "pull",
        "--zoo",
        site.url,
    ]
    shown = {}
    for words in ((), ("--quiet",)):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "EMBEDKIT_CACHE": str(tmp_path / f"cache{len(words)}"), "TERM": "xterm"}
        done = subprocess.run(
            [*command, *words], stderr=theirs, stdout=subprocess.PIPE, text=True, env=environment
        )
        os.write(theirs, b"end\n")
        assert done.returncode == 0 and "linear-tiny.noise\t" in done.stdout
        shown[words] = os.read(ours, 1 << 16).decode()
        os.close(ours)
        os.close(theirs)
    site.close()
    assert "license CC0-1.0" in shown[()] and "\x1b[" in shown[()]  # the bar moves the cursor
    assert shown["--quiet",] == "end\r\n"


def test_a_real_terminal_and_a_real_pipe(tmp_path):
    """`zoo list` on a pseudo-terminal is aligned and bold; in a pipe neither, and with NO_COLOR only aligned."""
    command = [sys.executable, "-c", "from embedkit.cli import main; main()", "zoo", "list", "supervised-*"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "70"}
    environment.pop("NO_COLOR", None)

    def on_terminal(**more: str) -> str:
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stdout=theirs, env={**environment, **more}) as child:
            os.close(theirs)
            text = b""
            while True:
                try:
                    part = os.read(ours, 1 << 16)
                except OSError:  # Linux: the other end is closed
                    break
                if not part:
                    break
                text += part
            os.close(ours)
        assert child.returncode == 0
        return text.decode().replace("\r\n", "\n")

    piped = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    shown = on_terminal()
    assert shown.startswith("\x1b[1mname ") and "\t" not in shown
    assert "\x1b" not in piped and piped.startswith("name\tentry\tkind\tdim\t")
    plain = on_terminal(NO_COLOR="1")
    assert "\x1b" not in plain and plain == ESCAPES.sub("", shown)
    assert len(plain.splitlines()) == len(piped.splitlines())
