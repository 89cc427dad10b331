"""The commands that use a model after its training."""
