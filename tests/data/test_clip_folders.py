"""What lies under a path is understood by content: folders, tables, WebVid's csv, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from i2v.data.__main__ import main
from i2v.data.dataset import open_dataset
from i2v.data.folders import DataError, Item, understand

GREY = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()


def clip(path: Path) -> Path:
    """Listing decodes nothing: the ending is enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked at")
    return path


def said(items: list[Item]) -> dict[str, str]:
    return {item.name: item.caption for item in items}


def test_a_folder_of_clips_with_captions_beside(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.webm", "deep/c.MOV", ".hidden/d.mp4"):
        clip(tmp_path / name)
    (tmp_path / "b.txt").write_text("\ufeffa red  ball\n moves\n", encoding="utf-8")
    (tmp_path / "deep" / "c.MOV.txt").write_text("grüne Wiese", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("of no clip")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    found = understand(tmp_path)
    assert found.kind == "folder of clips"
    assert said(found.items) == {"a.webm": "", "b.mp4": "a red ball moves", "deep/c.MOV": "grüne Wiese"}
    assert [item.kind for item in found.items] == ["video"] * 3
    assert found.ignored == {"other files": 1, "captions without a clip": 1}


def test_linked_folders_are_walked_once(tmp_path: Path) -> None:
    """And in no circle; a folder that lies below in its own right keeps its name, whatever links to it."""
    folder = tmp_path / "clips"
    for name in ("clips/z/a.mp4", "far/b.mp4", "far/deep/c.mp4", "far/.hidden/d.mp4", "beside.mp4"):
        clip(tmp_path / name)
    (tmp_path / "far" / "b.txt").write_text("linked along")
    links = {"clips/linked": "far", "clips/linked too": "far", "clips/a": "clips/z", "clips/z/back": "clips",
             "clips/up": "", "far/deep/home": "clips", "far/deep/up": "far", "clips/.seen": "far"}  # fmt: skip
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    (folder / "gone").symlink_to(tmp_path / "nothing")
    wanted = {"linked/b.mp4": "linked along", "linked/deep/c.mp4": "", "z/a.mp4": ""}
    assert said(understand(folder).items) == wanted and list(said(understand(folder).items)) == list(wanted)
    (tmp_path / "given by a link").symlink_to(folder, target_is_directory=True)
    assert said(understand(tmp_path / "given by a link").items) == wanted


def test_pictures_clips_and_files_without_an_ending(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(GREY)
    assert understand(tmp_path).kind == "folder of pictures only"
    (tmp_path / "download").write_bytes(b"\0\0\0\x20ftypisom" + bytes(20))
    (tmp_path / "other").write_bytes(GREY)
    found = understand(tmp_path)
    assert found.kind == "folder of clips and pictures"
    assert {item.name: item.kind for item in found.items} == {
        "a.png": "picture", "download": "video", "other": "picture",
    }  # fmt: skip


def test_one_clip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alone")
    found = understand(clip(tmp_path / "a.mp4"))
    assert found.kind == "one video" and said(found.items) == {"a.mp4": "alone"}


def test_a_caption_that_is_no_text(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (item,) = understand(tmp_path).items
    assert item.fault is not None and item.fault.reason == "caption"


@pytest.mark.parametrize("layout", ["{page}/{name}", "videos/{page}/{name}", "{name}", "videos/{name}"])
def test_webvid(tmp_path: Path, layout: str) -> None:
    place = layout.format(page="000001_000050", name="77.mp4")
    clip(tmp_path / place)
    (tmp_path / "results_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '77,https://example.org/v.mp4,PT00H00M10S,000001_000050,"Waves, and a ""dog"""\n'
        "78,https://example.org/w.mp4,PT00H00M10S,000001_000050,Not downloaded\n"
    )
    for path in (tmp_path, tmp_path / "results_train.csv"):
        found = understand(path)
        assert found.kind == "WebVid csv"
        assert said(found.items) == {place: 'Waves, and a "dog"', "000001_000050/78.mp4": "Not downloaded"}
        assert found.items[0].path.is_file()


@pytest.mark.parametrize("column", ["file_name", "video", "path", "File_Name"])
@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_tables(tmp_path: Path, column: str, caption: str) -> None:
    clip(tmp_path / "clips" / "a.mp4")
    rows = {column: "clips/a.mp4", "seconds": 3, caption: "a  ball"}
    for separator, name in ((",", "t.csv"), ("\t", "t.tsv"), (";", "s.csv")):
        lines = [separator.join(map(str, row)) for row in (rows, rows.values())]
        (tmp_path / name).write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
        assert said(understand(tmp_path / name).items) == {"clips/a.mp4": "a ball"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows) + "\n\n" + json.dumps(rows) + "\n")
    found = understand(tmp_path)  # metadata goes before other tables
    assert found.kind == "jsonl table" and len(found.items) == 2


def test_captions_cut_inside_a_character(tmp_path: Path) -> None:
    """Half of an emoji can be written to no file, so captions that hold one could be neither kept nor hashed."""
    clip(tmp_path / "a.mp4")
    lines = [r'{"path": "a.mp4", "text": "a dog \ud83d\ude00 runs \ud83d"}', r'{"path": "b.mp4", "text": "\udc00"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert said(understand(tmp_path).items) == {"a.mp4": "a dog \U0001f600 runs", "b.mp4": ""}


def test_the_first_caption_that_is_filled_counts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,text,caption\na.mp4,,a ball\nb.mp4,a box,a ball\nc.mp4,,\n")
    assert said(understand(tmp_path / "t.csv").items) == {"a.mp4": "a ball", "b.mp4": "a box", "c.mp4": ""}


def test_a_caption_with_commas_but_no_quotes_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,text\na.mp4,a dog, running\nb.mp4,"a dog, running"\nc.mp4,a 12" disc,,\n')
    items = understand(tmp_path / "t.csv").items
    assert [item.fault.detail if item.fault else item.caption for item in items] == [
        "has more columns than the head; put texts that hold a comma into quotes", "a dog, running", 'a 12" disc',
    ]  # fmt: skip


def test_names_that_no_file_can_have_are_bad_rows(tmp_path: Path) -> None:
    long = "7" * 300
    (tmp_path / "w.csv").write_text(f"videoid,contentUrl,duration,page_dir,name\n{long},u,PT,p,a\n1\0,u,PT,p,a\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"path": n}) + "\n" for n in (long, "a\0.mp4", "\ud83d.mp4")))
    for table, rows in (("w.csv", 2), ("t.jsonl", 3)):
        facts = open_dataset(tmp_path / table, 4).survey(show=False)
        assert (facts["listed"], facts["kept"]) == (rows, 0)


def test_rows_that_name_no_file_of_this_machine(tmp_path: Path) -> None:
    outside = clip(tmp_path / "elsewhere" / "b.mp4")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "m.csv").write_text(f"path,text\n,nothing\nhttps://a.b/c.mp4,far\n{outside},near\n../x.mp4\n")
    items = understand(tmp_path / "set" / "m.csv").items
    assert [item.name for item in items[:3]] == ["m.csv:2", "m.csv:3", str(outside)]
    assert [item.fault.reason if item.fault else "" for item in items] == ["bad_row", "bad_row", "", ""]
    assert items[3].caption == ""


def test_a_table_of_something_else_does_not_hide_the_clips(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    (tmp_path / "scores.csv").write_text("epoch,loss\n1,0.5\n")
    assert understand(tmp_path).kind == "folder of clips"


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "t.csv",
            "title,length\na,3\n",
            "no column of files; its columns are title, length, expected one of file_name",
        ),
        ("t.csv", "path,text\n", "has no rows"),
        ("t.csv", b"path,text\na.mp4,caf\xe9\n", "cannot be read as a UTF-8 table"),
        ("t.csv", 'path,text\na.mp4,x\nb.mp4,"never closed\nc.mp4,x\n', "quotes of the row at line 3 do not match"),
        ("t.csv", 'path,text\na.mp4,"one\nb.mp4,"two\nc.mp4,x\n', "quotes of the row at line 2 do not match"),
        ("t.jsonl", '{"path": "a.mp4"}\nnot json\n', "line 2 is no JSON"),
        ("t.jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("t.jsonl", '{"length": 3}\n', "no column of files"),
        ("t.pdf", "%PDF", "neither a clip, a picture nor a table"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as error:
        understand(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        understand(tmp_path / "missing")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"no clips or pictures in this folder \(1 .parquet\)"):
        understand(tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("path,text\nx.mp4,y\n")
    with pytest.raises(DataError, match=r"several tables \(a.csv, b.csv\)"):
        understand(tmp_path)


@pytest.mark.parametrize(
    "words, said_",
    [
        (["check", "missing"], "no such file or folder"),
        (["check", ".", "--fps", "0"], "fps=0.0"),
        (["check", ".", "--num-frames", "0"], "num_frames=0"),
        (["check", ".", "--num-frames", "4"], "folder of pictures only, and a clip has 4 frames"),
        (["check", ".", "--keep", "cuts"], "invalid choice: 'cuts'"),
        (["chek"], "invalid choice: 'chek'"),
        ([], "required: {check}"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    words: list[str],
    said_: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.png").write_bytes(GREY)
    monkeypatch.setattr("sys.argv", ["check", *(str(tmp_path) if word == "." else word for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert said_ in err and err.count("\n") == 1 and err.startswith("python -m i2v.data")
