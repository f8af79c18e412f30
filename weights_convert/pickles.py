"""Reads a pickle as data: an interpreter of its opcodes that calls nothing and imports nothing.

Python's own unpickler imports whatever the stream names and calls it, so that a pickle is a program. Here a name is
looked up in the tables of `pickle_names`: the few that make tensors and dicts are built by this package's own
functions, names that training tools leave in checkpoints become placeholders, every other name ends the reading.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from typing import Any

from weights_convert.pickle_names import Known, Name, PickleError, Placeholder, lookup

MAX_BYTES = 32 * 2**20  # of one pickle; SDXL with its optimiser needs 2 MB
MAX_INTEGER = 1024  # bytes


_I4, _U2, _U4, _U8, _F8 = (struct.Struct(form) for form in ("<i", "<H", "<I", "<Q", ">d"))


def load(data: Any, start: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """The value of the pickle that starts at byte `start` of `data`, and where it ends.

    `persistent` turns what the pickle says about a storage into the storage. Only what torch writes is understood:
    protocols 2 to 5 without shared buffers. Raises PickleError, which says what was found and expected.
    """
    collecting = gc.isenabled()
    gc.disable()  # what is made here stays, but making it would have the collector look through all objects of torch
    try:
        return _Reader(data, start, persistent).run()
    finally:
        if collecting:
            gc.enable()


class _Reader:
    """A checkpoint has some 30 opcodes a tensor: what every one of them does is kept to few calls."""

    def __init__(self, data: Any, start: int, persistent: Callable[[Any], Any]) -> None:
        self.data, self.at = memoryview(data)[: start + MAX_BYTES], start
        self.persistent = persistent
        self.stack: list[Any] = []  # since the last MARK
        self.outer: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        try:
            while True:
                code = self.data[self.at]
                self.at += 1
                if code == STOP:
                    return self.pop(), self.at
                action = ACTIONS[code]
                if action is None:
                    found = f"opcode {bytes([code])!r} at byte {self.at - 1}"
                    raise PickleError(f"{found}, expected those that torch writes")
                action(self)
        except (IndexError, struct.error):  # of `byte` and `number`
            raise self.cut_off() from None

    def cut_off(self) -> PickleError:
        return PickleError(f"no end of the pickle within {len(self.data):,} bytes, expected a STOP")

    def byte(self) -> int:
        found = self.data[self.at]
        self.at += 1
        return found

    def number(self, form: struct.Struct) -> Any:
        (found,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return found

    def take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.cut_off()
        return self.data[begin : self.at].tobytes()

    def line(self) -> str:
        found, end, _ = self.data[self.at : self.at + 500].tobytes().partition(b"\n")
        if not end:
            raise PickleError("a name without an end, expected at most 500 bytes")
        self.at += len(found) + 1
        return _text(found)

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("an empty stack, expected a value")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise PickleError("an empty stack, expected a value")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.outer:
            raise PickleError("no mark on the stack, expected one")
        found, self.stack = self.stack, self.outer.pop()
        return found

    def remember(self, place: int) -> None:
        self.memo[place] = self.top()

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise PickleError(f"memo entry {place}, expected one that was stored before")
        self.stack.append(self.memo[place])

    def integer(self, length: int) -> None:
        if not 0 <= length <= MAX_INTEGER:
            raise PickleError(f"an integer of {length} bytes, expected at most {MAX_INTEGER}")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def text(self, length: int) -> None:
        self.stack.append(_text(self.take(length)))

    def tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("an empty stack, expected a value")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise PickleError(f"items for a {_kind(target)}, expected a list")

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, set):
            target.update(_key(item) for item in items)
        elif not isinstance(target, Placeholder):
            raise PickleError(f"members for a {_kind(target)}, expected a set")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"{len(items)} keys and values for a {_kind(target)}, expected pairs for a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _key(key) in target:
                raise PickleError(f"the key {str(key)[:80]!r} twice in one dict, expected it once")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a name that is no text, expected module and name")
        self.push(lookup(module, name))

    def call(self, function: Any, arguments: Any) -> None:
        """Nothing is called but the functions of our own table; a placeholder stays one."""
        if not isinstance(arguments, tuple):
            raise PickleError(f"a {_kind(arguments)} as arguments, expected a tuple")
        if isinstance(function, Known):
            self.push(function.build(arguments))
        elif isinstance(function, Name):
            self.push(Placeholder(str(function)))
        else:
            raise PickleError(f"a call of a {_kind(function)}, expected the name of a type")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Placeholder):
            target.take_state(state)
        elif not isinstance(target, dict):  # an OrderedDict's state is `_metadata`, versions of modules: not wanted
            raise PickleError(f"a state for a {_kind(target)}, expected one for an object")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # raw bytes that Python 2 called a string


def _kind(value: Any) -> str:
    return str(value)[:80] if isinstance(value, (Name, Placeholder)) else type(value).__name__


_KEYS = (str, bytes, int, float, type(None), Name, Placeholder, Known)


def _key(value: Any) -> Any:
    """`value` if it can be a key: hashing a deeply nested tuple would overrun the C stack."""
    if isinstance(value, _KEYS) or (isinstance(value, tuple) and all(isinstance(v, _KEYS) for v in value)):
        return value
    raise PickleError(f"a {_kind(value)} as a key, expected a text, a number or a name")


def _stack_global(r: _Reader) -> None:
    name, module = r.pop(), r.pop()
    r.name(module, name)


def _reduce(r: _Reader) -> None:
    arguments, function = r.pop(), r.pop()
    r.call(function, arguments)


def _newobj_ex(r: _Reader) -> None:
    r.pop()  # keywords
    _reduce(r)


def _obj(r: _Reader) -> None:
    items = r.since_mark()
    if not items:
        raise PickleError("an object without its type, expected one")
    r.call(items[0], tuple(items[1:]))


def _inst(r: _Reader) -> None:
    module, name = r.line(), r.line()
    r.name(module, name)
    r.call(r.pop(), tuple(r.since_mark()))


def _set_item(r: _Reader) -> None:
    value, key = r.pop(), r.pop()
    r.set_items([key, value])


def _dict(r: _Reader) -> None:
    items = r.since_mark()
    r.push({})
    r.set_items(items)


def _frozenset(r: _Reader) -> None:
    r.push(frozenset(_key(item) for item in r.since_mark()))


def _protocol(r: _Reader) -> None:
    if not 2 <= (found := r.byte()) <= 5:
        raise PickleError(f"a pickle of protocol {found}, expected 2 to 5")


def _pop(r: _Reader) -> None:
    if r.outer and not r.stack:
        r.since_mark()
    else:
        r.pop()


STOP = ord(".")
# The codes are those of the pickletools module. Not here, and so refused: protocol 0's texts, EXT (a global registry of
# names), PERSID and NEXT_BUFFER, which torch never writes.
OPCODES: dict[bytes, Callable[[_Reader], Any]] = {
    b"\x80": _protocol,
    b"\x95": lambda r: r.take(8),  # FRAME: only a hint
    b"(": _Reader.mark,
    b"0": _pop,
    b"1": _Reader.since_mark,
    b"2": lambda r: r.push(r.top()),
    b"N": lambda r: r.stack.append(None),
    b"\x88": lambda r: r.stack.append(True),
    b"\x89": lambda r: r.stack.append(False),
    b"J": lambda r: r.stack.append(r.number(_I4)),
    b"K": lambda r: r.stack.append(r.byte()),
    b"M": lambda r: r.stack.append(r.number(_U2)),
    b"\x8a": lambda r: r.integer(r.byte()),
    b"\x8b": lambda r: r.integer(r.number(_I4)),
    b"G": lambda r: r.push(r.number(_F8)),
    b"U": lambda r: r.text(r.byte()),
    b"T": lambda r: r.text(r.number(_U4)),
    b"\x8c": lambda r: r.text(r.byte()),
    b"X": lambda r: r.text(r.number(_U4)),
    b"\x8d": lambda r: r.text(r.number(_U8)),
    b"C": lambda r: r.push(r.take(r.byte())),
    b"B": lambda r: r.push(r.take(r.number(_U4))),
    b"\x8e": lambda r: r.push(r.take(r.number(_U8))),
    b"\x96": lambda r: r.push(r.take(r.number(_U8))),
    b"]": lambda r: r.push([]),
    b"l": lambda r: r.push(r.since_mark()),
    b"a": lambda r: r.append([r.pop()]),
    b"e": lambda r: r.append(r.since_mark()),
    b")": lambda r: r.stack.append(()),
    b"\x85": lambda r: r.tuple(1),
    b"\x86": lambda r: r.tuple(2),
    b"\x87": lambda r: r.tuple(3),
    b"t": lambda r: r.push(tuple(r.since_mark())),
    b"}": lambda r: r.push({}),
    b"d": _dict,
    b"s": _set_item,
    b"u": lambda r: r.set_items(r.since_mark()),
    b"\x8f": lambda r: r.push(set()),
    b"\x90": lambda r: r.add(r.since_mark()),
    b"\x91": _frozenset,
    b"h": lambda r: r.recall(r.byte()),
    b"j": lambda r: r.recall(r.number(_U4)),
    b"q": lambda r: r.remember(r.byte()),
    b"r": lambda r: r.remember(r.number(_U4)),
    b"\x94": lambda r: r.remember(len(r.memo)),
    b"c": lambda r: r.name(r.line(), r.line()),
    b"\x93": _stack_global,
    b"i": _inst,
    b"o": _obj,
    b"R": _reduce,
    b"\x81": _reduce,  # NEWOBJ
    b"\x92": _newobj_ex,
    b"b": _Reader.build,
    b"Q": lambda r: r.push(r.persistent(r.pop())),
}
ACTIONS = [OPCODES.get(bytes([code])) for code in range(256)]
