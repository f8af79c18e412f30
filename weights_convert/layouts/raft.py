"""RAFT's flow networks in the original names, which are ours, and in torchvision's."""

from __future__ import annotations

from collections.abc import Collection

from weights_convert.rules import Drop, Rebuild, Rename, Rule, prefixed

PREFIX = "module."  # the published files were saved from a network on several devices
BOTH = "{p:weight|bias}"
NORM = "{p:weight|bias|running_mean|running_var}"
COUNTER = Drop("{k*}.num_batches_tracked", "a counter of training")


def raft_original(keys: Collection[str]) -> list[Rule]:
    """raft-things.pth, -sintel, -kitti, -chairs and raft-small.pth, with and without their prefix."""
    rules: list[Rule] = [
        COUNTER,
        Rebuild(
            "cnet.layer{n:[23]}.0.norm3.{k}",
            "cnet.layer{n}.0.downsample.1.{k}",
            lambda x: x,
            why="the norm of the shortcut is stored twice, as downsample.1 too",
        ),
        Rename("{part:fnet|cnet|update_block}.{k*}", "{part}.{k*}"),
    ]
    return prefixed(rules, PREFIX if any(key.startswith(PREFIX) for key in keys) else "")


def raft_torchvision(small: bool) -> list[Rule]:
    """raft_large_C_T_V1 and raft_small_C_T_V1, torchvision's port of the same weights."""
    rules: list[Rule] = [COUNTER]
    for theirs, ours in (("feature_encoder", "fnet"), ("context_encoder", "cnet")):
        block = r"layer{n:\d}.{b:\d}"
        normed = not small and ours == "cnet"
        rules += [
            Rename(f"{theirs}.convnormrelu.0.{BOTH}", f"{ours}.conv1.{BOTH}", expect=2),
            Rename(rf"{theirs}.{block}.convnormrelu{{c:\d}}.0.{BOTH}", rf"{ours}.{block}.conv{{c:\d}}.{BOTH}"),
            Rename(f"{theirs}.{block}.downsample.0.{BOTH}", f"{ours}.{block}.downsample.0.{BOTH}", expect=4),
            Rename(f"{theirs}.conv.{BOTH}", f"{ours}.conv2.{BOTH}", expect=2),
        ]
        if normed:
            rules += [
                Rename(f"{theirs}.convnormrelu.1.{NORM}", f"{ours}.norm1.{NORM}", expect=4),
                Rename(rf"{theirs}.{block}.convnormrelu{{c:\d}}.1.{NORM}", rf"{ours}.{block}.norm{{c:\d}}.{NORM}"),
                Rename(f"{theirs}.{block}.downsample.1.{NORM}", f"{ours}.{block}.downsample.1.{NORM}", expect=8),
            ]
    motion, ours = "update_block.motion_encoder", "update_block.encoder"
    gru = r"update_block.recurrent_block.convgru{n:\d}.conv{g:z|r|q}"
    rules += [
        Rename(rf"{motion}.convcorr{{n:\d}}.0.{BOTH}", rf"{ours}.convc{{n:\d}}.{BOTH}"),
        Rename(rf"{motion}.convflow{{n:\d}}.0.{BOTH}", rf"{ours}.convf{{n:\d}}.{BOTH}", expect=4),
        Rename(f"{motion}.conv.0.{BOTH}", f"{ours}.conv.{BOTH}", expect=2),
        Rename("update_block.flow_head.{k*}", "update_block.flow_head.{k*}", expect=4),
    ]
    if small:
        return [*rules, Rename(f"{gru}.{BOTH}", f"update_block.gru.conv{{g}}.{BOTH}", expect=6)]
    return [
        *rules,
        Rename(f"{gru}.{BOTH}", rf"update_block.gru.conv{{g}}{{n:\d}}.{BOTH}", expect=12),
        Rename(f"mask_predictor.convrelu.0.{BOTH}", f"update_block.mask.0.{BOTH}", expect=2),
        Rename(f"mask_predictor.conv.{BOTH}", f"update_block.mask.2.{BOTH}", expect=2),
    ]


def raft_rules(keys: Collection[str]) -> list[Rule]:
    """The rules for a file with these keys."""
    if any(key.startswith("feature_encoder.") for key in keys):
        return raft_torchvision(small=not any(key.startswith("mask_predictor.") for key in keys))
    return raft_original(keys)
