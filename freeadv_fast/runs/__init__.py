"""A run's folder: what is written into it, read back from it, and taken elsewhere."""
