"""`python -m gsae_core`: argv in, lines out."""
