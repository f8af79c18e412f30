"""The rule engine: who claims a key, what is an error, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weights_convert.rules import (
    CONV_TO_LINEAR,
    TRANSPOSE,
    ConversionError,
    Drop,
    Join,
    Lookup,
    Rebuild,
    Rename,
    Rule,
    Split,
    convert,
    inverted,
    load_strict,
    match,
    prefixed,
)


def numbered(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}


def fails(tensors: dict[str, torch.Tensor], rules: list[Rule], *says: str) -> None:
    """Conversion fails, and the message names the file, the layout and all of `says`."""
    with pytest.raises(ConversionError) as caught:
        convert(tensors, rules, "layout-x", "file-y.pth")
    for word in ("file-y.pth", "layout-x", *says):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "template, key, values",
    [
        ("a.{x}.c", "a.b.c", {"x": "b"}),
        ("a.{x}.c", "a.b.b.c", None),
        ("a.{x*}.c", "a.b.b.c", {"x": "b.b"}),
        (r"a.{n:\d+}", "a.12", {"n": "12"}),
        (r"a.{n:\d+}", "a.1b", None),
        (r"a.{n:\d{2}}", "a.12", {"n": "12"}),
        ("{p:weight|bias}", "bias", {"p": "bias"}),
        ("{p:weight|bias}", "biases", None),
        ("a.b", "axb", None),
        ("a.b", "a.b", {}),
    ],
)
def test_templates(template: str, key: str, values: dict[str, str] | None) -> None:
    assert match(template, key) == values


def test_the_first_rule_claims() -> None:
    rules: list[Rule] = [Rename("a.{x}", "special.{x}"), Rename("{p*}", "rest.{p}")]
    out, report = convert(numbered("a.1", "a.2.3"), rules, "x")
    assert list(out) == ["special.1", "rest.a.2.3"]
    assert sorted(report.values()) == [1, 1]


def test_every_problem_is_shown_at_once() -> None:
    rules: list[Rule] = [Rename("a.{x}", "t", expect=3), Rename("never", "seen")]
    with pytest.raises(ConversionError) as caught:
        convert(numbered("a.1", "a.2", "stray"), rules, "x")
    text = str(caught.value)
    assert "stray (2,): no rule claims it" in text
    assert "a.2: t was already written from a.1" in text
    assert "claimed 2 keys, expected 3" in text
    assert "never -> seen: matched nothing" in text
    assert "4 problems" in text


def test_optional_rules_may_claim_nothing() -> None:
    out, _ = convert(numbered("a"), [Rename("a", "b"), Rename("c", "d", optional=True), Drop("e", "a reason")], "x")
    assert list(out) == ["b"]


def test_dropping_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Drop("a", "")


def test_long_lists_are_cut() -> None:
    with pytest.raises(ConversionError, match="and 26 more"):
        convert(numbered(*(f"k{i}" for i in range(30))), [], "x")


def test_split_and_join() -> None:
    rules: list[Rule] = [Split("{n}.qkv", ("{n}.q", "{n}.k", "{n}.v"), expect=2)]
    source = {"0.qkv": torch.arange(12.0).reshape(6, 2), "1.qkv": torch.arange(3.0)}
    out, _ = convert(source, rules, "x")
    assert torch.equal(out["0.k"], source["0.qkv"][2:4]) and out["1.v"].tolist() == [2.0]
    back, _ = convert(out, inverted(rules), "x")
    assert all(torch.equal(back[key], source[key]) for key in source) and len(back) == 2
    assert inverted(inverted(rules)) == rules
    del out["0.k"]
    fails(out, inverted(rules), "0.qkv", "2 of its 3 blocks", "claimed 5 keys, expected 6")
    fails({"0.qkv": torch.zeros(4, 2)}, rules, "0.qkv", "3 equal blocks")
    assert isinstance(inverted(rules)[0], Join)


def test_ops_and_their_inverse() -> None:
    rules: list[Rule] = [Rename("a", "b", op=TRANSPOSE), Rename("c", "d", op=CONV_TO_LINEAR)]
    source = {"a": torch.arange(6.0).reshape(2, 3), "c": torch.arange(6.0).reshape(2, 3, 1, 1)}
    out, _ = convert(source, rules, "x")
    assert torch.equal(out["b"], source["a"].T) and out["d"].shape == (2, 3)
    back, _ = convert(out, inverted(rules), "x")
    assert all(torch.equal(back[key], source[key]) for key in source)
    fails({"a": torch.zeros(2), "c": torch.zeros(2, 3, 3, 3)}, rules, "a: expected a matrix", "c: expected the weight")


def test_an_inverted_rule_matches_no_more_than_it_should() -> None:
    rules: list[Rule] = [Rename("x.{kv:k|v}", "y.{kv}")]
    fails(numbered("y.k", "y.q"), inverted(rules), "y.q (2,): no rule claims it")


def test_names_that_a_table_leads_back() -> None:
    """Each key of the table goes where the rules send the name it stands for, all of them have to be there."""
    back = (Rename("{n}.w", "new.{n}"),)
    rules: list[Rule] = [Lookup({"0w": "0.w", "1w": "1.w"}, back, "names without dots"), Rename("{n}.w", "plain.{n}")]
    source = {"1w": torch.ones(1), "0w": torch.zeros(1), "2.w": torch.ones(1)}
    out, report = convert(source, rules, "x")
    assert {k: v.item() for k, v in out.items()} == {"new.0": 0, "new.1": 1, "plain.2": 1}
    assert report["names without dots"] == 2
    fails({"0w": torch.zeros(1), "2.w": torch.ones(1)}, rules, "names without dots: claimed 1 keys, expected 2")
    fails(source | {"2w": torch.zeros(1)}, rules, "2w (1,): no rule claims it")
    fails({"0w": torch.zeros(1)}, [Lookup({"0w": "0.other"}, back, "a table")], "0w (1,): no rule claims it")
    moved = prefixed(rules, "in.", "out.")
    assert "out.new.1" in convert({f"in.{k}": v for k, v in source.items()}, moved, "x")[0]
    assert len(inverted(rules)) == 1  # a table is never written


def test_prefixes() -> None:
    rules = prefixed([Rename("a", "b"), Split("c", ("d", "e")), Drop("f", "why")], "in.", "out.")
    out, _ = convert(numbered("in.a", "in.c", "in.f"), rules, "x")
    assert list(out) == ["out.b", "out.d", "out.e"]
    back, _ = convert(out, inverted(rules), "x")
    assert sorted(back) == ["in.a", "in.c"]


def test_rebuilt_keys() -> None:
    table = Rebuild("{n}.table", "{n}.w", lambda w: torch.arange(len(w)).float(), why="a count")
    rules: list[Rule] = [table, Rename("{n}.w", "m.{n}.w")]
    source = {"0.w": torch.zeros(3), "0.table": torch.arange(3.0)}
    out, _ = convert(source, rules, "x")
    assert list(out) == ["m.0.w"]
    back, _ = convert(out, inverted(rules), "x")
    assert back.keys() == source.keys() and torch.equal(back["0.table"], source["0.table"])
    moved = prefixed(inverted(prefixed(rules, "p.", "q.")), "", "")
    assert sorted(convert({"q.m.0.w": torch.zeros(3)}, moved, "x")[0]) == ["p.0.table", "p.0.w"]
    fails(source | {"0.table": torch.ones(3)}, rules, "0.table", "a count")
    fails(source | {"0.table": torch.ones(4)}, rules, "0.table: shape (4,), expected (3,)")
    fails({"0.w": torch.zeros(3), "1.table": torch.zeros(3)}, rules, "1.table", "beside 1.w")


def test_strict_loading() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    load_strict(module, good, "f: linear")
    assert not module.weight.is_meta and torch.equal(module.weight, good["weight"])
    wrong = {"weight": torch.ones(3, 3), "extra": torch.zeros(1)}
    with pytest.raises(ConversionError) as caught:
        load_strict(module, wrong, "f: linear")
    for words in ("f: linear", "bias: missing, expected (2,)", "extra (1,)", "weight: file (3, 3), model (2, 3)"):
        assert words in str(caught.value)
