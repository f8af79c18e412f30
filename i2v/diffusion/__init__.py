"""Schedules, samplers, guidance and losses; a model is a callable here."""
