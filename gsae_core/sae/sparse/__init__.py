"""The exact sparse step on a CPU."""
