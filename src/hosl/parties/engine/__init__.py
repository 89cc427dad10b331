"""What the parties on PyTorch are made of: perturbation, losses, memory, optimisers."""
