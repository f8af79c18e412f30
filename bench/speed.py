"""How fast we are beside diffusers and beside the machine: `python -m bench.speed unet-256-float32 vae-256-float32`.

Each name is a row, measured in a process of its own and put into bench/speed.json in place of what this processor had
there; `--list` names them, `--table` writes what there is into docs/speed.md. Both sides run the same random weights,
sizes and dtype, in turn; times are medians. A row also measures a large matrix product, `torch.mm` of 4096 x 4096,
which is what PyTorch makes of the machine, and counts operations. A row takes minutes; nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import approximations, peers, training_step, whole_set
from i2v.free_memory import keep_freed_memory
from i2v.memory_plans import FULL
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.unet import SD15, UNet

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench/speed.json", ROOT / "docs/speed.md"
SETTINGS = {256: 4, 512: 16}  # side -> frames
SETS = ROOT / "outputs/bench"  # whole models on the disk, 17 GB in float32, made where they are missing
RUN_STEPS = {256: {5: "", 25: "-25-steps"}, 512: {2: "-2-steps", 25: "-25-steps"}}  # of each side


def peak() -> float:
    """GB that this process held at most."""
    return whole_set.memory("VmHWM") / 1e9


def held() -> float:
    """GB that it holds now."""
    return whole_set.memory("VmRSS") / 1e9


def seconds(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int, warm: bool) -> dict[str, float]:
    """Median seconds of each, after one round that does not count (`warm`).

    Freed memory is kept, as `sample.py` does, for all sides: what is compared is what they compute.
    """
    keep_freed_memory(True)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + warm):
        for name, f in sides.items():
            times[name].append(seconds(f))
    return {name: statistics.median(found[warm:]) for name, found in times.items()}


def matrix_product(dtype: torch.dtype) -> float:
    """GFLOP/s of a large one."""
    a = torch.randn(4096, 4096).to(dtype)
    return 2 * 4096**3 / in_turn({"": lambda: a @ a}, 5, True)[""] / 1e9


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def unet(size: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """A guided step of ours, without and with the I2V-Adapter, and of diffusers."""
    frames = SETTINGS[size]
    ours = peers.randomize(peers.unet(SD15), dtype)
    theirs = peers.diffusers_step(peers.diffusers_unet(ours), peers.inputs(frames, size, dtype))
    step = peers.our_step(ours, peers.inputs(frames, size, dtype))
    slots = {name: m for name, m in ours.named_modules() if hasattr(m, "i2v_adapter")}
    add_i2v_adapter(ours)
    adapters = {name: m.i2v_adapter for name, m in slots.items()}

    def without() -> Tensor:
        for module in slots.values():
            module.i2v_adapter = None
        return step()

    def with_adapter() -> Tensor:
        for name, module in slots.items():
            module.i2v_adapter = adapters[name]
        return step()

    rate = matrix_product(dtype)
    last: dict[str, Tensor] = {}
    sides = {"diffusers": theirs, "ours": without, "with adapter": with_adapter}
    kept = {name: (lambda name=name, f=f: last.__setitem__(name, f())) for name, f in sides.items()}
    times = in_turn(kept, repeats, warm=size < 512)
    work = {name: peers.operations(SD15, name != "ours", frames, size) for name in ("ours", "with adapter")}
    return {
        "seconds": times,
        "ratio": times["diffusers"] / times["ours"],
        "GFLOP": {name: count / 1e9 for name, count in work.items()},
        "GFLOP/s": {name: work[name] / times[name] / 1e9 for name in work},
        "matrix product": rate,
        "adapter's operations": work["with adapter"] / work["ours"] - 1,
        "adapter's time": times["with adapter"] / times["ours"] - 1,
        # motion modules pool a norm over frames in diffusers alone: equal outputs are a test's matter
        "difference": difference(last["ours"].float(), last["diffusers"].float()),
    }


def compiled(size: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """A guided step with the adapter under the plan `full`, as it is ("plainly") and with --compile; seconds of the
    first call too."""
    nets = [peers.randomize(peers.unet(SD15, adapter=True), dtype), peers.unet(SD15, adapter=True)]
    nets[1].load_state_dict(nets[0].state_dict(), assign=True)
    peers.sort_weights(nets[0])
    nets[0].budget = FULL.cpu_budget
    nets[1].compile(dynamic=False)
    given = peers.inputs(SETTINGS[size], size, dtype)

    def step(net: UNet) -> Callable[[], Tensor]:
        context = net.context_kv(given["context"], given["image_tokens"])
        return lambda: net(given["latents"], torch.tensor([500]), context, num_frames=SETTINGS[size], conditions=2)

    plain, short = map(step, nets)
    first = seconds(short)
    times = in_turn({"plainly": plain, "ours": short}, repeats, warm=True)
    apart = difference(short().float(), plain().float())
    return {"seconds": times, "ratio": times["plainly"] / times["ours"], "first call": first, "difference": apart}


def vae(size: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """The pictures of one clip decoded."""
    ours = peers.randomize(peers.vae(), dtype)
    theirs = peers.diffusers_vae(ours)
    z = torch.randn(SETTINGS[size], 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    sides = {"diffusers": lambda: theirs.decode(z / 0.18215).sample, "ours": lambda: ours.decode(z)}
    rate, times = matrix_product(dtype), in_turn(sides, repeats, warm=True)
    apart = difference(sides["ours"]().float(), sides["diffusers"]().float())
    return {"seconds": times, "ratio": times["diffusers"] / times["ours"], "matrix product": rate, "difference": apart}


def encoder(name: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """The two prompts of a guided run, or its picture and the grey one, beside transformers."""
    ours, theirs = peers.encoders(name, dtype)
    generator = torch.Generator().manual_seed(0)
    if name == "text":
        x = torch.randint(1000, 40000, (2, peers.TEXT), generator=generator)
        x[:, 20:] = 49407  # its end token
    else:
        x = torch.randn(2, 3, 224, 224, generator=generator).to(dtype)
    last: dict[str, Tensor] = {}
    sides = {
        "diffusers": lambda: last.update(diffusers=theirs(x, output_hidden_states=True).hidden_states[-2]),
        "ours": lambda: last.update(ours=ours(x).hidden_states[-2]),
    }
    times = in_turn(sides, repeats, warm=True)
    apart = difference(last["ours"].float(), last["diffusers"].float())
    return {"seconds": times, "ratio": times["diffusers"] / times["ours"], "difference": apart}


def training_memory(size: int, dtype: torch.dtype, side: str) -> dict[str, Any]:
    """Peak of a process that makes one training step of one side, and what it held before."""
    with torch.inference_mode(False):
        step = training_step.stepper(SETTINGS[size], size, dtype)
        before = held()
        step(side == "plainly")
    return {"GB before": before, "GB peak": peak()}


def memory(size: int, dtype: torch.dtype, side: str, frames: int) -> dict[str, Any]:
    """Peak of a process that makes one step of one side, and what it held before."""
    ours = peers.randomize(peers.unet(SD15), dtype)
    given = peers.inputs(frames, size, dtype)
    make = peers.our_step(ours, given) if side == "ours" else peers.diffusers_step(peers.diffusers_unet(ours), given)
    if side == "ours":
        keep_freed_memory(True)  # as sample.py does
    before = held()
    make()
    return {"GB before": before, "GB peak": peak()}


def rows() -> dict[str, Callable[[int], dict[str, Any]]]:
    """All rows by name, as functions of the number of repeats."""
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    for size in SETTINGS:
        for name in ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            found[f"unet-{size}-{name}"] = lambda n, s=size, d=dtype: unet(s, d, n)
            found[f"compile-{size}-{name}"] = lambda n, s=size, d=dtype: compiled(s, d, n)
            found[f"vae-{size}-{name}"] = lambda n, s=size, d=dtype: vae(s, d, n)
            found[f"approximations-{size}-{name}"] = lambda n, s=size, d=dtype: approximations.measure(
                SETTINGS[s], s, d, lambda sides: in_turn(sides, n, warm=True)
            )
            for side in ("ours", "diffusers"):
                found[f"memory-{size}-{name}-{side}"] = lambda n, s=size, d=dtype, w=side: memory(s, d, w, SETTINGS[s])
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        for side in ("ours", "diffusers"):
            found[f"memory-16x256-{name}-{side}"] = lambda n, d=dtype, w=side: memory(256, d, w, 16)
        for part in ("text", "image"):
            found[f"{part}-{name}"] = lambda n, p=part, d=dtype: encoder(p, d, n)
        found[f"load-{name}"] = lambda n, d=name: whole_set.measure_load(SETS / f"sd15-{d}", d, n)
        found[f"train-256-{name}"] = lambda n, d=dtype: training_step.measure(
            SETTINGS[256], 256, d, lambda sides: in_turn(sides, n, warm=True)
        )
        for side in ("ours", "plainly"):
            found[f"train-memory-256-{name}-{side}"] = lambda n, d=dtype, w=side: training_memory(256, d, w)
    for label, more in {"": (), "-float32": ("--dtype", "float32"), "-deep-3": ("--deep-every", "3")}.items():
        for size, frames in SETTINGS.items():
            for steps, long in RUN_STEPS[size].items():
                found[f"run-{size}{label}{long}"] = lambda n, s=size, f=frames, m=more, k=steps: whole_set.measure_run(
                    SETS / "sd15-float32", f, s, k, n, m
                )
    return found


def machine() -> dict[str, Any]:
    told = dict(re.findall(r"(model name|cpu family)\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()))
    import diffusers

    return {
        "cpu": f"{told['model name']}, family {told['cpu family']}" if len(told) == 2 else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def results() -> list[dict[str, Any]]:
    """One for each row and processor."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def put(found: dict[str, Any]) -> None:
    """In place of what the same processor had for the same row."""
    others = [r for r in results() if (r["row"], r["machine"]["cpu"]) != (found["row"], found["machine"]["cpu"])]
    RESULTS.write_text(json.dumps([*others, found], indent=1) + "\n")


