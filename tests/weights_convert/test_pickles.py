"""Pickles are read as data: nothing in a file is ever run, and an archive that lies is refused."""

from __future__ import annotations

import gc
import io
import os
import pickle
import struct
import subprocess
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teaching import refused
from torch import nn

from weights_convert import files, mapped, pickle_names, pickles
from weights_convert.rules import ConversionError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.float16)}


def archive(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], compressed: str = "") -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as out:
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, data in members.items() if isinstance(members, dict) else members:
            out.writestr(name, data, zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED)
    return path


# --- code -----------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class Builds:
    """Pickles as an object of the script, given the result of a call as its state (BUILD)."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return types.SimpleNamespace, (), self.call


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    make = f"import os; os.mkdir({str(marker)!r})"
    shell = f"mkdir {marker}"
    return {
        "os.system": (Call(os.system, shell), f"{os.name}.system"),
        "eval": (Call(eval, f"__import__('os').mkdir({str(marker)!r})"), "builtins.eval"),
        "exec": (Call(exec, make), "builtins.exec"),
        "getattr": (Call(getattr, 1, "real"), "builtins.getattr"),
        "subprocess": (Call(subprocess.Popen, shell), "Popen"),
        "runpy": (Call(__import__("runpy").run_path, str(marker)), "runpy.run_path"),
        "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "torch.load": (Call(torch.load, "x"), "torch.serialization.load"),
        "numpy": (Call(np.load, "x"), "numpy.load"),
        "partial": (Call(__import__("functools").partial, os.mkdir, str(marker)), "functools.partial"),
        "BUILD": (Builds(Call(os.mkdir, str(marker))), "types.SimpleNamespace"),
        "state of an object": (Call(OrderedDict, state={"x": Call(os.mkdir, str(marker))}), ".mkdir"),
        "a module": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", attacks(Path()))
@pytest.mark.parametrize("where", ["beside", "optimizer", "first"])
def test_code_is_named_and_not_run(tmp_path: Path, name: str, where: str, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    attack, says = attacks(marker)[name]
    content: dict[str, Any] = {"state_dict": dict(TENSORS), "x": attack}
    if where == "optimizer":
        content = {"state_dict": dict(TENSORS), "optimizer_states": [{"state": {0: {"m": attack}}}]}
    elif where == "first":
        content = {"state_dict": {"a": attack, **TENSORS}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, says, "can run code", "nothing was run", "safetensors")
    assert not marker.exists()


def test_the_attacks_would_run(tmp_path: Path) -> None:
    """The marker is made by Python's own unpickler: the tests above can fail."""
    for name in ("os.system", "eval", "exec", "BUILD", "state of an object"):
        marker = tmp_path / name.replace(" ", "")
        pickle.loads(pickle.dumps(attacks(marker)[name][0]))
        assert marker.is_dir(), name


@pytest.mark.parametrize("part", range(5))
def test_code_in_any_pickle_of_a_legacy_file(tmp_path: Path, part: int) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    stream = io.BytesIO(whole)
    cuts = [0]
    for _ in range(5):
        pickles_end(stream)
        cuts.append(stream.tell())
    evil = pickle.dumps(Call(os.mkdir, str(marker)), protocol=2)
    path.write_bytes(whole[: cuts[part]] + evil + whole[cuts[part + 1] :])
    with pytest.raises(ConversionError, match="mkdir" if part else "plain pickle"):
        files.read(path)
    assert not marker.exists()


def pickles_end(stream: io.BytesIO) -> None:
    """Moves behind the next pickle."""
    _, end = pickles.load(
        stream.getvalue(), stream.tell(), lambda pid: pickle_names.Storage(pid[2], pid[1].dtype, pid[4])
    )
    stream.seek(end)


@pytest.mark.parametrize(
    "module, name",
    [("torch.serialization", "os.system"), ("torch", "os.system"), ("omegaconf", "a.b"), ("os", "system")],
)
def test_names_with_dots(tmp_path: Path, module: str, name: str) -> None:
    stream = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)) + b"\x93."
    refused(archive(tmp_path / "x.pt", {"x/data.pkl": stream}), f"{module}.{name}", "can run code")


