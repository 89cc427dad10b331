"""The parties of a round of `hosl.core.rounds`: clients and servers, each with its half of the model.

`clients`, `servers` and `engine` need torch. Nothing is imported here, so that a device loads only the party it runs.
"""
