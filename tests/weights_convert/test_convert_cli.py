"""`python -m weights_convert`: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from teaching import teaches

from bench.manifests import manifests, write_sparse
from weights_convert import __main__ as cli
from weights_convert.__main__ import run
from weights_convert.rules import ConversionError

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny"


def published(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.anything"  # the content tells, not the name
    write_sparse(path, manifests(name)[name])
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict]:
    code = run([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["weights_convert", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = re.sub(r"\r[^\n]*\n?", "", capsys.readouterr().err)  # a slow machine shows a bar first
    assert stop.value.code == 2 and text.count("\n") == 1 and "Traceback" not in text
    return text


def test_inspect_motion_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = said(capsys, "inspect", published(tmp_path, "mm_sd_v15_v2"))
    assert code == 0 and facts["layout"] == "animatediff-v2" and facts["fits"] == ["sd15"]
    assert facts["max_frames"] == 32 and "linear" in facts["schedule"]
    assert facts["parts"]["motion"]["parameters"] == 453_209_280 and facts["dtypes"] == {"float32": 588}
    assert facts["needs"] == ["unet", "vae", "text_encoder", "image_encoder", "i2v_adapter", "ip_adapter"]
    assert facts["dropped"] == {"the sinusoid of 32 frame positions": 42}


def test_another_part_s_config_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flat folder of downloads: the image encoder's config.json says nothing of the motion modules."""
    file = published(tmp_path, "mm_sd_v15_v2")
    values = {"architectures": ["CLIPVisionModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
              "patch_size": 14, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224,
              "projection_dim": 1024, "hidden_act": "gelu"}  # fmt: skip
    (file.parent / "config.json").write_text(json.dumps(values))
    code, facts = said(capsys, "inspect", file)
    assert code == 0 and facts["max_frames"] == 32


def test_inspect_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(published(tmp_path, "i2v_module"))]) == 0
    text = capsys.readouterr().out
    assert "24,793,280 parameters" in text and "Stable Diffusion 1.5" in text and "i2v-adapter-sd15" in text


@pytest.mark.parametrize("name, word", [("dynamicrafter_512", "DynamiCrafter"), ("raft_things", "RAFT")])
def test_inspect_names_other_kinds(name: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path, name)
    code, facts = said(capsys, "inspect", path)
    assert code == 0 and facts["kind"] == "not supported" and word in facts["title"]
    code, facts = said(capsys, "check", path, "--for", "sd15")
    (row,) = facts["contents"]
    assert code == 1 and word in row["title"] and len(row["problems"]) == 1 and row["title"] not in row["problems"][0]


