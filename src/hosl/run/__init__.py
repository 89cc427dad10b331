"""The only place with clocks, files, loops and printing: setting up, running, recording and reporting a run."""
