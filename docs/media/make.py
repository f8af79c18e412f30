"""Draws the README's moving pictures with the shipped models: `python docs/media/make.py`.

One picture per row, one motion per column; the seed is 0 throughout and no clip is chosen.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from i2v.load import load
from i2v.video import read_image, write_video

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHEETS = {  # file: weights, pictures with their prompts, what fills these
    "tiny": (
        "tiny",
        (("red_ball", "a red ball {} over a blue sky"), ("purple_house", "a purple house {} over a sunset")),
        ("moves left", "moves right", "moves up", "moves down", "stays still"),
    ),
    "tiny_level_3": (
        "tiny-level-3",
        (
            ("blue_rocket", "a blue rocket {} over a brick wall"),
            ("purple_gift", "a purple gift {} over a checkerboard"),
        ),
        (
            "spins clockwise",
            "grows",
            "bounces",
            "stays still, the camera pans left",
            "stays still, the camera zooms in",
            "stays still, the picture turns clockwise",
        ),
    ),
}
SIDE, BAND, GAP = 128, 24, 4


def cell(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def sheet(weights: str, pictures: tuple[tuple[str, str], ...], motions: tuple[str, ...]) -> np.ndarray:
    """(frames, height, width, 3): the pictures at the left, each beside what becomes of it."""
    pipe = load("tiny", folder=ROOT / "weights" / weights)
    rows = []
    for name, prompt in pictures:
        path = ROOT / "examples" / f"{name}.png"
        texts = [", ".join([prompt.format(motion), *camera]) for motion, *camera in (m.split(", ") for m in motions)]
        videos = [pipe(path, text, seed=0).frames for text in texts]
        given = np.repeat(cell(read_image(path))[None], len(videos[0]), 0)
        rows.append([given, *(np.stack([*map(cell, v)]) for v in videos)])
    frames = []
    for i in range(len(rows[0][0])):
        canvas = np.full((BAND + len(rows) * (SIDE + GAP), (SIDE + GAP) * (1 + len(motions)), 3), 255, np.uint8)
        for x, word in enumerate(("the picture", *(m.split(", the ")[-1] for m in motions))):
            cv2.putText(canvas, word, (x * (SIDE + GAP) + 4, BAND - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1,
                        cv2.LINE_AA)  # fmt: skip
            for y, row in enumerate(rows):
                top, left = BAND + y * (SIDE + GAP), x * (SIDE + GAP)
                canvas[top : top + SIDE, left : left + SIDE] = row[x][i]
        frames.append(canvas)
    return np.stack(frames + [frames[-1]] * 4)  # rests at the end


def main() -> None:
    for name, (weights, pictures, motions) in SHEETS.items():
        facts = {"weights": weights, "prompts": [prompt for _, prompt in pictures]}
        print(write_video(HERE / f"{name}.webp", sheet(weights, pictures, motions), 8, facts, overwrite=True))


if __name__ == "__main__":
    main()
