"""Shared behaviour of all scripts: one line for a mistake, its exit code, and outputs tested for writing."""

import os
from dataclasses import dataclass
from typing import Literal

import pytest

from flip_hf.console.endings import MAX_MESSAGE, Ended, end_with, one_line
from flip_hf.console.fields import OptionError, check_options, option
from flip_hf.console.files import read_text, try_file, try_folder
from flip_hf.console.parsers import OptionsParser, ScriptParser
from flip_hf.console.ranges import integer, number


def test_a_message_is_one_line_and_drives_no_terminal(capsys):
    assert one_line("a\n\n  b\tc") == "a b c"
    assert one_line("\x1b[31mred\x07\u202e") == "\\x1b[31mred\\x07\\u202e"
    assert len(one_line("x" * 10**6)) < MAX_MESSAGE + 10
    for error, code in ((OptionError("--x\nis bad."), 2), (ValueError("y"), 1), ("z", 1), (KeyError(), 1)):
        with pytest.raises(Ended) as ended:
            end_with(error)
        assert ended.value.code == code and capsys.readouterr().err == f"{ended.value}\n"
    assert str(ended.value) == "error: KeyError"


def test_an_unwritable_folder_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    for path in ("there", "new", "new/deep/er"):
        try_folder(tmp_path / path, "--out")
        try_file(tmp_path / path / "a.txt", "--out")
    try_file(tmp_path / "file", "--out")
    for path in ("file", "file/in", "file/in/deep", "dangling/x", "x" * 300, "pipe", "/proc/none", "/dev/null/x"):
        with pytest.raises(ValueError, match=f"--out .*{path[:20]}.* cannot be written"):
            try_folder(tmp_path / path, "--out")
    for path in ("there", "file/in", "x" * 300, "pipe", "/proc/none", "/dev/null"):
        with pytest.raises(ValueError, match="--out .*(cannot be (over)?written|is a folder)"):
            try_file(tmp_path / path, "--out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf12345")
    assert read_text(tmp_path / "a", "names", 8) == "12345"
    with pytest.raises(ValueError, match="too large for names: it has more than 7 bytes"):
        read_text(tmp_path / "a", "names", 7)


@dataclass
class Some:
    count: int = option(3, "a count", integer(1, 9, note="nine lives"))
    shares: list[float] = option([0.5], "shares", number(0, 1))
    name: Literal["a", "b"] | None = option(None, "a name")
    loud: bool = option(False, "whether")

    def __post_init__(self):
        check_options(self)


@dataclass
class MoreArguments:
    """Everything else, 100 % of it.

    A second paragraph.
    """

    long_name: int = option(7, "of a long name", integer(-9, 9))
    kept: bool = option(True, "whether it stays")


def test_options_are_checked_where_they_come_from_code_too():
    assert Some(count=9, shares=[0, 1.0], name="a") == Some(9, [0, 1.0], "a", False)
    for fields, message in (
        ({"count": 10}, "--count must be between 1 and 9, got 10: nine lives."),
        ({"count": 3.0}, "--count must be an integer between 1 and 9, got 3.0: nine lives."),
        ({"count": None}, "--count needs a value."),
        ({"shares": 0.5}, "--shares takes a list, got 0.5."),
        ({"shares": [0.5, float("nan")]}, "--shares must be a number between 0 and 1, got nan."),
        ({"name": "c"}, "--name is one of a, b, got 'c'."),
        ({"name": 3}, "--name must be text, got 3."),
        ({"loud": 1}, "--loud must be true or false, got 1."),
    ):
        with pytest.raises(OptionError) as caught:
            Some(**fields)
        assert str(caught.value) == message


def test_negative_numbers_of_any_form_are_numbers_and_options_are_not():
    parser = OptionsParser([Some])
    for word in ("-1", "-1e5", "-.5", "-inf", "-nan", "-NaN"):
        with pytest.raises(OptionError, match="^--shares must be"):
            parser.parse(["--shares", "0.5", word])
    with pytest.raises(OptionError, match="^--shares needs a value"):
        parser.parse(["--shares", "--count", "3"])
    assert parser.parse(["--shares", "1e-1", " 0.5", "--loud"]) == (Some(shares=[0.1, 0.5], loud=True),)
    script = ScriptParser(prog="x.py")
    script.add_argument("--low", type=number(-1e6, 0))
    group = script.add_argument_group("more")
    group.add_argument("--words", nargs="+", type=str)
    assert vars(script.parse_args(["--low", "-1e5", "--words", "a"])) == {"low": -1e5, "words": ["a"]}


def test_help_names_each_option_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        OptionsParser([Some, MoreArguments], prog="x.py").parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    assert "--shares N [N ...] shares (default: 0.5)" in printed
    assert "more: Everything else, 100 % of it. --long_name N of a long name (default: 7)" in printed
    assert "long-name" not in printed
    assert "--kept [BOOL] whether it stays (default: True) --no_kept the same as --kept false" in printed


def test_names_of_options_may_have_dashes():
    parser = OptionsParser([Some, MoreArguments])
    for words in (["--long-name", "-3"], ["--long-name=-3"], ["--long_name", "-3"]):
        assert parser.parse(words)[1].long_name == -3
    for words in (["--no-kept"], ["--no_kept"], ["--kept", "no"], ["--kept=false"]):
        assert not parser.parse(words)[1].kept
    with pytest.raises(OptionError, match="^there is no option --long-nome. Did you mean '--long_name'?"):
        parser.parse(["--long-nome", "3"])
    script = ScriptParser(prog="x.py")
    script.add_argument("--a_b", nargs="+")
    assert script.parse_args(["--a-b", "x-y", "--a_b=c-d"]).a_b == ["c-d"]
