"""`python -m weights_convert inspect | check | convert`: look into weight files and turn one format into another."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from weights_convert import check_file, convert_file, inspect_file
from weights_convert.known import LAYOUTS
from weights_convert.networks import FAMILIES
from weights_convert.rules import ConversionError

COMMANDS = ("inspect", "check", "convert")
PARTS = tuple(convert_file.KINDS)
DOES_NOT_FIT, MISTAKE = 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line with the nearest known word, exit code 2."""
        self.exit(MISTAKE, f"{self.prog}: error: {message}{self._nearest(message)}\n")

    def _nearest(self, message: str) -> str:
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        choices = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choices:
            word, known = choices[1], re.findall(r"[\w-]+", choices[2])
        else:
            unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
            word = unknown[1] if unknown else ""
        near = difflib.get_close_matches(word, known, 1, 0.5) if word else []
        return f"; did you mean {near[0]}?" if near else ""


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="python -m weights_convert", description=(__doc__ or "").split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{inspect,check,convert}")
    layouts = [layout.name for layout in LAYOUTS]
    made = {}
    for name, about in {
        "inspect": "what a file is: family, version, schedule, parameters, what it fits and what it lacks",
        "check": "whether every key of a file fits a base model; exit code 1 if not",
        "convert": "write a file or folder in another format",
    }.items():
        one = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="for programs")
        one.add_argument("--layout", choices=layouts, metavar="NAME", help="for a file that could be several")
        made[name] = one
    for name in ("inspect", "check"):
        made[name].add_argument("file", type=Path, help="a weight file, or a folder of one part or of a model")
    check, convert = made["check"], made["convert"]
    check.add_argument("--for", dest="family", choices=tuple(FAMILIES), help="the base model (required)")
    convert.add_argument("source", type=Path, metavar="SRC", help="a weight file, or a folder of a part or of a model")
    convert.add_argument("target", type=Path, metavar="DST", help="the folder or file to write")
    convert.add_argument("--to", choices=convert_file.TARGETS, metavar="LAYOUT",
                         help="required: own (our folder of part files), i2v-module (the authors'), diffusers (a "
                              "folder), or a layout of docs/weights.md")  # fmt: skip
    convert.add_argument("--for", dest="family", choices=tuple(FAMILIES), help="the base, where a file leaves it open")
    convert.add_argument("--parts", nargs="+", choices=PARTS, default=(), metavar="PART", help="only these parts")
    convert.add_argument("--dtype", choices=tuple(convert_file.DTYPES), help="number format; not given: as stored")
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")
    for one in (check, convert):
        one.add_argument("--no-ema", dest="ema", action="store_false",
                         help="of a UNet with a running average, take the last training step")  # fmt: skip
    return parser, made


def run(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit code."""
    parser, commands = _parser()
    given, rest = parser.parse_known_args(argv)
    if rest:
        commands[given.command].error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command == "check" and given.family is None:
        commands["check"].error(f"which base? give --for {' or --for '.join(FAMILIES)}")
    if given.command == "convert" and given.to is None:
        commands["convert"].error("into which format? give --to own, --to i2v-module, --to diffusers or --to LAYOUT")
    code = 0
    if given.command == "inspect":
        facts = inspect_file.inspect(given.file, given.layout)
        text = inspect_file.shown(facts)
        known = [one["recognised"] for one in facts.get("files", [facts])]
        code = 0 if all(known) else DOES_NOT_FIT
    elif given.command == "check":
        facts = check_file.check(given.file, given.family, given.layout, given.ema)
        text = check_file.shown(facts)
        code = 0 if facts["fits"] else DOES_NOT_FIT
    else:
        job = convert_file.Job(
            given.source, given.target, given.to, given.family, given.layout, tuple(given.parts),
            convert_file.DTYPES[given.dtype] if given.dtype else None, given.overwrite, given.ema,
        )  # fmt: skip
        facts = convert_file.convert(job)
        text = convert_file.shown(facts)
    print(json.dumps(facts, indent=2) if given.json else text)
    return code


def main() -> None:
    """Errors of the user and of files are one line on stderr and exit code 2."""
    try:
        sys.exit(run())
    except (ConversionError, ValueError, OSError) as error:
        text = re.sub(r"\s*\n\s*", "; ", str(error).strip()).replace(":;", ":")
        print(f"python -m weights_convert: error: {text}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("\npython -m weights_convert: stopped; no half-written file is left", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
