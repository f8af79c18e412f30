"""A dataclass as command line: both spellings, aliases, repeatable flags, files, and one-line errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from i2v import config
from i2v.config import ConfigError, flag, from_command_line, from_dict, to_dict


@dataclass(frozen=True)
class Example:
    """A config with a field of each kind."""

    data: Path = flag(Path("clips"), "folder")
    num_frames: int = flag(16, "how many", "-l", "--video-length", "--num-of-frames")
    scale: float | None = flag(None, "100 % or less")
    mode: Literal["left", "right"] = flag("left", "where to")
    color_match: bool = flag(False, "match")
    lora: tuple[str, ...] = flag((), "repeatable", "--loras")
    from_: Path | None = flag(None, "a reserved word")


def parse(*argv: str) -> Example:
    return from_command_line(Example, list(argv), "prog")


def test_defaults_flags_and_both_spellings() -> None:
    assert parse() == Example()
    assert parse("--num-frames", "8") == parse("--num_frames=8") == Example(num_frames=8)
    assert parse("--color_match").color_match and not parse("--color-match", "--no_color_match").color_match
    assert parse("--from", "a_b.mp4").from_ == Path("a_b.mp4"), "values keep their underscores"
    assert parse("--scale", "-1.5").scale == -1.5


@pytest.mark.parametrize("alias", ["-l", "--video-length", "--video_length", "--num_of_frames"])
def test_aliases_are_accepted_but_not_listed(alias: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(alias, "4").num_frames == 4
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--num-frames" in text and "--video-length" not in text and "100 %" in text


@dataclass(frozen=True)
class Inherited(Example):
    """Flags of its own and of another."""

    output: Path = flag(Path("a.mp4"), "where", group="video")
    speed: int = flag(1, "how fast", group="the machine")


def test_help_has_headings_and_a_programs_own_flags_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_command_line(Inherited, ["--help"], "prog")
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("\nvideo:\n", "--output", "\nthe machine:\n", "--speed", "--data")]
    assert places == sorted(places)


def test_repeatable_flags_add_up() -> None:
    assert parse("--lora", "a", "--loras", "b", "c").lora == ("a", "b", "c")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-frame", "8"], ["--num-frame", "did you mean --num-frames?"]),
        (["--video_lenght", "8"], ["--video_lenght", "did you mean --num-frames?"]),
        (["--xyzzy"], ["--xyzzy", "--help"]),
        (["--colour-match"], ["did you mean --color-match?"]),
        (["--no-colour-match"], ["did you mean --no-color-match?"]),
        (["--do-color-match"], ["did you mean --color-match?"]),  # and not the contrary, which is spelt more alike
        (["--data-dir", "clips"], ["did you mean --data?"]),
        (["--mode", "up"], ["--mode", "left", "right"]),
        (["--num-frames", "many"], ["--num-frames", "many"]),
        (["picture.png"], ["picture.png", "no flag"]),
        (["--num-frames"], ["--num-frames"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("prog: error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_file_then_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    config.save(Example(num_frames=4, lora=("a",), scale=2.0), file)
    assert parse("--config", str(file)) == Example(num_frames=4, lora=("a",), scale=2.0)
    assert parse("--config", str(file), "--num-frames", "5").num_frames == 5
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"], "no temporary file stays"
    for text, word in (('{"num_frame": 1}', "num_frames?"), ('{"scale": "x"}', "scale"), ("{", "json"), ("[]", "list")):
        file.write_text(text)
        with pytest.raises(SystemExit) as end:
            parse("--config", str(file))
        error = capsys.readouterr().err
        assert end.value.code == 2 and word in error and str(file) in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "none.json"))
    assert "no such file" in capsys.readouterr().err


def test_a_file_from_windows(tmp_path: Path) -> None:
    """Its editor writes a byte order mark."""
    path = tmp_path / "c.json"
    path.write_text('{"steps": 3}', encoding="utf-8-sig")
    assert config.read(path) == {"steps": 3}


def test_base_lies_between_defaults_and_flags() -> None:
    base = {"num_frames": 3, "scale": 2.0}
    assert from_command_line(Example, ["--scale", "4"], "prog", base) == Example(num_frames=3, scale=4.0)


def test_json_round_trip_and_types() -> None:
    example = Example(data=Path("x"), lora=("a", "b"), from_=Path("y"))
    assert from_dict(Example, json.loads(json.dumps(to_dict(example))), "test") == example
    assert from_dict(Example, {"data": "x", "lora": "a"}, "test").lora == ("a",)
    for values in ({"num_frames": 1.5}, {"num_frames": True}, {"mode": "up"}, {"lora": 1}, {"color_match": 1}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            from_dict(Example, values, "test")


def test_a_required_field_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Needs:
        out: int

    with pytest.raises(SystemExit):
        from_command_line(Needs, [], "prog")
    assert capsys.readouterr().err == "prog: error: missing --out\n"
