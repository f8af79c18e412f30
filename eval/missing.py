"""What a metric raises when its network was not given."""

from __future__ import annotations


class MissingNetwork(ValueError):
    """A metric's network was not given. The message says which files it needs; a table leaves the column empty."""
