"""A recipe in small: every stage once, stopped and gone on with, its gates, and a folder that makes a video."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_training
from toy_training import small_networks

import train
from i2v import config
from i2v.config import ConfigError
from i2v.device import Place
from i2v.load import load
from i2v.training import clip, clips, recipe, vae
from i2v.training.settings import Training

TRAIN = {"steps": 2, "batch": 2, "clips": 4, "num_frames": 2, "dtype": "float32", "save_every": 1, "log_every": 1,
         "validate_every": 2, "threads": 1}  # fmt: skip
VAE = {"steps": 2, "batch": 2, "frames": 4, "natural": 0.0, "save_every": 1, "size": 64}
BASE = ["unet.*", "text_encoder.*"]
STAGES: list[dict[str, Any]] = [
    {"name": "vae", "kind": "vae", "settings": VAE, "gates": [["psnr_level_1", ">=", -99, "no"]]},
    {"name": "image", "kind": "train", "config": "image.json",
     "settings": {"parts": [], "num_frames": 1, "train": BASE}},
    {"name": "motion", "kind": "train", "settings": {**TRAIN, "parts": ["motion"], "train": [*BASE, "motion.*"],
     "clean_first": False}, "gates": [["val_800", "<=", 99.0, "More steps."], ["gap_800", ">=", -9.0, "More steps."]]},
    {"name": "clip", "kind": "clip", "settings": {"steps": 2, "pictures": 4, "batch": 2}},
    {"name": "content", "kind": "train", "settings": {**TRAIN, "parts": ["motion", "ip_adapter"],
     "train": ["ip_adapter.*"], "clean_first": False}},
    {"name": "i2v", "kind": "train", "settings": TRAIN},
    {"name": "polish", "kind": "vae", "settings": {**VAE, "polish": "<previous>/vae.safetensors"}},
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks that fit together, and few pictures to measure on."""
    monkeypatch.setattr(vae, "TINY_VAE", toy_training.SMALL_VAE)
    monkeypatch.setattr(clip, "TINY_IMAGE_ENCODER", toy_training.VISION)
    drawn, scenes = vae.draw_frames, clip.scenes
    monkeypatch.setattr(vae, "draw_frames", lambda world, split, count, size: drawn(world, split, min(count, 4), size))
    monkeypatch.setattr(clip, "scenes", lambda world, split, count, size: scenes(world, split, min(count, 8), size))
    monkeypatch.setattr(clips, "HELD_OUT_WORLD", 2)


