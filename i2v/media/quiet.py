"""OpenCV without its own lines on the terminal: what failed is said once, by the error that is raised."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import cv2


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Silences OpenCV's log inside the block and gives it its level back.

    FFmpeg's lines inside OpenCV have one switch, read when the first video is opened; a user's own setting stays.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)
