"""Parties behind a transport: the server as its client sees it, shared halves, compression."""
