"""Servers on PyTorch; they only reply to calls."""
