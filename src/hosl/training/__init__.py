"""One run in one process, from its start to its end: setup, loop, evaluation, checkpoints, export."""
