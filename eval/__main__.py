"""`python -m eval VIDEOS` measures videos of any origin; names of evaluations do other work, see COMMANDS."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path

from eval import compare, drawn_path, fault_rates, known_flow, long_video, miniature, probe_ceiling, reproduce
from eval.paper import TABLES
from i2v.free_memory import is_out_of_memory

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "miniature": miniature.main,
    "path": drawn_path.main,
    "long": long_video.main,
    "probe": probe_ceiling.main,
    "faults": fault_rates.main,
    "known-flow": known_flow.main,
    **{table: functools.partial(reproduce.main, table) for table in TABLES},
}


def main(argv: list[str]) -> int:
    """The first word is the command, the rest its flags; without one, videos are measured.

    Exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="python -m eval: %(message)s")
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        elif argv and not argv[0].startswith("-") and "=" not in argv[0] and not Path(argv[0]).exists():
            return fail(f"{argv[0]}: there are no such videos, and no such evaluation; known are {', '.join(COMMANDS)}")
        else:
            compare.main(argv)
    except KeyboardInterrupt:
        print("python -m eval: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # the errors that this project raises for what users gave
        return fail(" ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, BrokenExecutor) or is_out_of_memory(error)):
            raise
        return fail("out of memory (or a process was killed); give fewer --workers, smaller or shorter videos: what is "
                    "measured or made stays, the same command goes on")  # fmt: skip
    return 0


def fail(message: str) -> int:
    print(f"python -m eval: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
