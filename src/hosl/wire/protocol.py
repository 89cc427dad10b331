"""The numbers of the protocol that a Hello says."""

PROTOCOL = 1
PERSONAL_PROTOCOL = 2
"""The protocol of a Hello with server adapters of each client: a server that knows none must not overlook them."""


def spoken_protocol(*, personal: bool) -> int:
    """The number of a Hello; `personal`: whether each client has server adapters of its own."""
    return PERSONAL_PROTOCOL if personal else PROTOCOL
