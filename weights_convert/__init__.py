"""Reads and writes published checkpoint files, with every key accounted for."""
