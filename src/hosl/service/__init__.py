"""The server process around a ServerSide: who may speak, how much, in which order; what is remembered. No torch."""
