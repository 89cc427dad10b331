"""The server process around server halves: access, limits, scheduling, sessions and runs. No torch."""
