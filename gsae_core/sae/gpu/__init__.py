"""The exact sparse step in Triton."""
