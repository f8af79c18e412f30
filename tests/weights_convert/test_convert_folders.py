"""Folders that are converted: what is read of them, what their parts say of it, and what an older one leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert_round_trips import CONTENT, OWN, UNETS, random_tensors, same

from i2v.diffusion.schedule import ANIMATEDIFF_SD15
from i2v.parts import save_part
from weights_convert.__main__ import run
from weights_convert.contents import look
from weights_convert.inspect_file import inspect
from weights_convert.rules import ConversionError

ROOT = Path(__file__).resolve().parents[2]
TINY, CONTROL = ROOT / "weights" / "tiny", ROOT / "weights" / "tiny-control"
INPAINTING = {
    "_class_name": "UNet2DConditionModel", "in_channels": 9, "out_channels": 4, "cross_attention_dim": 8,
    "block_out_channels": [32], "down_block_types": ["CrossAttnDownBlock2D"], "attention_head_dim": 4,
    "layers_per_block": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parts of our own, and those as a diffusers folder beside them."""
    folder = tmp_path_factory.mktemp("made")
    for part in ("unet", "vae", "text_encoder", "image_encoder"):
        config = OWN["sd15"][part]
        tensors = random_tensors(part, config, UNETS["sd15"], 1)
        save_part(folder / "own" / f"{part}.safetensors", tensors, config, family="sd15", dtype=torch.float32)
    tokens = [*(f"w{i}" for i in range(97)), "<|startoftext|>", "<|endoftext|>"]
    (folder / "own" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(tokens)}))
    (folder / "own" / "merges.txt").write_text("#version: 0.2\n")
    assert run(["convert", str(folder / "own"), str(folder / "theirs"), "--to", "diffusers"]) == 0
    return folder


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def sources(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(metadata(path)["sources"])
    return found


def test_shards_of_an_older_network_do_not_stay(made: Path, tmp_path: Path) -> None:
    """diffusers takes an index of shards before the file itself."""
    diffusers = pytest.importorskip("diffusers")
    old = diffusers.UNet2DConditionModel.from_pretrained(made / "theirs" / "unet")
    old.load_state_dict({key: torch.zeros_like(value) for key, value in old.state_dict().items()})
    for variant in (None, "fp16"):
        old.save_pretrained(tmp_path / "unet", max_shard_size="100KB", variant=variant)
    kept = tmp_path / "vae" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    kept.parent.mkdir()
    kept.touch()
    assert len(list((tmp_path / "unet").glob("*-of-*"))) > 2
    argv = ["convert", str(made / "own"), str(tmp_path), "--to", "diffusers", "--overwrite", "--parts", "unet"]
    assert run(argv) == 0
    names = sorted(path.name for path in (tmp_path / "unet").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"] and kept.exists()
    new = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    same(dict(new.state_dict()), load_file(made / "own" / "unet.safetensors"))


def test_sources_are_the_files_that_were_read(made: Path, tmp_path: Path) -> None:
    """A part beside UNet, VAE and text encoders counts; one that was not asked for does not."""
    theirs = tmp_path / "theirs"
    shutil.copytree(made / "theirs", theirs)
    encoder = theirs / "image_encoder" / "model.safetensors"

    def converted(name: str, *parts: str) -> str:
        argv = ["convert", str(theirs), str(tmp_path / name), "--to", "own", "--for", "sd15", "--parts", *parts]
        assert run(argv) == 0
        return sources(tmp_path / name / f"{parts[0]}.safetensors")["theirs"]

    digest = hashlib.sha256(encoder.read_bytes()).hexdigest()
    listed = hashlib.sha256(f"image_encoder/model.safetensors {digest}\n".encode()).hexdigest()
    assert converted("a", "image_encoder") == listed
    unet, both = converted("b", "unet"), converted("c", "image_encoder", "unet")
    tensors = load_file(encoder)
    save_file({key: value + 1 for key, value in tensors.items()}, encoder)
    assert converted("d", "unet") == unet and converted("e", "image_encoder", "unet") != both


def test_a_folder_without_a_unet(made: Path, tmp_path: Path) -> None:
    argv = ["convert", str(made / "own"), str(tmp_path / "d"), "--to", "diffusers", "--parts", "vae", "image_encoder"]
    assert run(argv) == 0
    assert run(["convert", str(tmp_path / "d"), str(tmp_path / "back"), "--to", "own"]) == 0
    for part in ("vae", "image_encoder"):
        same(load_file(tmp_path / "back" / f"{part}.safetensors"), load_file(made / "own" / f"{part}.safetensors"))


def test_an_index_of_shards_is_hashed_with_them(made: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(made / "theirs" / "unet")
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    (index,) = tmp_path.glob("*.index.json")
    found = []
    for name in ("a", "b"):
        assert run(["convert", str(index), str(tmp_path / name), "--to", "own"]) == 0
        found.append(sources(tmp_path / name / "unet.safetensors")[index.name])
        shard = sorted(tmp_path.glob("*-00001-of-*"))[0]
        save_file({key: value + 1 for key, value in load_file(shard).items()}, shard)
    assert found[0] != found[1]


def test_a_part_under_another_name(tmp_path: Path) -> None:
    """The miniature's ControlNet is called after its pictures, as --control takes it."""
    path = CONTROL / "canny.safetensors"
    facts = inspect(path)
    assert facts["kind"] == "controlnet" and set(facts["parts"]) == {"controlnet"}
    assert run(["convert", str(path), str(tmp_path), "--to", "own", "--parts", "controlnet"]) == 0
    same(load_file(tmp_path / "controlnet.safetensors"), load_file(path))
    shutil.copy(path, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="a second controlnet in .*, expected one; give the file that you mean"):
        run(["convert", str(tmp_path), str(tmp_path / "b"), "--to", "own"])


def test_the_vocabulary_goes_with_the_text_encoder(made: Path, tmp_path: Path) -> None:
    own, target = tmp_path / "own", tmp_path / "new"
    shutil.copytree(made / "own", own)
    argv = ["convert", str(own), str(target), "--to", "own", "--parts", "text_encoder"]
    assert run(argv) == 0
    words = json.loads((own / "vocab.json").read_text())
    (target / "vocab.json").write_text(json.dumps(words, indent=1))  # the same words, laid out otherwise
    (target / "text_encoder.safetensors").unlink()
    assert run(argv) == 0

    (own / "vocab.json").write_text(json.dumps({f"other {word}": number for word, number in words.items()}))
    (target / "text_encoder.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"vocab\.json: of another tokenizer .*expected the same; name another"):
        run(argv)
    assert not (target / "text_encoder.safetensors").exists()
    assert run([*argv, "--overwrite"]) == 0
    assert (target / "vocab.json").read_text() == (own / "vocab.json").read_text()


def test_a_folder_of_an_inpainting_model_is_named(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(32, 9, 3, 3)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(INPAINTING))
    assert "inpainting" in inspect(tmp_path)["title"]


def test_a_part_of_a_folder_that_is_not_known_is_named(made: Path, tmp_path: Path) -> None:
    """Motion modules of a size of one's own: their config.json does not say all that a network needs."""
    theirs = tmp_path / "theirs"
    shutil.copytree(made / "theirs", theirs)
    adapter = theirs / "motion_adapter" / "diffusion_pytorch_model.safetensors"
    adapter.parent.mkdir()
    save_file({"a.weight": torch.zeros(2)}, adapter)
    rest = "give --parts unet vae text_encoder image_encoder"
    with pytest.raises(ConversionError, match=f"(?s)theirs/motion_adapter: its 1 tensors .* {rest}"):
        run(["convert", str(theirs), str(tmp_path / "o"), "--to", "own"])
    with pytest.raises(ConversionError, match="theirs/motion_adapter: its 1 tensors"):
        run(["convert", str(theirs), str(tmp_path / "o"), "--to", "own", "--parts", "unet", "motion"])
    assert not (tmp_path / "o").exists()


def test_parts_do_not_hide_why_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(320, 9, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="an inpainting model"):
        run(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "o"), "--to", "own", "--parts", "unet"])


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY)
    assert run(["convert", ".", str(tmp_path), "--to", "own", "--parts", "i2v_adapter"]) == 0
    path = tmp_path / "i2v_adapter.safetensors"
    assert json.loads(metadata(path)["recipe"]) and "tiny" in sources(path)


def test_a_link_to_nothing_is_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "unet.safetensors"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match="already there"):
        run(["convert", str(TINY), str(tmp_path), "--to", "own", "--parts", "unet"])
    assert link.is_symlink()