@pytest.mark.parametrize("name", ["taesd_decoder_pth", "v3_sd15_sparsectrl_rgb", "v3_sd15_sparsectrl_scribble"])
def test_gaps_in_what_has_no_network_here(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each key is needed, and each shape: the list is held against computed shapes, not against its rules alone."""
    entries = {key: value for key, value in manifests(name)[name].items() if not key.endswith(".pe")}
    path = tmp_path / "x.safetensors"
    write_sparse(path, entries)
    assert said(capsys, "check", path, "--for", "sd15")[0] == 0
    for key in list(entries)[:: max(1, len(entries) // 6)]:
        write_sparse(path, {k: v for k, v in entries.items() if k != key})
        assert said(capsys, "check", path, "--for", "sd15")[0] == 1, key
        shape = [entries[key]["shape"][0] + 1, *entries[key]["shape"][1:]]
        write_sparse(path, entries | {key: entries[key] | {"shape": shape}})
        assert said(capsys, "check", path, "--for", "sd15")[0] == 1, key


def test_what_has_no_network_here_is_not_written_as_ours(tmp_path: Path) -> None:
    path = published(tmp_path, "taesd_decoder_pth")
    for to, told in (("own", "no network here reads a taesd"), ("diffusers", "nothing that diffusers has a place for")):
        with pytest.raises(ConversionError, match=told):
            base = ["--for", "sd15"] if to != "own" else []  # the reason comes before other questions
            run(["convert", str(path), str(tmp_path / to), "--to", to, *base])
        assert not (tmp_path / to).exists()


def test_inspect_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path, "lora_kohya_sd15")
    code, facts = said(capsys, "inspect", path)
    assert code == 0 and facts["kind"] == "LoRA" and facts["fits"] == ["sd15"]
    assert said(capsys, "check", path, "--for", "sd15")[0] == 0
    assert said(capsys, "check", path, "--for", "sdxl")[0] == 1


def test_inspect_a_folder_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = said(capsys, "inspect", TINY)
    assert code == 0 and facts["needs"] == [] and len(facts["files"]) == 7
    unet = next(one for one in facts["files"] if one["kind"] == "unet")
    assert unet["parts"]["unet"]["config"]["channels"] == [96, 96] and unet["fits"] == ["tiny"]


def test_an_unknown_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    code, facts = said(capsys, "inspect", tmp_path / "x.safetensors")
    assert code == 1 and facts["kind"] == "unknown" and "no known layout" in facts["title"]
    assert "taesd" not in facts["title"], "without the list of all layouts"
    assert said(capsys, "check", tmp_path / "x.safetensors", "--for", "sd15")[0] == 1


def test_check_counts_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = said(capsys, "check", published(tmp_path, "mm_sd_v15"), "--for", "sd15")
    (row,) = facts["contents"]
    assert code == 0 and facts["fits"] and row["claimed"] == row["keys"] == 560 == sum(row["rules"].values())
    assert any("rebuilt: the sinusoid" in rule for rule in row["rules"])
    code, facts = said(capsys, "check", published(tmp_path, "mm_sd_v15"), "--for", "sdxl")
    assert code == 1 and "made for Stable Diffusion 1.5, not for SDXL" in facts["contents"][0]["problems"][0]


def test_check_names_what_is_missing_and_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = dict(manifests("i2v_module")["i2v_module"])
    gone = next(reversed(entries))
    del entries[gone]
    last = next(reversed(entries))
    entries[last] = {"shape": [7], "dtype": "float32"}
    write_sparse(tmp_path / "x", entries)
    code, facts = said(capsys, "check", tmp_path / "x", "--for", "sd15")
    assert code == 1 and "claimed 31 keys, expected 32" in " ".join(facts["contents"][0]["problems"])


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = published(tmp_path, "i2v_module")
    vae = published(tmp_path, "sd_vae_ft_mse_ldm")
    (tmp_path / "page.safetensors").write_text("<!doctype html><html></html>")
    for argv, words in {
        ("insepct", module): ["did you mean inspect?"],
        ("inspect", module, "--jsn"): ["--jsn", "did you mean --json?"],
        ("check", module, "--fro", "sd15"): ["did you mean --for?"],
        ("check", module): ["--for sd15 or --for sdxl"],
        ("check", module, "--for", "sd51"): ["sd51", "did you mean sd15?"],
        ("convert", module, tmp_path / "o"): ["--to own"],
        ("convert", module, tmp_path / "o", "--to", "difusers"): ["did you mean diffusers?"],
        ("convert", module, tmp_path / "o", "--to", "own", "--dtype", "flot16"): ["did you mean float16?"],
        ("inspect", tmp_path / "nothing.ckpt"): ["nothing.ckpt", "no such file"],
        ("inspect", tmp_path / "page.safetensors"): ["page.safetensors", "web page", "download"],
        ("convert", vae, tmp_path / "o", "--to", "own"): ["does not say which base", "--for sd15 or sdxl"],
        ("convert", module, tmp_path / "o", "--to", "own", "--for", "sdxl"): ["made for Stable Diffusion 1.5"],
        ("convert", module, tmp_path / "o", "--to", "own", "--parts", "vae"): ["no part vae", "expected i2v_adapter"],
        ("convert", module, tmp_path / "o.txt", "--to", "i2v-module"): ["o.txt", ".safetensors, .pth"],
        ("convert", module, tmp_path / "o.safetensors", "--to", "own"): ["expected a folder", "name one"],
        ("convert", module, tmp_path / "o.pth", "--to", "animatediff-v1"): ["there is no motion", "expected motion"],
        ("convert", module, tmp_path / "d", "--to", "diffusers"): ["diffusers has no place"],
        ("convert", TINY, tmp_path / "d", "--to", "diffusers"): ["patch 4", "--parts"],
        ("convert", TINY, tmp_path / "o.pth", "--to", "i2v-module"): ["base tiny"],
    }.items():
        line = refused(monkeypatch, capsys, *argv)
        assert all(word in line for word in words), (argv, line)
        if "--to" in argv and "did you mean" not in words[0]:
            teaches(line, str(argv[1]) if str(argv[1]) in line else str(argv[2]))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".anything", ".anything", ".safetensors"]


def test_nothing_is_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    assert run(["convert", str(TINY), str(folder), "--to", "own", "--parts", "unet"]) == 0
    before = (folder / "unet.safetensors").read_bytes()
    line = refused(monkeypatch, capsys, "convert", TINY, folder, "--to", "own", "--dtype", "float32")
    assert "unet.safetensors" in line and "--overwrite" in line
    assert (folder / "unet.safetensors").read_bytes() == before and len(list(folder.iterdir())) == 1
    argv = ["convert", str(TINY), str(folder), "--to", "own", "--dtype", "float32", "--overwrite"]
    assert run(argv) == 0
    new, old = load_file(folder / "unet.safetensors"), load_file(TINY / "unet.safetensors")
    assert all(torch.equal(new[key], old[key].float()) and new[key].dtype == torch.float32 for key in old)
    assert (folder / "vocab.json").exists() and (folder / "merges.txt").exists()


def test_numbers_too_large_for_a_format_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(TINY), str(tmp_path / "a"), "--to", "own", "--parts", "vae", "--dtype", "float32"]) == 0
    path = tmp_path / "a" / "vae.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["encoder.conv_in.bias"][0] = 1e6
    save_file(tensors, path, metadata)
    line = refused(monkeypatch, capsys, "convert", path, tmp_path / "b", "--to", "own", "--dtype", "float16")
    assert "encoder.conv_in.bias" in line and "65504" in line
    assert not list((tmp_path / "b").iterdir())