def cells(found: dict[str, Any]) -> str:
    """One line of the table."""
    times = found.get("seconds", {})
    other = "plainly" if "plainly" in times else "diffusers"
    first = [f"{times[k]:.2f} s" if k in times else "" for k in (other, "ours")]
    ratio = f"{found['ratio']:.2f}" if "ratio" in found else ""
    rate = f"{found['GFLOP/s']['ours']:.0f} of {found['matrix product']:.0f}" if "GFLOP/s" in found else ""
    adapter = ""
    if "adapter's time" in found:
        more, work = found["adapter's time"], found["adapter's operations"]
        adapter = f"+{100 * more:.1f} % for +{100 * work:.1f} %"
    room = f"{found['GB peak']:.1f} GB ({found['GB peak'] - found['GB before']:.1f})" if "GB peak" in found else ""
    if "GB" in found:
        room = f"{found['GB']['ours']:.1f} GB, diffusers {found['GB']['diffusers']:.1f} GB"
    return " | ".join([*first, ratio, rate, adapter, room])


def table(found: list[dict[str, Any]]) -> str:
    """Markdown of all results; rows that nobody measured are named."""
    heads = ["row", "processor", "diffusers", "ours", "ratio", "GFLOP/s, of `torch.mm`'s"]
    heads += ["adapter: time for operations", "peak (step)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    missing = []
    for name in rows():
        if name.startswith("approximations"):
            continue  # a table of their own
        of_row = sorted((r for r in found if r["row"] == name), key=lambda r: r["machine"]["cpu"])
        lines += [f"| {name} | {r['machine']['cpu']} | {cells(r)} |" for r in of_row]
        missing += [] if of_row else [f"`{name}`"]
    machines: dict[str, list[str]] = {}
    for r in found:
        about = "; ".join(f"{k} {v}" for k, v in sorted(r["machine"].items()))
        machines.setdefault(about, []).append(f"`{r['row']}`")
    by_machine = [f"- {one}: {', '.join(names)}." for one, names in sorted(machines.items())]
    return "\n".join([*lines, "", f"*Not run*: {', '.join(missing)}.", "", "Measured with:", "", *by_machine])


def write_table() -> None:
    """Between the marks of docs/speed.md."""
    found, text = results(), PAGE.read_text()
    for name, made in {"speed": table(found), "approximations": approximations.table(found, SETTINGS)}.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        head, rest = text.split(start)
        text = head + start + made + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", choices=[*rows(), []], help="rows to measure, see --list")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="name all rows")
    parser.add_argument("--table", action="store_true", help="write docs/speed.md's table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(rows()))
    for name in args.row:
        if args.here:
            with torch.inference_mode():
                print(json.dumps(rows()[name](args.repeats) | {"repeats": args.repeats, "machine": machine()}))
            continue
        command = [sys.executable, "-m", "bench.speed", name, "--here", "--repeats", str(args.repeats)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        found = {"row": name} | json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found), flush=True)
        put(found)
    if args.table:
        write_table()


if __name__ == "__main__":
    main()
