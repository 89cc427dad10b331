"""Servers on PyTorch; they answer, they never drive."""
