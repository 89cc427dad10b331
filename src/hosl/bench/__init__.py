"""Benchmarks of one step: time, memory, bytes, and the accuracy of the planner."""
