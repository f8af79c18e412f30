"""Checkpoint conversion as data: a list of rules from one naming to another, applied with every key accounted for.

A template names keys: `{x}` stands for one dotted part, `{x*}` for one part or more, `{x:regex}` for what the regex
matches; what was matched may be used in the target. The first rule that matches a key claims it, so special cases
stand before general ones. Nothing is implied: a key that no rule claims, a rule that claims nothing (unless
`optional`), a rule that claims another number of keys than `expect`, and two keys for one target are all errors, and
all of them are shown together. A key is dropped only by a rule that says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

FIELD = re.compile(r"\{(\w+)(\*|:(?:[^{}]|\{[^{}]*\})*)?\}")


class ConversionError(ValueError):
    """A file does not hold what its layout says. The message names the file, the keys and what was expected."""


@dataclass(frozen=True)
class Op:
    """A change of one tensor's value or shape on its way, and the way back."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]

    def inverted(self) -> Op:
        return Op(f"inverse of {self.name}", self.backward, self.forward)


def _squeeze(x: Tensor) -> Tensor:
    if x.ndim == 2:  # some exporters have squeezed it already
        return x
    if x.ndim != 4 or x.shape[2:] != (1, 1):
        raise ConversionError(f"expected the weight of a 1x1 convolution (out, in, 1, 1), got {tuple(x.shape)}")
    return x[:, :, 0, 0]


