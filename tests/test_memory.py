"""Memory predicted, found and planned; what happens where it runs out."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from i2v import assemble, device, free_memory, memory
from i2v.assemble import ModelFiles
from i2v.memory_plans import PLANS
from i2v.request import Request

CPU = torch.device("cpu")
TINY = assemble.plan(ModelFiles())
REQUEST = Request(num_frames=16).resolved(TINY.preset, (64, 64), 32, 8)
GB = 10**9


def cgroup(folder: Path, limit: str, used: int, cache: int, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_limits_of_containers(tmp_path: Path) -> None:
    second, own = ("memory.max", "memory.current"), tmp_path / "self"
    own.write_text("0::/a/b\n")
    cgroup(tmp_path / "a/b", "max", 5, 0, second)
    cgroup(tmp_path / "a", str(9 * GB), 4 * GB, GB, second)
    assert free_memory._cgroups(own, tmp_path) == [6 * GB]
    own.write_text("5:cpu:/a\n4:memory:/c\n")
    cgroup(tmp_path / "memory/c", str(3 * GB), GB, 0, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert free_memory._cgroups(own, tmp_path) == [2 * GB]
    assert free_memory._cgroups(tmp_path / "nothing", tmp_path) == []
    own.write_text("0::/a service/b\n")
    cgroup(tmp_path / "a service/b", str(7 * GB), GB, 0, second)
    assert free_memory._cgroups(own, tmp_path) == [6 * GB]


def test_bfloat16_by_itself_for_large_models_where_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    large, cuda = device.LARGE, torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(device, "computes_bfloat16", lambda able=able: able)
        assert device.pick_dtype("auto", CPU, large) == (torch.bfloat16 if able else torch.float32)
        assert device.pick_dtype("auto", CPU, large - 1) == torch.float32
        assert device.pick_dtype("float32", CPU, large) == torch.float32, "what is asked for wins"
        assert device.pick_dtype("auto", cuda, large) == torch.float16
        assert memory.Fitting(TINY, "cpu", "auto").dtype == torch.float32 and TINY.parameters < large
        monkeypatch.setattr(device, "LARGE", TINY.parameters)
        assert memory.Fitting(TINY, "cpu", "auto").dtype == (torch.bfloat16 if able else torch.float32)
        monkeypatch.setattr(device, "LARGE", large)


def test_a_slow_number_format_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once, where the processor lacks instructions for it; the choice stands."""
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")

    def said(able: bool, name: str, kind: str) -> list[str]:
        monkeypatch.setattr(device, "computes_bfloat16", lambda: able)
        device._warn_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert device.pick_dtype(name, torch.device(kind)) == device.DTYPES[name]
            assert device.training_dtype(name, torch.device(kind)) == name
        return caplog.messages

    assert said(False, "bfloat16", "cpu") == [
        "--dtype bfloat16: this CPU has no instructions for it; in float32 it is 10 to 100 times as fast"
    ]
    assert bool(said(True, "float16", "cpu")) != device.computes_float16()
    assert said(True, "bfloat16", "cpu") == said(False, "bfloat16", "cuda") == said(False, "float32", "cpu") == []


def test_a_training_computes_in_bfloat16_where_the_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(device, "computes_bfloat16", lambda able=able: able)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        for kind in ("cpu", "cuda"):
            assert device.training_dtype("auto", torch.device(kind)) == ("bfloat16" if able else "float32")
        assert device.training_dtype("auto", torch.device("mps")) == "float32"
        assert device.training_dtype("float16", torch.device("cuda")) == "float16", "what is asked for wins"


def test_what_the_cpu_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions for bfloat16 are asked for, not whether oneDNN would take it, which it does without them."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    assert not device.computes_bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert device.computes_bfloat16()


def test_free_memory_here() -> None:
    free = free_memory.free_bytes(CPU)
    assert free is None or 10**7 < free < 10**14


def test_what_pytorch_kept_of_earlier_videos_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, played here: else every further video of a run would get a slower plan."""
    for name, value in {"mem_get_info": (7, 16), "memory_reserved": 8, "memory_allocated": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory.free_bytes(torch.device("cuda")) == 7 + 8 - 2


def test_the_words_of_every_library_that_runs_out() -> None:
    words = ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "can't allocate memory"]
    assert all(free_memory.is_out_of_memory(RuntimeError(text)) for text in words)
    assert not free_memory.is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_kept_or_returned() -> None:
    """In a process of its own, whose pages are counted: those that the system had to clear, and those still held."""
    program = """
