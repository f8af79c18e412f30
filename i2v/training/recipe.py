"""All stages of a model in order, from one file: `python train.py --recipe configs/tiny`.

`recipe.json` in the folder holds a list of stages. A stage has a `name` (its folder below --out), a `kind` ("train" is
train.py's loop, "vae" and "clip" their own scripts), settings (`config`: a file beside the recipe, or below it; then
`settings`, which win) and `gates`, numbers of its log that must be reached before the next stage begins.

Every stage starts from the folder of weights that the one before left and leaves a complete one. A finished stage is
known by its `done.json`, which holds its settings and the hashes of what went in and came out, and is skipped; an
unfinished one, whose `begun.json` holds the first two, goes on from its own newest checkpoint. So the same command goes
on wherever it was stopped, and never over other settings or other weights.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from i2v import config, load
from i2v.config import ConfigError, flag
from i2v.device import place
from i2v.hashes import sha256
from i2v.training import checkpoint, clip, vae
from i2v.training.settings import FREE, Training
from weights_convert.files import write_atomic

Main = Callable[[list[str]], int | None]
CONFIGS: dict[str, type] = {"train": Training, "vae": vae.VAETraining, "clip": clip.CLIPTraining}
PRODUCTS = {"vae": "vae.safetensors", "clip": "image_encoder.safetensors"}
COMPARE = {">=": operator.ge, "<=": operator.le}
PREVIOUS = "<previous>"  # in a setting: the folder of weights of the stage before


@dataclass(frozen=True)
class Recipe:
    """Train all stages of a model, one after the other; stopped, the same command goes on."""

    recipe: Path = flag(Path("configs/tiny"), "folder with recipe.json and the settings of its stages")
    out: Path | None = flag(None, "folder of the runs; not given: runs/ and the name of the recipe's folder")
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1")
    ignore_gates: bool = flag(False, "go on although a stage has not reached its numbers")


@dataclass(frozen=True)
class Gate:
    """A number of a stage's log, and what to do where it is not reached."""

    number: str
    sign: str
    bound: float
    advice: str

    def told(self, value: float) -> str:
        return f"{self.number} = {value:.4g}, wanted {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Stage:
    name: str
    kind: str
    settings: Mapping[str, Any]
    gates: tuple[Gate, ...]


def read(folder: Path) -> tuple[Mapping[str, Any], list[Stage]]:
    """What the recipe starts from, {"folder": ..., "files": [...]}, and its stages. Raises ConfigError."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"--recipe {folder}: there is no {path}; configs/tiny has one")
    values, stages = config.read(path), []
    if not isinstance(values.get("stages"), list) or not isinstance(values.get("start"), dict):
        raise ConfigError(f"{path}: expected an object with `start` and a list `stages`")
    for stage in values["stages"]:
        name = stage.get("name", "?")
        if unknown := stage.keys() - {"name", "kind", "config", "settings", "gates"}:
            raise ConfigError(f"{path}: stage {name!r} knows no {unknown.pop()!r}")
        if stage.get("kind") not in CONFIGS:
            raise ConfigError(f"{path}: stage {name!r} is of kind {stage.get('kind')!r}, not train, vae or clip")
        settings = config.read(folder / stage["config"]) if "config" in stage else {}
        gates = tuple(Gate(*gate) for gate in stage.get("gates", ()))
        if wrong := [g.sign for g in gates if g.sign not in COMPARE]:
            raise ConfigError(f"{path}: stage {name!r} compares with {wrong[0]!r}, not {' or '.join(COMPARE)}")
        settings = {**settings, **stage.get("settings", {})}
        config.from_dict(CONFIGS[stage["kind"]], settings, f"{path}, stage {name!r}")  # before the hours, not after
        stages.append(Stage(name, stage["kind"], settings, gates))
    return values["start"], stages


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def numbers(folder: Path) -> dict[str, float]:
    """The last value of every number of the stage's log, then those that its weights carry."""
    out: dict[str, float] = {}
    log = folder / "log.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else ():
        out |= json.loads(line)
    for file in (folder / name for name in PRODUCTS.values()):
        if file.is_file():
            found = load.header(file).metadata.get("numbers", {})
            out |= {k: v for k, v in found.items() if isinstance(v, (int, float))}
    return out


def settings_of(stage: Stage, out: Path, previous: Path, device: str) -> dict[str, Any]:
    """The stage's settings with the folders of this run in them."""
    given = {k: v.replace(PREVIOUS, str(previous)) if isinstance(v, str) else v for k, v in stage.settings.items()} | {
        "out": str(out / stage.name)
    }
    if stage.kind != "vae":
        given["init"] = str(previous)
    here = {"cache": str(out / "latents"), "device": device}
    return given | {k: v for k, v in here.items() if k in (f.name for f in fields(CONFIGS[stage.kind]))}


def made_otherwise(folder: Path, changed: Sequence[str], other: Sequence[str]) -> ConfigError:
    """changed: settings, in words; other: names of files that went in."""
    lines = [*changed, *(f"{name}, from which it starts, is another one" for name in other)]
    listed = "".join(f"\n  {line}" for line in lines)
    return ConfigError(f"{folder} was made otherwise:{listed}\ndelete {folder} to make it again, or take another --out")


