"""One metric per module."""
