"""`python -m eval miniature` measures a model, `probe` the motion probe that judges it, `known-flow` flow metrics."""

from __future__ import annotations

import logging
import sys

from eval import known_flow, miniature, probe_ceiling

COMMANDS = {"miniature": miniature.main, "probe": probe_ceiling.main, "known-flow": known_flow.main}


def main(argv: list[str]) -> int:
    """The first word is the command, the rest its flags. Exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="python -m eval: %(message)s")
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: python -m eval {{{','.join(COMMANDS)}}} [flags]; each of them explains its flags with --help")
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"there is no evaluation {argv[0]!r}" if argv else "name an evaluation"
        return fail(f"{given}; known are {', '.join(COMMANDS)}")
    try:
        COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print("python -m eval: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # the errors that this project raises for what users gave
        return fail(" ".join(str(error).split()))
    return 0


def fail(message: str) -> int:
    print(f"python -m eval: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
