"""The components of the parties on PyTorch: perturbation, losses, memory, optimisers."""
