"""`python -m i2v.data check PATH`: what a folder or table of clips holds, and why clips of it cannot be used."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from i2v.data.dataset import open_dataset
from i2v.data.filters import FILTERS
from i2v.data.folders import understand

EXAMPLES = 5  # of each reason; --json gives all
NOTHING_USABLE, MISTAKE = 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m i2v.data", description=(__doc__ or "").split(": ", 1)[1], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{check}")
    about = "decode every clip once and say what was understood and why each clip was dropped"
    check = commands.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_argument("path", type=Path, help="a clip, a folder, or a csv, tsv or jsonl table")
    check.add_argument("--num-frames", type=int, metavar="N", help="of a training clip (16; 1 if only pictures)")
    check.add_argument("--fps", type=float, metavar="N", help="frames a second (the clips' own)")
    check.add_argument("--stride", type=int, default=1, metavar="N", help="take every N-th of these frames (1)")
    check.add_argument("--keep", nargs="+", choices=FILTERS, default=(), metavar="FILTER",
                       help=f"do not drop for these reasons: {', '.join(FILTERS)}")  # fmt: skip
    check.add_argument("--json", action="store_true", help="for programs; every dropped file is listed")
    return parser


def shown(facts: dict[str, Any]) -> str:
    """A survey as text: counts, then the first files of each reason."""
    clip, lines = facts["clip"], [f"{facts['path']}: {facts['understood']}, {facts['listed']} listed"]
    rate = "their own frames" if clip["fps"] is None else f"{clip['fps']:g} frames a second"
    every = "" if clip["stride"] == 1 else f", every {clip['stride']}. of them"
    lines.append(f"  a training clip: {clip['num_frames']} frames, {rate}{every}")
    lines.append(f"  kept     {facts['kept']:>7}" + _without(facts["without_caption"]))
    lines.append(f"  dropped  {sum(facts['dropped'].values()):>7}")
    for reason, count in facts["dropped"].items():
        lines.append(f"    {reason:15} {count:>6}")
        files = [entry for entry in facts["files"] if entry["reason"] == reason]
        lines += [f"      {entry['file']}: {entry['detail']}" for entry in files[:EXAMPLES]]
        if count > EXAMPLES:
            lines.append(f"      and {count - EXAMPLES} more (--json lists all)")
    lines += [f"  ignored: {count} {what}" for what, count in facts["ignored"].items()]
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # file names may hold any bytes


def _without(count: int) -> str:
    return f", {count} of them without a caption" if count else ""


def run(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says. Exit code 0; 1 when no clip can be used."""
    given = _parser().parse_args(argv)
    listing = understand(given.path)
    frames = listing.usual_frames if given.num_frames is None else given.num_frames
    facts = open_dataset(listing, frames, given.fps, given.stride, keep=given.keep).survey()
    print(json.dumps(facts, indent=2) if given.json else shown(facts))
    return 0 if facts["kept"] else NOTHING_USABLE


def main() -> None:
    """Errors of the user and of files are one line on stderr and exit code 2."""
    try:
        sys.exit(run())
    except (ValueError, OSError) as error:
        print(f"python -m i2v.data: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("\npython -m i2v.data: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
