"""Clients on PyTorch; each class answers only the calls that it can keep."""
