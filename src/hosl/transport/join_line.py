"""The join line hosl://host:port#token.fingerprint: all that a device needs to enrol. The fingerprint is checked here.

The fingerprint is SHA-256 of the server's certificate. A client fetches the certificate first, over TLS 1.3 and without
trusting it, compares, and then trusts this one certificate and no other.
"""

import hmac
import ipaddress
import re
import ssl
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from socket import create_connection
from typing import Any

from hosl.errors import AccessError, LinkError

_HOST_AND_PORT = r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})"
_LINE = re.compile(
    rf"hosl://{_HOST_AND_PORT}#(?P<token>[A-Za-z0-9_-]{{43}})"
    r"(?:\.(?P<fingerprint>[A-Za-z0-9_-]{43}))?"
)
_SECRET = re.compile(r"(?:.*\.)?(?=[^.]*[A-Z])[\w-]{43}(?:\..*)?")
"""A host one label of which may be a token: it would be looked up, and shown in messages."""

_NOT_YET_VALID = 9
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID."""


@dataclass(frozen=True, slots=True)
class JoinLine:
    """The address of a server, the token of a client, and the fingerprint of the server's certificate."""

    host: str
    port: int
    token: str = field(repr=False)
    """A bearer token: whoever has it is this client."""
    fingerprint: str | None = field(repr=False)
    """The value of `fingerprint_of` for the server's certificate; None: authorities vouch for the certificate."""

    @classmethod
    def parse(cls, text: str) -> "JoinLine":
        """Read a join line.

        Raises:
            AccessError: if `text` is no join line. Its message repeats nothing of it: any part may be the token.
        """
        match = _LINE.fullmatch(text.strip())
        if not match or not 0 < int(match["port"]) < 65536 or _SECRET.fullmatch(match["host"]):
            raise AccessError(
                f"the join line, {len(text.strip())} characters that are not shown, is not of the form "
                "hosl://host:port#token.fingerprint; copy the whole line that `hosl serve` or `hosl clients add` "
                "printed, in quotes"
            )
        return cls(match["host"].strip("[]"), int(match["port"]), match["token"], match["fingerprint"])

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return address_of(self.host, self.port)

    def __str__(self) -> str:
        proof = f".{self.fingerprint}" if self.fingerprint else ""
        return f"hosl://{self.address}#{self.token}{proof}"


def address_of(host: str, port: int) -> str:
    """host:port, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_public(host: str, port: int) -> None:
    """Refuse an address that cannot stand in a join line: it is not host:port, or names no one machine.

    Raises:
        AccessError: naming the address.
    """
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    address = address_of(host, port)
    allowed = re.fullmatch(_HOST_AND_PORT, address) and 0 < port < 65536 and not _SECRET.fullmatch(host)
    if everywhere or not allowed:
        raise AccessError(
            f"{address} cannot stand in a join line: it is "
            f"{'every address of this machine' if everywhere else 'not host:port'}; give the address at which "
            "devices reach this server, such as --public server.example:7070"
        )


def fingerprint_of(certificate_der: bytes) -> str:
    """SHA-256 of a certificate, base64 for URLs without padding: 43 characters."""
    return urlsafe_b64encode(sha256(certificate_der).digest()).decode().rstrip("=")


def pinned_certificate(line: JoinLine, *, timeout_s: float, identity: tuple[str, str] | None = None) -> bytes:
    """The server's certificate in PEM, if it has the line's fingerprint.

    Args:
        line: must have a fingerprint.
        timeout_s: the limit for each connection and each step of its handshake.
        identity: PEM files of our own certificate and key, for a server that wants one.

    Raises:
        AccessError: if the certificate has another fingerprint, or has expired.
        LinkError: if no server answers, or not with TLS 1.3.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # compared by hand below
    context.set_alpn_protocols(["h2"])
    if identity:
        context.load_cert_chain(*identity)
    try:
        with (
            create_connection((line.host, line.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain) as secured,
        ):
            certificate: Any = secured.getpeercert(binary_form=True)
    except OSError as cause:
        raise LinkError(
            f"no TLS 1.3 server answers at {line.address}: {cause}; check that `hosl serve` runs there and that the "
            "port is open"
        ) from cause
    assert line.fingerprint is not None, "a certificate that an authority vouches for is not pinned"
    if not hmac.compare_digest(fingerprint_of(certificate), line.fingerprint):
        swapped = hmac.compare_digest(fingerprint_of(certificate), line.token)
        raise AccessError(
            "token and fingerprint have changed places in the join line: it is hosl://host:port#token.fingerprint"
            if swapped
            else f"the server at {line.address} shows a certificate with fingerprint {fingerprint_of(certificate)}, "
            "the join line says another: somebody else answers, or the server made a new certificate; ask for a new "
            "line"
        )
    pem = ssl.DER_cert_to_PEM_cert(certificate)
    _check_dates(line, pem, timeout_s)
    return pem.encode()


def refused_certificate(line: JoinLine, authority: str | None, *, timeout_s: float) -> ssl.SSLError | None:
    """The fault of the TLS at the line's address, found by a handshake; None: there is none.

    Args:
        line: its fingerprint is not looked at.
        authority: the PEM file of the authority that must have signed the certificate; None: any that is known here.
        timeout_s: the limit for the connection and each step of its handshake.

    Raises:
        OSError: if nobody answers there.
    """
    context = ssl.create_default_context(cafile=authority)
    try:
        with create_connection((line.host, line.port), timeout=timeout_s) as plain:
            context.wrap_socket(plain, server_hostname=line.host).close()
    except ssl.SSLError as fault:
        return fault
    return None


def _check_dates(line: JoinLine, pem: str, timeout_s: float) -> None:
    """Check dates and form of a certificate, by a second handshake that trusts it alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version, context.check_hostname = ssl.TLSVersion.TLSv1_3, False
    context.load_verify_locations(cadata=pem)
    try:
        with (
            create_connection((line.host, line.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain),
        ):
            pass
    except ssl.SSLCertVerificationError as cause:
        if cause.verify_code == _NOT_YET_VALID:
            raise AccessError(
                f"the certificate of {line.address} has the right fingerprint but is not valid yet: this device's "
                f"clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC and seems to be behind; set it, then join again"
            ) from cause
        raise AccessError(
            f"the certificate of {line.address} has the right fingerprint but is not valid: {cause.verify_message}; "
            "on the server, delete certificate.pem and key.pem of the service folder, start it again, use a new line"
        ) from cause
    except OSError as cause:
        raise LinkError(f"{line.address} went away during the handshake: {cause}") from cause
