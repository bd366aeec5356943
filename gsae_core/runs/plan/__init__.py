"""What a run costs before it starts, and how far it is."""
