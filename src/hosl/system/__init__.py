"""Services of the machine for a run: atomic files, checkpoints, run folders, signals, memory, progress. No torch."""
