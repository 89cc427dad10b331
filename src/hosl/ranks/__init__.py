"""A server half over several processes (ranks): `hosl serve --ranks`. Rank 0 serves; the others do what it tells them.

`launcher` starts the ranks of one machine, `group` joins them, `servers` are the parties of `hosl.parties.servers` with
rows and weights shared out. One process knows nothing of all this: docs/adr/0024-several-ranks.md.
"""
