"""Code that travels in checkpoints. Nothing in it imports this package."""
