"""The algorithm, pure: numbers and arrays in, numbers and arrays out. numpy and the standard library only.

No file, socket, clock, logger or configuration is touched here; `rounds` is the place to start reading.
"""