def finished(stage: Stage, folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether the stage is there as it would be made now. Raises ConfigError where it was made otherwise, or begun
    otherwise and can be gone on with."""
    done, begun = folder / "done.json", folder / "begun.json"  # stages of older versions have no begun.json
    if not done.is_file() and not (begun.is_file() and checkpoint.latest(folder)):
        return False
    before = json.loads((done if done.is_file() else begun).read_text())
    told = {"init"} | {k for k, v in stage.settings.items() if isinstance(v, str) and PREVIOUS in v}  # by `inputs`
    names = sorted((before["settings"].keys() | settings.keys()) - FREE - told)
    changed = [
        f"{k}: {before['settings'].get(k)!r} -> {settings.get(k)!r}"
        for k in names
        if before["settings"].get(k) != settings.get(k)
    ]
    names = sorted(before["inputs"].keys() | inputs.keys())
    other = [name for name in names if before["inputs"].get(name) != inputs.get(name)]
    if changed or other:
        raise made_otherwise(folder, changed, other)
    if not done.is_file():
        return False
    if hashes(folder / "weights") != before["outputs"]:
        raise ConfigError(f"{folder / 'weights'} has been changed since it was made; delete {folder} to make it again")
    return True


def check(stage: Stage, folder: Path, ignore: bool) -> None:
    """Print the gates. Raises ConfigError at the first that is not reached, unless they are ignored."""
    found = numbers(folder)
    for gate in stage.gates:
        if gate.number not in found:
            raise ConfigError(f"{folder / 'log.jsonl'} has no number {gate.number!r}, which a gate of the recipe names")
        value = found[gate.number]
        reached = COMPARE[gate.sign](value, gate.bound)
        print(f"{stage.name}: {gate.told(value)}: {'reached' if reached else 'NOT reached'}")
        if not reached and not ignore:
            raise ConfigError(
                f"stage {stage.name!r} stops the recipe: {gate.told(value)}. {gate.advice} (delete {folder} to make it "
                "again with other settings); --ignore-gates goes on all the same"
            )


def copy_whole(source: Path, target: Path) -> None:
    """A copy that appears under its name only when it is complete."""
    with source.open("rb") as file:
        write_atomic(target, lambda out: shutil.copyfileobj(file, out))


def carry(source: Path, target: Path) -> None:
    """Copy what the target folder of weights does not have."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if not (target / path.name).exists():
            copy_whole(path, target / path.name)


def copy_start(sources: Mapping[str, Path], folder: Path) -> None:
    """What the recipe starts from. Raises ConfigError where the folder holds other files than these."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]  # left by a killed copy
    if other := [p.name for p in there if p.name not in sources or sha256(p) != sha256(sources[p.name])]:
        raise made_otherwise(folder.parent, [], other)
    for name, source in sources.items():
        if not (folder / name).exists():
            copy_whole(source, folder / name)


def run(cfg: Recipe, mains: Mapping[str, Main]) -> int:
    """The stages in order; 0, or the exit code of the stage that was stopped."""
    start, stages = read(cfg.recipe)
    out = cfg.out or Path("runs") / cfg.recipe.resolve().name
    previous = out / "start"
    sources = {name: Path(start["folder"]) / name for name in start["files"]}
    if absent := [source for source in sources.values() if not source.is_file()]:
        raise ConfigError(f"{absent[0]}: there is no such file, which the recipe in {cfg.recipe} starts from")
    copy_start(sources, previous)
    for number, stage in enumerate(stages, 1):
        folder = out / stage.name
        settings = settings_of(stage, out, previous, cfg.device)
        inputs = hashes(previous)
        if finished(stage, folder, settings, inputs):
            print(f"stage {number} of {len(stages)}, {stage.name}: finished before")
        else:
            print(f"stage {number} of {len(stages)}, {stage.name}", flush=True)
            file = out / f"{stage.name}.json"
            config.write_text(file, json.dumps(settings, indent=2) + "\n")
            begun = {"settings": settings, "inputs": inputs}
            if checkpoint.latest(folder) is None:
                folder.mkdir(exist_ok=True)
                config.write_text(folder / "begun.json", json.dumps(begun, indent=2) + "\n")
            if code := mains[stage.kind](["--config", str(file)]):
                return code
            weights = folder / "weights"
            if stage.kind in PRODUCTS:
                shutil.rmtree(weights, ignore_errors=True)  # of an attempt that was stopped while it was filled
                weights.mkdir()
                shutil.copyfile(folder / PRODUCTS[stage.kind], weights / PRODUCTS[stage.kind])
            carry(previous, weights)
            done = {**begun, "outputs": hashes(weights), "numbers": numbers(folder)}
            config.write_text(folder / "done.json", json.dumps(done, indent=2) + "\n")
        check(stage, folder, cfg.ignore_gates)
        previous = folder / "weights"
    finished_weights = out / "weights"
    shutil.rmtree(finished_weights, ignore_errors=True)
    shutil.copytree(previous, finished_weights)
    print(f"finished: python sample.py --weights {finished_weights} --image PICTURE --prompt TEXT")
    return 0


def main(argv: Sequence[str], train_main: Main) -> int:
    """The command line; `train_main` is train.py's, which this package does not import."""
    cfg = config.from_command_line(Recipe, argv, prog="train.py --recipe")
    if place().count > 1:
        raise ConfigError("--recipe runs in one process; start it without torchrun (its stages one by one can use it)")
    return run(cfg, {"train": train_main, "vae": vae.main, "clip": clip.main})
