"""A proxy that keeps every byte that a client sends, and takes gRPC's messages out of them."""

import socket
import struct
import threading


class Recorder:
    """Listens on loopback, forwards to `target`, and remembers what came from the client's side, per connection."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self.sent.append(bytearray())
            threading.Thread(target=self._carry, args=(near, far, self.sent[-1]), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, None), daemon=True).start()

    @staticmethod
    def _carry(source, sink, kept):
        with source:
            while True:
                try:
                    data = source.recv(1 << 16)
                    if kept is not None:
                        kept += data
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)
                except OSError:
                    return


def messages(stream):
    """The gRPC messages in one connection's bytes; every byte is accounted for as an HTTP/2 frame."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert stream.startswith(preface)
    place, data = len(preface), {}
    while place < len(stream):
        length = int.from_bytes(stream[place : place + 3], "big")
        kind, flags = stream[place + 3], stream[place + 4]
        identity = int.from_bytes(stream[place + 5 : place + 9], "big") & 0x7FFFFFFF
        payload = bytes(stream[place + 9 : place + 9 + length])
        if kind == 0:  # DATA
            assert not flags & 8, "padding was not expected"
            data[identity] = data.get(identity, b"") + payload
        place += 9 + length
    found = []
    for content in data.values():
        at = 0
        while at + 5 <= len(content):
            compressed, length = struct.unpack(">BI", content[at : at + 5])
            assert not compressed
            found.append(content[at + 5 : at + 5 + length])
            at += 5 + length
    return found
