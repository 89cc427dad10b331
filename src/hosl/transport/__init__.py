"""The transport of bytes: connections to a server, and a link emulator for tests and studies. No torch here."""
