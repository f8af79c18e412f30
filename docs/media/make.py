"""Draws the README's moving picture with the shipped model: `python docs/media/make.py`.

One picture per row, one motion per column; the seed is 0 throughout and nothing is chosen.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from i2v.load import load
from i2v.video import read_image, write_video

HERE = Path(__file__).resolve().parent
ROWS = (("red_ball", "a red ball {} over a blue sky"), ("purple_house", "a purple house {} over a sunset"))
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "stays still")
SIDE, BAND, GAP = 128, 24, 4


def cell(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def main() -> None:
    pipe = load("tiny")
    rows = []
    for name, prompt in ROWS:
        path = HERE.parent.parent / "examples" / f"{name}.png"
        given = read_image(path)
        videos = [pipe(path, prompt.format(motion), seed=0).frames for motion in MOTIONS]
        rows.append([np.repeat(cell(given)[None], len(videos[0]), 0), *(np.stack([*map(cell, v)]) for v in videos)])
    frames = []
    for i in range(len(rows[0][0])):
        canvas = np.full((BAND + len(rows) * (SIDE + GAP), (SIDE + GAP) * (1 + len(MOTIONS)), 3), 255, np.uint8)
        for x, word in enumerate(("the picture", *(f"... {m} ..." for m in MOTIONS))):
            cv2.putText(canvas, word, (x * (SIDE + GAP) + 4, BAND - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1,
                        cv2.LINE_AA)
            for y, row in enumerate(rows):
                top, left = BAND + y * (SIDE + GAP), x * (SIDE + GAP)
                canvas[top : top + SIDE, left : left + SIDE] = row[x][i]
        frames.append(canvas)
    frames += [frames[-1]] * 4  # rests at the end
    print(write_video(HERE / "tiny.webp", np.stack(frames), 8, {"prompts": [p for _, p in ROWS]}, overwrite=True))


if __name__ == "__main__":
    main()
