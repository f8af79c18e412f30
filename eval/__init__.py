"""Measures generated videos."""
