"""One published file format per module, as declarative rules."""
