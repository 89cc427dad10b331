"""The training of one run: setup, loop, evaluation, checkpoints, export."""
