"""The messages of proto/hosl/v1/hosl.proto, and the arrays and targets that travel in them.

`hosl_pb2` is generated (`make proto`); its messages are the message types, there is no second set (docs/adr/0004).
Bytes from a peer are checked here before anything is allocated for them. Nothing here unpickles. No torch here.
"""
