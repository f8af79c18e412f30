"""DOVER.pth in its own names, which are ours."""

from __future__ import annotations

from weights_convert.rules import Drop, Rename, Rule


def dover(aesthetic: bool) -> list[Rule]:
    """DOVER.pth, the technical branch alone or both."""
    rules: list[Rule] = [
        Drop("{k*}.attn.relative_position_index", "it follows from the size of the windows"),
        Rename("technical_{part:backbone|head}.{k*}", "technical_{part}.{k*}"),
    ]
    if aesthetic:
        return [*rules, Rename("aesthetic_{part:backbone|head}.{k*}", "aesthetic_{part}.{k*}")]
    return [*rules, Drop("aesthetic_{part:backbone|head}.{k*}", "the technical branch alone is wanted")]
