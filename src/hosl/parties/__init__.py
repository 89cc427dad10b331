"""Who holds a half: clients and servers that a round of `hosl.core.rounds` can talk to.

`torch_client` and `torch_server` need torch and do not know each other; nothing is imported here, so that a device
loads only the party it runs.
"""
