"""docs/manifests.md: every key list has its row, and the rows are what `python -m bench.manifests` prints today."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.manifests import manifests, row

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    line.split("`")[1]: [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (ROOT / "docs" / "manifests.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
}


def test_every_key_list_has_its_row() -> None:
    assert ROWS.keys() == manifests("").keys() and len(ROWS) >= 69
    assert all("PROBLEM" not in cell for cells in ROWS.values() for cell in cells)
    assert all(cells[2] == cells[3] or cells[3] == "named" for cells in ROWS.values())


@pytest.mark.parametrize(
    "name", ["i2v_module", "mm_sd_v15_v2", "lora_peft_sd15_lora_A_B", "raft_small", "ip_adapter_sd15"]
)
def test_rows_are_what_the_command_prints(name: str, tmp_path: Path) -> None:
    cells, well = row(name, manifests(name)[name], tmp_path)
    cells = [cell.strip() for cell in ("| " + " | ".join(cells) + " |").strip("| ").split(" | ")]
    assert well and cells[:6] == ROWS[name][:6]


def test_a_key_too_many_is_seen(tmp_path: Path) -> None:
    entries = manifests("i2v_module")["i2v_module"]
    cells, well = row("x", {**entries, "odd.weight": {"shape": [2], "dtype": "float32"}}, tmp_path)
    assert not well and "no rule claims it" in cells[4]
    short = dict(list(entries.items())[:-1])
    assert not row("x", short, tmp_path)[1]