# --- archives that lie ----------------------------------------------------------------------------------------------


def stored(tensor: bytes) -> bytes:
    """A pickle {"a": tensor} around the arguments of _rebuild_tensor_v2 behind the storage."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage + tensor + b"\x89}tRs."


GOOD = stored(b"K\x00K\x04\x85K\x01\x85")
BYTES = struct.pack("<4f", 1, 2, 3, 4)


def test_the_handmade_archive_is_good(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", {"x/data.pkl": GOOD, "x/data/0": BYTES})
    assert files.read(path)[0]["a"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "tensor, says",
    [
        (b"K\x01K\x04\x85K\x01\x85", "reaches element 4"),  # offset
        (b"K\x00K\x05\x85K\x01\x85", "reaches element 4"),  # shape
        (b"K\x00K\x02\x85K\x04\x85", "reaches element 4"),  # stride
        (b"K\x00K\x05\x85K\x00\x85", "repeats"),
        (b"K\x00J\x00\x00\x00\x7f\x85K\x00\x85", "repeats"),
        (b"K\x00K\x04\x85J\xff\xff\xff\xff\x85", "strides"),
        (b"J\xff\xff\xff\xffK\x04\x85K\x01\x85", "expected sizes"),
        (b"K\x00J\xff\xff\xff\xff\x85K\x01\x85", "shape"),
        (b"K\x00K\x02K\x02\x86K\x01\x85", "shape"),
        (b"K\x00\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01\x85K\x01\x85", "shape"),
        (b"K\x00G\x3f\xf0\x00\x00\x00\x00\x00\x00\x85K\x01\x85", "shape"),
        (b"NNN", "shape None"),
    ],
)
def test_views_outside_of_their_storage(tmp_path: Path, tensor: bytes, says: str) -> None:
    refused(archive(tmp_path / "x.pt", {"x/data.pkl": stored(tensor), "x/data/0": BYTES}), says)


@pytest.mark.parametrize(
    "members, says",
    [
        ([("x/data.pkl", GOOD)], "absent"),
        ([("x/data.pkl", GOOD), ("y/data/0", BYTES)], "absent"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES[:-1])], "15 bytes"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("y/data.pkl", GOOD)], "2 pickles"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("x/data.pkl", GOOD)], "two members"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("x/data/0", BYTES)], "two members"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("../../outside", b"")], "outside"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("/etc/outside", b"")], "outside"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("x\\..\\outside", b"")], "outside"),
        ([("x/data.pkl", GOOD), ("x/data/0", BYTES), ("x/byteorder", b"big")], "big-endian"),
        ([("readme.txt", b"hello")], "without data.pkl"),
        ([("x/data.pkl", b"")], "STOP"),
        ([("x/data.pkl", GOOD[:-1]), ("x/data/0", BYTES)], "STOP"),
    ],
)
def test_archives_that_lie(tmp_path: Path, members: list[tuple[str, bytes]], says: str) -> None:
    refused(archive(tmp_path / "x.pt", members), says)


def test_an_empty_table_behind_members(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", {"x/data.pkl": GOOD, "x/data/0": BYTES})
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"PK\x01\x02")] + b"PK\x05\x06" + bytes(18))
    refused(path, "nothing in it")


@pytest.mark.parametrize("compressed", ["x/data.pkl", "x/data/0", "x/other"])
def test_compressed_members(tmp_path: Path, compressed: str) -> None:
    members = {"x/data.pkl": GOOD, "x/data/0": BYTES, "x/other": bytes(10**6)}
    refused(archive(tmp_path / "x.pt", members, compressed), "compressed", compressed)


def test_members_at_other_places_than_the_table_says(tmp_path: Path) -> None:
    """Two tables of one archive that disagree would be read differently by different programs."""
    path = archive(tmp_path / "x.pt", {"x/data.pkl": GOOD, "x/data/0": BYTES, "x/data/1": BYTES[::-1]})
    whole = path.read_bytes()
    table = whole.rindex(b"PK\x01\x02")
    first = whole.index(b"x/data/0")
    path.write_bytes(whole.replace(b"x/data/1", b"x/data/2", 1))  # the member's own header alone
    refused(path, "at the place of")
    path.write_bytes(whole[: table + 42] + struct.pack("<I", first - 30) + whole[table + 46 :])
    refused(path, "x/data/")
    path.write_bytes(whole.replace(GOOD, GOOD.replace(b"aa", b"ab").replace(b"ac", b"bc"), 1))
    refused(path, "checksum")


@pytest.mark.parametrize(
    "stream, says",
    [
        (b"\x80\x02(K\x01K\x02.", "opcode|holds a"),
        (b"\x80\x020.", "empty stack"),
        (b"\x80\x02R.", "empty stack"),
        (b"\x80\x02K\x01(\x85.", "empty stack"),  # the value is below the mark
        (b"\x80\x02K\x01t.", "no mark"),
        (b"\x80\x02(0K\x01.", "holds a int"),  # POP takes a mark off too
        (b"\x80\x02(0t.", "no mark"),
        (b"\x80\x02J\x01\x00", "STOP"),
        (b"\x80\x02K\x01K", "STOP"),
        (b"\x80\x02K\x01", "STOP"),
        (b"\x80\x02ctorch", "without an end"),
        (b"\x80\x02c" + b"x" * 600 + b"\ny\n.", "without an end"),
        (b"\x80\x02K\x01\x85.", "holds a tuple"),
        (b"\x80\x02h\x07.", "memo entry 7"),
        (b"\x80\x02}(K\x01u.", "pairs"),
        (b"\x80\x02}}K\x01s.", "as a key"),
        (b"\x80\x02}K\x01K\x01sK\x01K\x02s.", "twice"),
        (b"\x80\x02K\x01)R.", "call of a int"),
        (b"\x80\x02K\x01}b.", "state for a int"),
        (b"\x80\x02K\x01K\x02a.", "expected a list"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "an integer of"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "STOP"),
        (b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "STOP"),
        (b"\x80\x02\x82\x01.", "opcode"),  # an extension of the registry
        (b"\x80\x02P1\n.", "opcode"),
        (b"\x80\x01.", "protocol"),
        (b"\x80\x02K\x01Q.", "reference"),
        (b"\x80\x02" + b"K\x01" + b"\x85" * 100_000 + b".", "holds a tuple"),
        (b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x01s.", "as a key"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "call of"),
    ],
)
def test_streams_that_are_no_checkpoint(tmp_path: Path, stream: bytes, says: str) -> None:
    path = archive(tmp_path / "x.pt", {"x/data.pkl": stream})
    with pytest.raises(ConversionError, match=says):
        files.read(path)


def test_the_collector_rests_while_a_pickle_is_read() -> None:
    """One look of Python's collector through all objects of torch takes as long as reading SD1.5's pickle."""
    seen: list[bool] = []
    stream = b"\x80\x02K\x01Q."
    for after in (True, False):
        (gc.enable if after else gc.disable)()
        try:
            pickles.load(stream, 0, lambda _: seen.append(gc.isenabled()))
            with pytest.raises(pickle_names.PickleError, match="STOP"):
                pickles.load(stream[:-1], 0, lambda _: seen.append(gc.isenabled()))
            assert gc.isenabled() == after
        finally:
            gc.enable()
    assert seen == [False] * 4


def test_sizes_whose_product_is_beyond_any_checkpoint() -> None:
    assert mapped.sizes([2**24, 2**23, 1]) == (2**24, 2**23, 1)
    for wrong in ([2**24, 2**24], [2**30, 0, 2**30], [-1], [True], [2.0], [1] * 17, "12"):
        assert mapped.sizes(wrong) is None, wrong
