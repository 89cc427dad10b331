"""Clients on PyTorch; each class has only the calls of its protocol."""
