"""Training data: clips and the procedural miniature world."""
