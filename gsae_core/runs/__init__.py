"""A run's folder and the processes that fill it."""
