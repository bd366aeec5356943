"""The feature index: where each latent fires, in files that are read a piece at a time."""