def write(folder: Path, vocabulary: Path, stages: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    start = {"folder": str(vocabulary), "files": ["vocab.json", "merges.txt"]}
    (folder / "image.json").write_text(json.dumps(TRAIN))
    (folder / "recipe.json").write_text(json.dumps({"start": start, "stages": stages}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    toy_training.write_vocabulary(folder, toy_training.all_words(toy_training.WORLDS["level_1"]))
    return folder


def run(folder: Path, out: Path, *flags: str) -> int:
    with small_networks():
        return train.main(["--recipe", str(folder), "--out", str(out), "--device", "cpu", *flags])


def test_the_whole_recipe(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From nothing to a folder that sample.py takes; stopped and moved it goes on, at its end it does nothing."""
    folder, out = write(tmp_path / "recipe", vocabulary, STAGES), tmp_path / "out"
    save, saves = train.State.save, []

    def dying(state: train.State) -> None:
        save(state)
        saves.append(state.cfg.out.name)
        if saves == ["image", "image", "motion"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.State, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    assert not (out / "weights").exists() and not (out / "motion" / "done.json").exists()
    out = out.rename(tmp_path / "moved")  # to another disk, as a whole
    capsys.readouterr()
    assert run(folder, out) == 0
    said = capsys.readouterr().out
    assert "stage 2 of 7, image: finished before" in said and "going on from" in said
    assert saves == ["image", "image", "motion", "motion", "content", "content", "i2v", "i2v"]
    assert "motion: val_800 = " in said and "wanted <= 99: reached" in said

    pipe = load(folder=out / "weights")
    picture = np.random.Generator(np.random.Philox(1)).integers(0, 255, (64, 64, 3), np.uint8)
    assert pipe(picture, "a red ball", steps=1, num_frames=2).frames.shape == (2, 64, 64, 3)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run(folder, out) == 0 and len(saves) == 8
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    stages = json.loads(json.dumps(STAGES))
    stages[2]["settings"]["lr"] = 0.5
    with pytest.raises(ConfigError, match=r"motion was made otherwise:\n  lr: None -> 0.5\ndelete .*motion"):
        run(write(tmp_path / "recipe", vocabulary, stages), out)
    stages = json.loads(json.dumps(STAGES))
    stages[2]["gates"] = [["gap_800", ">=", 50.0, "More steps."]]
    write(tmp_path / "recipe", vocabulary, stages)
    with pytest.raises(ConfigError, match="'motion' stops the recipe: gap_800 = .*wanted >= 50. More steps.*--ignore"):
        run(folder, out)
    assert run(folder, out, "--ignore-gates") == 0 and "NOT reached" in capsys.readouterr().out
    with (out / "clip" / "weights" / "unet.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="has been changed since"):
        run(folder, out, "--ignore-gates")


def test_a_folder_that_has_moved_and_a_kill_while_weights_are_copied(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [STAGES[0], {"name": "decoder", "kind": "vae", "settings": STAGES[-1]["settings"]}]
    folder, out = write(tmp_path / "recipe", vocabulary, stages), tmp_path / "out"
    copy, copied = shutil.copyfileobj, []

    def dying(source: Any, target: Any) -> None:
        copied.append(source.name)
        if len(copied) == 3:
            target.write(source.read(8))
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", dying)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    assert run(folder, out) == 0
    made = {p.name: p.read_bytes() for p in (out / "weights").iterdir()}
    assert all(made[p.name] == p.read_bytes() for p in (out / "start").iterdir())
    out.rename(tmp_path / "moved")
    capsys.readouterr()
    assert run(folder, tmp_path / "moved") == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_stage_that_was_begun_over_other_weights_is_not_gone_on_with(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE before it is made again meanwhile, with another seed; nor is a recipe whose start has changed."""
    stages = [STAGES[0], {**STAGES[1], "gates": []}, {"name": "decoder", "kind": "vae", "settings": VAE}]
    folder, out = write(tmp_path / "recipe", vocabulary, stages), tmp_path / "out"
    save = train.State.save

    def dying(state: train.State) -> None:
        save(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.State, "save", dying)
        run(folder, out)
    shutil.rmtree(out / "vae")
    stages[0] = {**STAGES[0], "settings": {**VAE, "seed": 1}}
    write(folder, vocabulary, stages)
    with pytest.raises(ConfigError, match=r"image was made otherwise:\n  vae.safetensors, from .*\ndelete .*image"):
        run(folder, out)
    shutil.rmtree(out / "image")
    (out / "decoder" / "weights").mkdir(parents=True)
    (out / "decoder" / "weights" / "unet.safetensors").write_bytes(b"of an attempt before")
    assert run(folder, out) == 0
    made = [(out / stage / "weights" / "unet.safetensors").read_bytes() for stage in ("image", "decoder")]
    assert made[0] == made[1]

    other = shutil.copytree(vocabulary, tmp_path / "vocabulary")
    write(folder, other, stages)
    assert run(folder, out) == 0, "the same files elsewhere"
    with (other / "merges.txt").open("a") as file:
        file.write("q q\n")
    with pytest.raises(ConfigError, match=r"out was made otherwise:\n  merges.txt, from which it starts, is another"):
        run(folder, out)
    given = json.loads((folder / "recipe.json").read_text())
    for files, changed in ((["vocab.json"], "merges.txt"), (["vocab.json", "merges.txt", "more.txt"], "more.txt")):
        (vocabulary / "more.txt").write_text("more")
        given["start"] = {"folder": str(vocabulary), "files": files}
        (folder / "recipe.json").write_text(json.dumps(given))
        with pytest.raises(ConfigError, match=f"was made otherwise:\n  {changed}, from which it starts"):
            run(folder, out)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"name": "a", "kind": "vea"}, "of kind 'vea', not train, vae or clip"),
        ({"name": "a", "kind": "vae", "setings": {}}, "stage 'a' knows no 'setings'"),
        ({"name": "a", "kind": "vae", "gates": [["psnr", "=>", 1, ""]]}, "compares with '=>'"),
        ({"name": "a", "kind": "vae", "settings": {"step": 5}}, "stage 'a': there is no setting 'step', did you mean"),
        ({"name": "a", "kind": "train", "config": "absent.json"}, "absent.json: there is no such file"),
    ],
)
def test_mistakes_in_a_recipe(vocabulary: Path, tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(write(tmp_path / "recipe", vocabulary, [stage]), tmp_path / "out")
    with pytest.raises(ConfigError, match="configs/tiny has one"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_a_stage_goes_on_with_the_settings_that_it_began_with(
    kind: str, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE's and CLIP's own loops, as train.py's; and ends with the bits of the unbroken one."""
    index = [s["kind"] for s in STAGES].index(kind)
    folder, out = write(tmp_path / "recipe", vocabulary, STAGES[: index + 1]), tmp_path / "out"
    save = vae.checkpoint.save

    def dying(where: Path, *rest: Any, **more: Any) -> Path:
        made = save(where, *rest, **more)
        if where.name == kind:
            with (where / "lock").open("w") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another process has to wait
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(vae.checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    monkeypatch.setattr(vae.checkpoint, "save", save)
    changed = json.loads(json.dumps(STAGES[: index + 1]))
    changed[index]["settings"]["lr"] = 0.5
    with pytest.raises(ConfigError, match=rf"{kind} was made otherwise:\n  lr: None -> 0.5\ndelete .*{kind}"):
        run(write(tmp_path / "recipe", vocabulary, changed), out)
    (out / kind / "begun.json").unlink()  # by an older version, or without a recipe
    with pytest.raises(ConfigError, match=r"settings differ from those of .*step-00000\d:\n  lr: .* -> 0.5\ntake an"):
        run(write(tmp_path / "recipe", vocabulary, changed), out)
    assert run(write(tmp_path / "recipe", vocabulary, STAGES[: index + 1]), out) == 0
    assert "going on from" in capsys.readouterr().out
    run(folder, tmp_path / "unbroken")
    ends = [toy_training.weights(top / kind / "step-000002") for top in (out, tmp_path / "unbroken")]
    assert len(ends[0]) > 20 and toy_training.same(*ends)


@pytest.mark.parametrize("script", ["vae", "clip"])
def test_a_mistake_is_one_line(script: str, root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"i2v.training.{script}", "--init", "nowhere", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    told = done.stderr.strip()
    assert done.returncode == 1 and told.startswith(f"i2v.training.{script}: error: ") and "nowhere" in told
    assert told.count("\n") == 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tiny", "tiny-level-2", "tiny-gpu"])
def test_the_recipes_that_come_along(root: Path, name: str) -> None:
    """Every setting exists, every stage follows from the one before, and the last training is the paper's."""
    start, stages = recipe.read(root / "configs" / name)
    assert all((root / start["folder"] / file).is_file() for file in start["files"])
    kinds = {"train": Training, "vae": vae.VAETraining, "clip": clip.CLIPTraining}
    for stage in stages:
        settings = recipe.settings_of(stage, Path("out"), Path("before"), "cpu")
        cfg = config.from_dict(kinds[stage.kind], settings, stage.name)
        assert stage.name and (stage.gates or stage.name == "content")
        if stage.name == "i2v":
            assert cfg.train == ("i2v_adapter.*",) and cfg.clean_first and cfg.num_frames == 16


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE's and CLIP's stages are made for one."""
    monkeypatch.setattr(recipe, "place", lambda: Place(1, 2, 1))
    with pytest.raises(ConfigError, match="--recipe runs in one process; start it without torchrun"):
        run(tmp_path, tmp_path / "out")
