"""A frozen dataclass is the config: its fields are the command line, its values travel with every output.

A field is declared with `flag(default, "help", "--alias", ...)`. Supported types: bool, int, float, str, Path, Literal,
`tuple[T, ...]` (a repeatable flag) and each of them `| None`. Later sources win: defaults, `--config FILE.json`, flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from i2v.media.output_file import write_whole

C = TypeVar("C")
ALIKE = 0.6  # how much a word must be like another to be taken for a slip, 0 .. 1


class ConfigError(ValueError):
    """A setting that the user can put right; the text says what was given, what was expected and what to do."""


def flag(default: Any, help_text: str, *aliases: str, group: str = "") -> Any:
    """A dataclass field with its help text; aliases are flag names of other projects, accepted but not listed.

    group: a heading of `--help`, for this flag and those after it.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "aliases": aliases, "group": group})


def _kind(hint: Any) -> tuple[Any, bool]:
    """T | None -> (T, True)."""
    options = [a for a in get_args(hint) if a is not NoneType]
    if NoneType in get_args(hint):
        return options[0], True
    return hint, False


def _spell(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # a field `from_` is the flag --from


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, ALIKE)
    return f", did you mean {near[0]}?" if near else ""


def _checked(value: Any, hint: Any, what: str) -> Any:
    """The value in its field's type, or a ConfigError that names the field."""
    kind, optional = _kind(hint)
    if value is None and optional:
        return None
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            near = _nearest(str(value), [str(c) for c in choices])
            raise ConfigError(f"{what}: {value!r} is not one of {', '.join(map(str, choices))}{near}")
        return value
    if get_origin(kind) is tuple:
        value = [value] if isinstance(value, str) else value  # one file alone needs no brackets
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{what} takes a list, got {value!r}")
        return tuple(_checked(v, get_args(kind)[0], what) for v in value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{what} takes a value of type {kind.__name__}, got {value!r}")
    return value


def from_dict(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """A config from plain values, as json gives them; `where` names their source in errors.

    Raises ConfigError for a name that the config does not have (with the nearest one) and for a wrong type or choice.
    """
    return cls(**_checked_all(cls, values, where))


def _checked_all(cls: type, values: Mapping[str, Any], where: str | None) -> dict[str, Any]:
    """The values in their fields' types; `where` names their source, None the command line."""
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: there is no setting {key!r}{_nearest(key, names)}")
    called = {key: _spell(key) if where is None else f"{where}: {key}" for key in values}
    return {key: _checked(value, hints[key], called[key]) for key, value in values.items()}


def to_dict(config: Any) -> dict[str, Any]:
    """The fields as values that json can hold."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def save(config: Any, path: Path) -> None:
    """Write the config as json, complete or not at all."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The settings of a json file, as plain values; raises ConfigError where it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid json: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds a {type(values).__name__}, expected an object of settings")
    return values


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, sync, rename: nobody sees half a file."""
    write_whole(path, text.encode("utf-8"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser(cls: type, prog: str | None) -> _Parser:
    # argument_default=SUPPRESS: only flags that were given appear, so that they alone override --config
    about = (cls.__doc__ or "").split("\n\n")[0]
    parser = _Parser(prog=prog, usage="%(prog)s FLAGS", description=about, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="json with any of the settings below")
    hints, group = get_type_hints(cls), parser._optionals
    # a program's own flags first, then those that it shares with others
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        kind, optional = _kind(hints[f.name])
        unset = f.default is dataclasses.MISSING or (optional and f.default is None)
        shown = "" if unset or f.default in ((), "") else f" (default {f.default})"
        options: dict[str, Any] = {"help": (f.metadata.get("help", "") + shown).replace("%", "%%"), "dest": f.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            choices = get_args(kind)  # checked in from_dict, which names the nearest one
            options |= {"type": type(choices[0]), "metavar": f"{{{','.join(map(str, choices))}}}"}
        elif get_origin(kind) is tuple:
            options |= {"type": get_args(kind)[0], "nargs": "+", "action": "extend", "metavar": "VALUE"}
        else:
            options |= {"type": kind, "metavar": {Path: "FILE", str: "TEXT"}.get(kind, "N")}
        if f.metadata.get("group"):
            group = parser.add_argument_group(f.metadata["group"])
        group.add_argument(_spell(f.name), **options)
    return parser


def _canonical(argv: Sequence[str], cls: type, parser: _Parser) -> list[str]:
    """Flags with `-` for `_` and aliases replaced; an unknown one ends the program with the nearest known."""
    known = {s: s for action in parser._actions for s in action.option_strings}
    aliases = {alias: _spell(f.name) for f in dataclasses.fields(cls) for alias in f.metadata.get("aliases", ())}
    out: list[str] = []
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        number = re.fullmatch(r"-[\d.].*", token)
        if not token.startswith("-") or token == "-" or " " in name or number:
            out.append(token)  # a value
            continue
        if token == "--":
            return out + list(argv[i:])
        wanted = "-" * (len(name) - len(name.lstrip("-"))) + name.lstrip("-").replace("_", "-")
        found = known.get(wanted) or aliases.get(wanted)
        if found is None:
            words = {word.lstrip("-"): flag for word, flag in (aliases | known).items()
                     if wanted.startswith("--no-") or not word.startswith("--no-")}  # fmt: skip
            near = difflib.get_close_matches(wanted.lstrip("-"), words, 1, ALIKE)
            hint = f", did you mean {words[near[0]]}?" if near else "; --help lists them all"
            parser.error(f"there is no flag {name}{hint}")
        out.append(found + equals + value)
    return out


def from_command_line(
    cls: type[C], argv: Sequence[str] | None = None, prog: str | None = None, base: Mapping[str, Any] | None = None,
    stray: str = "values with spaces need quotes",
) -> C:  # fmt: skip
    """A config from defaults, then `base`, then `--config FILE`, then flags. Every field is a flag, `-` or `_`.

    stray: what is told of words that belong to no flag.

    A wrong flag or value ends the program with one line on stderr and exit code 2.
    """
    parser = _parser(cls, prog)
    argv = sys.argv[1:] if argv is None else argv
    given, rest = parser.parse_known_args(_canonical(argv, cls, parser))
    if rest:
        parser.error(f"{' '.join(rest)!r} belongs to no flag; {stray}")
    flags = vars(given)
    path = flags.pop("config", None)
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
    try:
        in_file = _checked_all(cls, read(path), str(path)) if path else {}
        values = {**(base or {}), **in_file, **flags}
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
        missing = [_spell(name) for name in required if name not in values]
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        return cls(**_checked_all(cls, values, None))
    except ConfigError as error:
        parser.error(str(error))
