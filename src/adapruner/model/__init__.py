"""Models: their location, the architecture of their family, loading them, and their layers one at a time."""
