"""What things cost here, and what they cost in other libraries: `python -m gsae_core bench`."""
