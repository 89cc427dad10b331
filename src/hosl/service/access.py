"""Authentication: one bearer token per client, stored as a hash; and the server's certificate.

    SERVICE/clients.json      name -> SHA-256 of the token, time of enrolment, revoked or not
    SERVICE/certificate.pem   self-signed, made on first start; its fingerprint is in every join line
    SERVICE/key.pem           mode 600

`clients.json` is read again whenever it changes, so that `hosl clients revoke` takes effect on the next message.
"""

import datetime
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from hosl.errors import AccessError, ConfigError
from hosl.system.atomic import whole_file
from hosl.system.run_folder import RunLock

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_CERTIFICATE_DAYS = 825


class Access:
    """The enrolled clients of one service folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clients.json"
        self._version = (0, 0, 0)
        """Modification time, inode and size of the file that was read last."""
        self._clients: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}
        """Hash of a token -> the client's name."""
        folder.mkdir(parents=True, exist_ok=True)
        self._refresh()

    def names(self) -> list[dict[str, Any]]:
        """Every client: name, when it was enrolled, whether it is revoked. No tokens, no hashes."""
        self._refresh()
        return [
            {"name": name, "enrolled": facts["enrolled"], "revoked": facts["revoked"]}
            for name, facts in self._clients.items()
        ]

    def enrol(self, name: str) -> str:
        """Add a client; returns its token, which is stored nowhere.

        Raises:
            ConfigError: if the name is taken or not a valid one.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"client name {name!r}: 1 to 32 of a-z, 0-9, dot, hyphen, underscore, beginning with a letter or digit"
            )
        token = secrets.token_urlsafe(32)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._changing() as clients:
            if name in clients:
                raise ConfigError(
                    f"client {name} is enrolled already ({', '.join(clients)}); choose another name: a lost token "
                    "cannot be shown again, revoke it and enrol under a new name"
                )
            clients[name] = {"token_sha256": _hash(token), "enrolled": now, "revoked": False}
        return token

    def revoke(self, name: str) -> None:
        """Refuse a client from its next message on.

        Raises:
            ConfigError: if there is no such client.
        """
        with self._changing() as clients:
            if name not in clients:
                raise ConfigError(f"no client is called {name}; there are {', '.join(clients) or 'none'}")
            clients[name] = clients[name] | {"revoked": True}

    def revoked(self, name: str) -> bool:
        """Whether a client has been revoked."""
        self._refresh()
        return bool(self._clients.get(name, {}).get("revoked"))

    def client_of(self, token: str) -> str:
        """The name of the client that a token belongs to.

        Asked at every message, so it takes as long for a thousand clients as for one. What is looked up is a hash, of
        which nobody can choose a part: how long it takes tells nothing about a token.

        Raises:
            AccessError: if the token is unknown or revoked.
        """
        self._refresh()
        client = self._names.get(_hash(token))
        if client is None:
            raise AccessError(
                "this token is not known here; use a join line that `hosl clients add` printed on this server"
            )
        if self._clients[client]["revoked"]:
            raise AccessError(f"client {client} has been revoked; ask the server's owner for a new join line")
        return client

    def _refresh(self) -> None:
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            return
        version = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if version != self._version:
            self._clients = json.loads(self._file.read_text(encoding="utf-8"))
            self._names = {facts["token_sha256"]: name for name, facts in self._clients.items()}
            self._version = version

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The clients as they are on disk, to be changed and written by this process alone."""
        with RunLock(self._file.parent, file=".clients.lock", wait=True):
            self._version = (0, 0, 0)
            self._refresh()
            clients = dict(self._clients)
            yield clients
            whole_file(self._file, json.dumps(clients, indent=2).encode(), mode=0o600)
            self._refresh()


def bearer(authorization: str) -> str:
    """The token of an `authorization` header, `Bearer TOKEN`; empty when it has none."""
    kind, _, token = authorization.partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def certificate(folder: Path) -> tuple[bytes, bytes, bytes]:
    """The service's certificate and key in PEM, and the certificate in DER; made on first use.

    Raises:
        ConfigError: if the package `cryptography` is not installed.
    """
    files = folder / "certificate.pem", folder / "key.pem"
    if not all(file.is_file() for file in files):
        for file, content, mode in zip(files, _new_certificate(), (0o644, 0o600), strict=True):
            whole_file(file, content, mode=mode)
    pem, key = (file.read_bytes() for file in files)
    import ssl

    return pem, key, ssl.PEM_cert_to_DER_cert(pem.decode())


def _new_certificate() -> tuple[bytes, bytes]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ConfigError("serving needs the package cryptography; `pip install 'hosl[serve]'`") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hosl")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("hosl"), x509.DNSName("localhost")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return signed.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()