@pytest.mark.parametrize("to", ["own", "diffusers"])
def test_what_was_written_before_an_error_is_told(to: str, made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(made / "own", own)
    tensors, facts = load_file(own / "vae.safetensors"), metadata(own / "vae.safetensors")
    tensors["encoder.conv_in.bias"][0] = 1e6
    save_file(tensors, own / "vae.safetensors", facts)
    parts = ["--parts", "text_encoder", "vae", "unet"]
    with pytest.raises(ConversionError, match="encoder.conv_in.bias; .*(?s:.)already written: (.*)") as caught:
        run(["convert", str(own), str(tmp_path / "new"), "--to", to, "--dtype", "float16", *parts])
    told = {Path(name) for name in str(caught.value).rpartition("already written: ")[2].split(", ")}
    assert told == set((tmp_path / "new").rglob("*.safetensors")) != set()


# --- one file -------------------------------------------------------------------------------------------------------


def test_a_torch_file_of_an_ip_adapter_is_nested(tmp_path: Path) -> None:
    """As published, and as diffusers reads it; the safetensors file is flat."""
    tensors = random_tensors("ip_adapter", CONTENT, UNETS["sd15"], 1)
    save_part(tmp_path / "own" / "ip_adapter.safetensors", tensors, CONTENT, family="sd15", dtype=torch.float32)
    unet = random_tensors("unet", UNETS["sd15"], UNETS["sd15"], 2)
    save_part(tmp_path / "own" / "unet.safetensors", unet, UNETS["sd15"], family="sd15", dtype=torch.float32)
    for ending in (".bin", ".safetensors"):
        argv = ["convert", str(tmp_path / "own"), str(tmp_path / f"x{ending}"), "--to", "ip-adapter-plus-sd15"]
        assert run(argv) == 0
    nested, flat = torch.load(tmp_path / "x.bin", weights_only=True), load_file(tmp_path / "x.safetensors")
    assert set(nested) == {"image_proj", "ip_adapter"}
    same({f"{group}.{key}": value for group, inside in nested.items() for key, value in inside.items()}, flat)


def test_positions_are_written_in_the_number_format_of_the_weights(tmp_path: Path) -> None:
    config = OWN["sd15"]["motion"]
    for part, given in (("motion", config), ("unet", UNETS["sd15"])):
        extra = {"schedule": ANIMATEDIFF_SD15} if part == "motion" else {}
        tensors = random_tensors(part, given, UNETS["sd15"], 1)
        save_part(tmp_path / "own" / f"{part}.safetensors", tensors, given, family="sd15", **extra)
    path = tmp_path / "x.safetensors"
    assert run(["convert", str(tmp_path / "own"), str(path), "--to", "animatediff-v1"]) == 0
    written = load_file(path)
    assert any(key.endswith(".pe") for key in written) and {v.dtype for v in written.values()} == {torch.float16}


@pytest.mark.parametrize("sharded", [False, True])
def test_eight_bit_floats_stay_on_the_disk_until_they_are_written(sharded: bool, made: Path, tmp_path: Path) -> None:
    folder, kind = tmp_path / "image_encoder", torch.float8_e4m3fn
    shutil.copytree(made / "theirs" / "image_encoder", folder)
    (path,) = folder.glob("*.safetensors")
    small = {key: value.to(kind) for key, value in load_file(path).items()}
    if sharded:
        path.unlink()
        for n, keys in enumerate((list(small)[::2], list(small)[1::2]), 1):
            save_file({key: small[key] for key in keys}, folder / f"{path.stem}-0000{n}-of-00002.safetensors")
    else:
        save_file(small, path)
    (content,) = look(folder)
    assert {value.dtype for value in content.tensors.values()} == {kind}
    assert inspect(folder)["dtypes"] == {"float8_e4m3fn": len(small)}
    wanted = {key: value.half() for key, value in small.items()}
    assert run(["convert", str(folder), str(tmp_path / "own"), "--to", "own"]) == 0
    same(load_file(tmp_path / "own" / "image_encoder.safetensors"), wanted)
    assert run(["convert", str(folder), str(tmp_path / "x.pth"), "--to", "clip-vision-l14"]) == 0
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    same({key: value for key, value in written.items() if not key.endswith("position_ids")}, wanted)
