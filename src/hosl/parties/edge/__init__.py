"""Clients on an inference engine, in numpy: the second runtime of a device. No torch."""