def _transpose(x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ConversionError(f"expected a matrix to transpose, got {tuple(x.shape)}")
    return x.T


SAME = Op("same", lambda x: x, lambda x: x)
TRANSPOSE = Op("transpose", _transpose, _transpose)
CONV_TO_LINEAR = Op("1x1 convolution to linear", _squeeze, lambda x: x[:, :, None, None])


class Piece(NamedTuple):
    """What a rule makes of a key: part `part` of `parts` row blocks of the tensor `target`."""

    target: str
    part: int
    parts: int
    make: Callable[[Tensor], Tensor]


@lru_cache(maxsize=65536)
def _regex(template: str) -> re.Pattern[str]:
    pattern, end = "", 0
    for field in FIELD.finditer(template):
        kind = field[2] or ""
        inner = ".+" if kind == "*" else kind[1:] or "[^.]+"
        pattern += re.escape(template[end : field.start()]) + f"(?P<{field[1]}>{inner})"
        end = field.end()
    return re.compile(pattern + re.escape(template[end:]))


def match(template: str, key: str) -> dict[str, str] | None:
    """The values of the template's fields, or None."""
    found = _regex(template).fullmatch(key)
    return None if found is None else found.groupdict()


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields replaced."""
    return FIELD.sub(lambda field: values[field[1]], template)


def _with_kinds(template: str, of: str) -> str:
    """`template` with its fields restricted as in `of`, so that an inverted rule matches no more than it should."""
    kinds = {field[1]: field[0] for field in FIELD.finditer(of)}
    return FIELD.sub(lambda field: kinds.get(field[1], field[0]), template)


@dataclass(frozen=True)
class Rename:
    """One key to one key, its tensor changed by `op`."""

    source: str
    target: str
    op: Op = SAME
    expect: int | None = None
    optional: bool = False

    def claim(self, key: str) -> list[Piece] | None:
        values = match(self.source, key)
        return None if values is None else [Piece(fill(self.target, values), 0, 1, self.op.forward)]

    def inverted(self) -> Rename:
        return replace(self, source=_with_kinds(self.target, self.source), target=self.source, op=self.op.inverted())

    def prefixed(self, source: str, target: str) -> Rename:
        return replace(self, source=source + self.source, target=target + self.target)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Lookup:
    """Keys whose names only a table leads back to names that `rules` know, e.g. with all dots gone. Never written."""

    table: Mapping[str, str]
    rules: tuple[Rename, ...]
    what: str  # the names in the table, for the report

    optional = False

    @property
    def expect(self) -> int:
        return len(self.table)

    def claim(self, key: str) -> list[Piece] | None:
        if key not in self.table:
            return None
        return next((p for rule in self.rules if (p := rule.claim(self.table[key])) is not None), None)

    def inverted(self) -> None:
        return None

    def prefixed(self, source: str, target: str) -> Lookup:
        table = {source + key: name for key, name in self.table.items()}
        return replace(self, table=table, rules=tuple(rule.prefixed("", target) for rule in self.rules))

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Split:
    """One key to several: equal blocks of rows, in the order of `targets` (a fused q, k, v projection)."""

    source: str
    targets: tuple[str, ...]
    expect: int | None = None
    optional: bool = False

    def claim(self, key: str) -> list[Piece] | None:
        values = match(self.source, key)
        if values is None:
            return None
        return [Piece(fill(t, values), 0, 1, self._block(i)) for i, t in enumerate(self.targets)]

    def _block(self, i: int) -> Callable[[Tensor], Tensor]:
        count = len(self.targets)

        def take(x: Tensor) -> Tensor:
            if not x.ndim or x.shape[0] % count:
                raise ConversionError(f"expected {count} equal blocks of rows, got {tuple(x.shape)}")
            rows = x.shape[0] // count
            return x[i * rows : (i + 1) * rows]

        return take

    def inverted(self) -> Join:
        sources = tuple(_with_kinds(t, self.source) for t in self.targets)
        expect = None if self.expect is None else self.expect * len(sources)
        return Join(sources, self.source, expect, self.optional)

    def prefixed(self, source: str, target: str) -> Split:
        return replace(self, source=source + self.source, targets=tuple(target + t for t in self.targets))

    def __str__(self) -> str:
        return f"{self.source} -> {', '.join(self.targets)}"


@dataclass(frozen=True)
class Join:
    """Several keys to one, row block under row block: the inverse of `Split`."""

    sources: tuple[str, ...]
    target: str
    expect: int | None = None
    optional: bool = False

    def claim(self, key: str) -> list[Piece] | None:
        for i, source in enumerate(self.sources):
            values = match(source, key)
            if values is not None:
                return [Piece(fill(self.target, values), i, len(self.sources), SAME.forward)]
        return None

    def inverted(self) -> Split:
        targets = tuple(self.sources)
        expect = None if self.expect is None else self.expect // len(targets)
        return Split(_with_kinds(self.target, targets[0]), targets, expect, self.optional)

    def prefixed(self, source: str, target: str) -> Join:
        return replace(self, sources=tuple(source + s for s in self.sources), target=target + self.target)

    def __str__(self) -> str:
        return f"{', '.join(self.sources)} -> {self.target}"


@dataclass(frozen=True)
class Drop:
    """A key that is read and not kept, for the reason given."""

    source: str
    why: str
    expect: int | None = None
    optional: bool = True

    def __post_init__(self) -> None:
        if not self.why:
            raise ValueError(f"dropping {self.source!r} needs a reason")

    def claim(self, key: str) -> list[Piece] | None:
        return None if match(self.source, key) is None else []

    def inverted(self) -> None:
        return None

    def prefixed(self, source: str, target: str) -> Drop:
        return replace(self, source=source + self.source)

    def __str__(self) -> str:
        return f"{self.source} dropped: {self.why}"


@dataclass(frozen=True)
class Rebuild:
    """A key that follows from another one, `beside` (both in the layout's names): not stored, made when written.

    With `check`, a stored value that is not what `build` makes of its neighbour is an error; tensors on the meta
    device are compared in shape only.
    """

    source: str
    beside: str
    build: Callable[[Tensor], Tensor]
    why: str
    check: bool = True
    longer: bool = False  # a stored table may have more rows (its second dimension)
    expect: int | None = None
    optional: bool = True
    written: bool = False  # the inverted rule: writes `source` for each `beside`, claims nothing

    def claim(self, key: str) -> list[Piece] | None:
        return None if self.written or match(self.source, key) is None else []

    def inverted(self) -> Rebuild:
        return replace(self, written=not self.written)

    def prefixed(self, source: str, target: str) -> Rebuild:
        start = target if self.written else source
        return replace(self, source=start + self.source, beside=start + self.beside)

    def fault(self, key: str, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the stored value, if anything."""
        values = match(self.source, key) or {}
        neighbour = fill(self.beside, values)
        if neighbour not in tensors:
            return f"{key}: belongs beside {neighbour}, which is not there"
        if not self.check:
            return None
        stored, built = tensors[key], self.build(tensors[neighbour])
        if self.longer and stored.ndim == built.ndim:
            stored = stored[:, : built.shape[1]]
        if stored.shape != built.shape:
            return f"{key}: shape {tuple(stored.shape)}, expected {tuple(built.shape)} ({self.why})"
        if stored.is_meta or built.is_meta or torch.allclose(stored.double(), built.double(), atol=2e-3):
            return None
        return f"{key}: its values are not what was expected ({self.why})"

    def __str__(self) -> str:
        return f"{self.source} rebuilt: {self.why}"


Rule = Rename | Lookup | Split | Join | Drop | Rebuild


def prefixed(rules: Iterable[Rule], source: str = "", target: str = "") -> list[Rule]:
    """The same rules for names that carry a prefix."""
    return [rule.prefixed(source, target) for rule in rules]


def inverted(rules: Iterable[Rule]) -> list[Rule]:
    """The rules of the way back. What was dropped stays dropped; what is rebuilt is written again."""
    return [back for rule in rules if (back := rule.inverted()) is not None]


def convert(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], layout: str, file: str = "this file"
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Apply `rules` to a file's tensors.

    Returns the renamed tensors and how many keys each rule (in words) claimed. `layout` and `file` are for the
    message. Raises ConversionError with every problem found.
    """
    out, report, problems = account(tensors, rules)
    if problems:
        advice = "expected every key once: take the whole file anew; python -m weights_convert check lists everything"
        raise ConversionError(f"{file}: not what the layout {layout!r} describes, {listed(problems, 4)}\n{advice}")
    return out, report


def account(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], Counter[str], list[str]]:
    """What `convert` does, with the problems as the third value instead of an error."""
    problems: list[str] = []
    used: Counter[int] = Counter()
    found: dict[str, dict[int, tuple[str, Tensor]]] = {}
    parts: dict[str, int] = {}
    for key, tensor in tensors.items():
        number, pieces = next(((n, p) for n, r in enumerate(rules) if (p := r.claim(key)) is not None), (-1, []))
        if number < 0:
            problems.append(f"{key} {tuple(tensor.shape)}: no rule claims it")
            continue
        used[number] += 1
        rule = rules[number]
        if isinstance(rule, Rebuild) and (fault := rule.fault(key, tensors)):
            problems.append(fault)
        for piece in pieces:
            slots = found.setdefault(piece.target, {})
            if piece.part in slots or parts.setdefault(piece.target, piece.parts) != piece.parts:
                problems.append(f"{key}: {piece.target} was already written from {next(iter(slots.values()))[0]}")
                continue
            try:
                slots[piece.part] = (key, piece.make(tensor))
            except ConversionError as error:
                problems.append(f"{key}: {error}")
    out: dict[str, Tensor] = {}
    for target, slots in found.items():
        if len(slots) == parts[target]:
            blocks = [slots[i][1] for i in range(parts[target])]
            out[target] = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        elif slots:
            problems.append(f"{target}: {len(slots)} of its {parts[target]} blocks are there, the last is {slots}")
    for number, rule in enumerate(rules):
        if isinstance(rule, Rebuild) and rule.written:
            for key in [k for k in out if match(rule.beside, k) is not None]:
                out[fill(rule.source, match(rule.beside, key) or {})] = _like(rule.build(out[key]), out[key])
        elif rule.expect is not None and used[number] != rule.expect:
            problems.append(f"rule {rule}: claimed {used[number]} keys, expected {rule.expect}")
        elif not used[number] and not rule.optional:
            problems.append(f"rule {rule}: matched nothing, expected at least one key")
    return out, Counter({str(rules[n]): count for n, count in used.items()}), problems


def _like(made: Tensor, beside: Tensor) -> Tensor:
    """Floats in the number format of their neighbour, as published files have them; 8 bits would not hold them."""
    return made.to(beside.dtype) if made.is_floating_point() and beside.dtype.itemsize > 1 else made


def listed(problems: Sequence[str], most: int = 20) -> str:
    more = f"\n  ... and {len(problems) - most} more" if len(problems) > most else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(problems[:most]) + more


def check_shapes(want: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ConversionError unless both hold the same keys and shapes; `what` names the file and its part."""
    missing = [f"{k}: missing, expected {tuple(want[k].shape)}" for k in want if k not in tensors]
    problems = [f"{k} {tuple(tensors[k].shape)}: the model has no such parameter" for k in tensors if k not in want]
    problems += [
        f"{k}: file {tuple(tensors[k].shape)}, model {tuple(want[k].shape)}"
        for k in want
        if k in tensors and tensors[k].shape != want[k].shape
    ]
    if missing or problems:
        part = f"it holds {len(want) - len(missing)} of the {len(want)} tensors; " if missing else ""
        advice = f"{part}expected the model's own: give a whole file that was made for this model"
        raise ConversionError(f"{what}: does not fit the model, {listed(missing + problems)}\n{advice}")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Puts `tensors` into a module (built on the meta device or not) after checking every key and shape.

    The tensors themselves become the parameters, in the file's dtype. `what` names the file and its part in the
    message. Raises ConversionError with every missing and unexpected key and every other shape.
    """
    check_shapes(module.state_dict(), tensors, what)
    module.load_state_dict(dict(tensors), assign=True)
