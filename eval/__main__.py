"""`python -m eval miniature` measures a model, `python -m eval probe` the motion probe that judges it."""

from __future__ import annotations

import sys

from eval import miniature, probe_ceiling

COMMANDS = {"miniature": miniature.main, "probe": probe_ceiling.main}


def main(argv: list[str]) -> None:
    """The first word is the command; the rest are its flags."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: python -m eval {{{','.join(COMMANDS)}}} [flags]; each of them explains its flags with --help")
        return
    if not argv or argv[0] not in COMMANDS:
        given = f"there is no evaluation {argv[0]!r}" if argv else "name an evaluation"
        raise SystemExit(f"python -m eval: error: {given}; known are {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
