"""The machine under a run: atomic files, checkpoints, run folders, signals, memory, progress. No torch."""
