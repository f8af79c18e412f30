"""Rows of ids, what is cut, the files, and vocabularies learnt from captions."""

from __future__ import annotations

import gzip
import hashlib
import random
from importlib import resources
from pathlib import Path

import pytest
import torch

from i2v.data import learn_bpe
from i2v.models.tokenizer import END, START, Tokenizer, parse_merges, vocabulary

CAPTIONS = ["a red ball moves left", "a blue star moves right", "a red star stays", "the red ball moves up"]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


def test_the_shipped_merges_are_the_published_file(clip: Tokenizer) -> None:
    packed = resources.files("i2v.models").joinpath("data/clip_merges.txt.gz").read_bytes()
    assert len(packed) < 210_000
    digest = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    # merges.txt of CLIP, SD1.5 and SDXL
    assert digest == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert len(clip.vocab) == 49408 and (clip.bos_id, clip.eos_id) == (49406, 49407)


def test_rows(clip: Tokenizer) -> None:
    one = clip.encode("a photo of a cat")
    assert one.shape == (1, 77) and one.dtype == torch.long
    assert one[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert clip.encode(["", "a photo of a cat"], length=8).tolist() == [[49406] + [49407] * 7, one[0, :8].tolist()]
    assert clip.encode([]).shape == (0, 77)


def test_padding_of_the_second_sdxl_encoder() -> None:
    row = Tokenizer.clip(pad_token="!").encode("a cat", length=6)[0].tolist()
    assert row == [49406, 320, 2368, 49407, 0, 0]


def test_what_is_cut(clip: Tokenizer) -> None:
    assert clip.truncated("a cat on a sofa") == ""
    assert clip.truncated("A cat on a sofa", length=5) == "a sofa"
    assert clip.encode("A cat on a sofa", length=5)[0].tolist() == [49406, *clip.ids("a cat on"), 49407]
    exact = " ".join(["word"] * 75)
    assert clip.truncated(exact) == "" and clip.truncated(f"{exact} café") == "café"


def test_decode_reverses_ids(clip: Tokenizer) -> None:
    assert clip.decode(clip.ids("Ein Café, 日本 🙂!")) == "ein café , 日本 🙂!"
    assert clip.decode(clip.encode("a cat")[0].tolist()) == "a cat"


def test_special_tokens_in_the_text(clip: Tokenizer) -> None:
    assert clip.ids(f"{START}hi{END} x") == [clip.bos_id, *clip.ids("hi"), clip.eos_id, *clip.ids("x")]
    assert clip.eos_id not in clip.ids(END.upper())


def test_errors(clip: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lacks 1 symbols that are needed, first 'ab'"):
        Tokenizer(vocabulary([]), [("a", "b")])
    with pytest.raises(ValueError, match="first '<pad>'"):
        Tokenizer(vocabulary([]), [], pad_token="<pad>")
    with pytest.raises(ValueError, match="line 2: expected two symbols"):
        parse_merges("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="at least 3"):
        clip.encode("a", length=2)


def test_learnt_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n")
    learn_bpe.main(["--captions", str(captions), "--out", str(tmp_path / "vocab"), "--merges", "200"])
    assert "4 captions" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "vocab").iterdir()) == ["merges.txt", "vocab.json"]
    own = Tokenizer.from_files(tmp_path / "vocab/vocab.json", tmp_path / "vocab/merges.txt", length=12)
    # enough merges: each known word is one symbol, any other text still has ids
    assert [len(own.ids(c)) for c in CAPTIONS] == [len(c.split()) for c in CAPTIONS]
    assert own.decode(own.ids("purple ÿ 7")) == "purple ÿ 7"
    assert own.encode(CAPTIONS).shape == (4, 12)
    assert own.eos_id == len(own.vocab) - 1 == max(own.vocab.values())


def test_learning_depends_on_the_captions_alone() -> None:
    shuffled = CAPTIONS * 3
    random.Random(0).shuffle(shuffled)
    assert learn_bpe.learn(shuffled, 20) == learn_bpe.learn(CAPTIONS, 20)
    assert len(learn_bpe.learn(CAPTIONS, 20)) == 20
    assert learn_bpe.learn(["aaa aaa", "ab"], 1) == [("a", "a")]
    assert learn_bpe.learn([], 5) == []


def test_learning_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        learn_bpe.main(["--captions", str(tmp_path / "none.txt")])