import resource, sys
import torch
from i2v.free_memory import give_back_freed_memory, keep_freed_memory, used_bytes
keep_freed_memory(sys.argv[1] == "keep")
for _ in range(30):  # the first ones may lie beside each other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(8 << 20)
faults, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, used_bytes()
give_back_freed_memory()
print(faults * resource.getpagesize(), held - used_bytes())
"""

    def run(how: str) -> list[int]:
        told = subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True, text=True)
        return [int(number) for number in told.stdout.split()]

    size = 4 * (8 << 20)
    if getattr(ctypes.CDLL(None), "mallopt", None) is None:
        pytest.skip("this C library has no mallopt")
    (faults, trimmed), (faults_returned, trimmed_returned) = run("keep"), run("return")
    assert faults < size / 10 < trimmed and trimmed_returned < size / 10 < faults_returned


def test_smaller_plans_need_less() -> None:
    large = Request(num_frames=16, height=256, width=256).resolved(TINY.preset, (64, 64), 32, 8)
    found = {name: memory.predict(TINY, large, plan, torch.float32, CPU) for name, plan in PLANS.items()}
    peaks = [memory.needed(stages) for stages in found.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    assert [stage.name for stage in found["full"]] == ["picture", "prompt", "denoising", "decoding"]
    half = memory.predict(TINY, large, PLANS["lean"], torch.bfloat16, CPU)
    assert half[2].weights < 0.6 * found["lean"][2].weights


def test_approximations_compute_less_and_hold_their_features() -> None:
    def denoising(**settings: object) -> memory.Stage:
        request = Request(num_frames=16, window=8, **settings)  # type: ignore[arg-type]
        request = request.resolved(TINY.preset, (64, 64), 32, 8)
        return memory.predict(TINY, request, PLANS["lean"], torch.float32, CPU)[2]

    exact, some, deep = denoising(), denoising(guidance_end=0.4), denoising(deep_every=5)
    assert some.flops == pytest.approx(exact.flops * 0.7, rel=0.01) and some.work == exact.work
    assert 0.2 * exact.flops < deep.flops < 0.5 * exact.flops
    of_a_window = 2 * 8 * TINY.parts["unet"].config.channels[0] * 8 * 8 * 4
    assert deep.work > exact.work + 3 * of_a_window, "each of the four windows keeps its own"


@pytest.mark.parametrize(("free", "name"), [(100 * GB, "full"), (1, "least"), (None, "full")])
def test_what_fits_is_chosen(free: int | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    model = memory.Fitting(TINY, "cpu", "float32", say=lines.append)
    model.choose(REQUEST)
    assert model.plans[0].name == name and lines[0].startswith(f"memory: {name} ")
    assert ("may not suffice" in lines[0]) == (free == 1)
    mine = memory.Fitting(TINY, "cpu", "float32", "low", say=lines.append)
    mine.choose(REQUEST)
    assert mine.plans[0].name == "low"  # asked for, whatever fits


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("x")]
)
def test_the_next_plan_where_memory_runs_out(error: Exception) -> None:
    lines: list[str] = []
    model = memory.Fitting(TINY, "cpu", "float32", "full", say=lines.append)
    tried: list[str] = []

    def work(pipe: object) -> str:
        tried.append(model.plans[0].name)
        if len(tried) < 3:
            raise error
        return "made"

    assert model.run(REQUEST, work) == "made" and tried == ["full", "lean", "low"]
    assert "full was not enough, trying lean" in lines[1]

    def never(pipe: object) -> str:
        raise error

    with pytest.raises(type(error)):
        model.run(REQUEST, never)


def test_other_errors_are_passed_on() -> None:
    model = memory.Fitting(TINY, "cpu", "float32")

    def work(pipe: object) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        model.run(REQUEST, work)
    assert model.plans[0].name == "full"


def test_dry_run(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.mp4"
    argv = ["--image", str(root / "examples/red_ball.png"), "--output", str(output), "--dry-run", "--memory", "low"]
    assert sample.main(argv) == 0
    out = capsys.readouterr().out
    assert "memory: low" in out and "denoising" in out and "peak" in out and not list(tmp_path.iterdir())
