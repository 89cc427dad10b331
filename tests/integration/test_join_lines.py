"""Join lines that devices can use, connections that go where the line says, and tokens that are shown nowhere."""

import dataclasses
import json
import socket
import ssl
import threading
import urllib.request

import pytest

from hosl.cli import main
from hosl.errors import AccessError, HandshakeError
from hosl.transport.channel import Channel, Patience, Proof
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.integration.certificates import issue
from tests.integration.network import Server, enrol, split

TOKEN, FINGERPRINT = "Tk" + "x" * 41, "Fp" + "y" * 41


@pytest.mark.parametrize(
    "words",
    [
        ["--public", "https://server.example:7070"],
        ["--public", "server.example:7070/"],
        ["--public", "server.example/:7070"],
        ["--public", "büro.example:7070"],
        ["--public", "fe80::1%eth0:7070"],
        ["--public", "server.example:0"],
        ["--public", "0.0.0.0:7070"],
        ["--public", "[::]:7070"],
        ["--listen", "0.0.0.0:7070"],
        ["--listen", "[::]:0"],
        ["--listen", "127.0.0.1:²"],
    ],
)
def test_an_address_that_no_device_could_join_is_refused_before_anything_is_made(
    halves, tmp_path, capsys, words
):
    service = tmp_path / "service"
    assert main(["serve", str(halves / "server"), "--service", str(service), *words]) == 2
    said = capsys.readouterr()
    assert "hosl://" not in said.out
    assert len(said.err.splitlines()) == 1
    assert not service.exists()


@pytest.mark.parametrize("public", ["my_server.local:7070", "[::1]:7070", "10.1.2.3:65535"])
def test_every_line_that_is_printed_can_be_read(halves, tmp_path, capsys, public):
    host, _, port = public.rpartition(":")
    with Server(halves / "server", tmp_path / "service", "--public", public) as server:
        for text in (server.line, enrol(tmp_path / "service", "second", capsys)):
            line = JoinLine.parse(text)
            assert (line.host, line.port) == (host.strip("[]"), int(port))
        assert f"state is kept in {tmp_path / 'service'}" in " ".join(server.said)


@pytest.mark.parametrize(
    "text",
    [
        f"hosl://server.example:7070{TOKEN}.{FINGERPRINT}",  # '#' is missing
        f"{TOKEN}.{FINGERPRINT}#",
        f"hosl://server.example:7070#{TOKEN}.{FINGERPRINT}!",
        f"hosl://server.example:0#{TOKEN}.{FINGERPRINT}",
        f"{TOKEN}",
        f"HOSL://server.example:7070#{TOKEN}",
        f"hosl://server.example:7070#{TOKEN[:20]}",  # cut while it was copied
        f"hosl://server.example:7070%23{TOKEN}.{FINGERPRINT}",
        f"hosl://{TOKEN}:7070#{FINGERPRINT}",  # it would be asked of a name server
        f"hosl://{FINGERPRINT}.{TOKEN}:7070#{FINGERPRINT}.{FINGERPRINT}",
    ],
)
@pytest.mark.parametrize("how", ["argument", "file", "file's name", "extra", "half", "client's name"])
def test_the_token_of_a_wrong_line_is_shown_nowhere(halves, tiny_run, tmp_path, capsys, text, how):
    config, half = tiny_run(), str(halves / "client")
    (tmp_path / "line").write_text(f"secret words\n{text}\n")
    words = {
        "argument": [half, "--to", text],
        "file": [half, "--to", f"@{tmp_path / 'line'}"],
        "file's name": [half, "--to", f"@{text}"],
        "client's name": [],
        "extra": [half, "--to", "hosl://a:1#" + "t" * 43, "--too", f"hosl://a:1#{text}"],
        "half": [f"hosl://a:1#{TOKEN}.{FINGERPRINT}", "--to", "hosl://a:1#" + "t" * 43],
    }[how]
    (tmp_path / "service").mkdir()
    command = ["clients", "revoke", text, "--service", str(tmp_path / "service")]
    if words:
        command = ["join", *words, "--config", str(config)]
    assert main([*command, "--json"]) != 0
    said = capsys.readouterr()
    assert "error" in said.out
    for secret in (TOKEN, TOKEN[:8], "secret words"):
        assert secret not in said.out + said.err


@pytest.mark.parametrize("place", ["--page", "--listen"])
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.1.2.3", "server.example"])
def test_plaintext_beyond_loopback_is_refused_for_the_page_too(halves, tmp_path, capsys, place, host):
    words = [
        "serve",
        str(halves / "server"),
        "--service",
        str(tmp_path / "s"),
        "--plaintext",
        place,
        f"{host}:0",
    ]
    assert main(words) == 2
    assert f"plaintext is for loopback only, got {place}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--plaintext"]])
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_variable_does_not_reroute_a_pinned_connection(
    halves, tmp_path, monkeypatch, words, variable
):
    visitors, proxy = [], socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                visitor, _ = proxy.accept()
            except OSError:
                return
            visitors.append(visitor.recv(200))
            visitor.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    with Server(halves / "server", tmp_path / "service", *words) as server:
        proxies = ("http_proxy", "https_proxy", "grpc_proxy")
        for variable in proxies:
            for name in (*proxies, "no_proxy", "no_grpc_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            proof = Proof(plaintext=bool(words))
            channel = Channel(JoinLine.parse(server.line), patience=Patience(connect_s=5.0), proof=proof)
            with pytest.raises(HandshakeError, match="the client 0"):
                channel.ask("Hello", pb.HelloRequest(), pb.HelloReply)
            channel.close()
    proxy.shutdown(socket.SHUT_RDWR)
    proxy.close()
    thread.join(10)
    assert visitors == []


def test_a_certificate_that_is_not_yet_valid_names_the_clock_of_the_device(halves, tmp_path):
    service = tmp_path / "service"
    service.mkdir()
    pem, key = issue(tmp_path, "hosl", starts_in_days=1)
    (service / "certificate.pem").write_bytes(pem.read_bytes())
    (service / "key.pem").write_bytes(key.read_bytes())
    with (
        Server(halves / "server", service) as server,
        pytest.raises(
            AccessError, match=r"not valid yet: this device's clock says 2.* UTC and seems to be behind"
        ),
    ):
        Channel(JoinLine.parse(server.line))


@pytest.fixture(scope="module")
def secured(halves, tmp_path_factory):
    with Server(halves / "server", tmp_path_factory.mktemp("lines") / "service") as server:
        yield server


def test_a_line_with_token_and_fingerprint_swapped_says_so_and_shows_neither_token_nor_line(secured):
    line = JoinLine.parse(secured.line)
    swapped = JoinLine.parse(f"hosl://{line.address}#{line.fingerprint}.{line.token}")
    with pytest.raises(AccessError, match="have changed places") as refused:
        Channel(swapped)
    assert line.token not in f"{refused.value} {swapped!r} {line!r}"


@pytest.mark.parametrize("wrong", ["token twice", "another line's token", "another certificate"])
def test_what_stands_in_the_fingerprints_place_is_not_shown_by_python_or_the_command(
    secured, tiny_run, tmp_path, capsys, wrong
):
    line, other = JoinLine.parse(secured.line), "Oq-" + "0aZ_" * 10
    secret = {"token twice": line.token, "another line's token": other, "another certificate": other}[wrong]
    changed = dataclasses.replace(line, fingerprint=secret)
    with pytest.raises(AccessError, match="the join line says another") as refused:
        Channel(changed)
    assert secret not in str(refused.value)
    config, halves = tiny_run(), split(tmp_path / "model-in", tmp_path / "halves")
    capsys.readouterr()
    words = ["join", str(halves / "client"), "--to", str(changed), "--config", str(config), "--json"]
    assert main(words) == 2
    said = capsys.readouterr()
    for place in (said.out, said.err):
        assert line.fingerprint in place  # the server's, which is no secret: to be compared with the line's
        assert secret not in place
        assert line.token not in place


@pytest.mark.parametrize("torn", [1, 20, 43, 44])
def test_a_line_that_is_torn_by_a_blank_shows_no_part_of_the_token(halves, tiny_run, capsys, torn):
    """The second part stands among the settings, whose errors repeat what they do not know."""
    whole = f"hosl://127.0.0.1:1#{TOKEN}.{FINGERPRINT}"
    place = whole.index("#") + 1 + torn
    words = [
        "join",
        str(halves / "client"),
        "--config",
        str(tiny_run()),
        "--to",
        whole[:place],
        whole[place:],
    ]
    assert main([*words, "--json"]) == 2
    said = capsys.readouterr()
    assert "xx" not in said.out + said.err  # of the token Tkxx...


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"hosl://server.example:7070#{TOKEN}.{FINGERPRINT}", "hosl://server.example:7070#..."),
        (f"hosl://[::1]:7070#{TOKEN}", "hosl://[::1]:7070#..."),
        ("hosl://server.example:7070#Tkxx", "hosl://server.example:7070#..."),
        (f"{TOKEN}.{FINGERPRINT}", "..."),
        (TOKEN, "..."),
        ("hosl://host:port#token.fingerprint", "hosl://host:port#token.fingerprint"),  # the form itself
    ],
)
def test_the_shown_form_of_a_join_line_keeps_the_address_and_nothing_else(tmp_path, capsys, given, shown):
    assert main(["clients", "revoke", given, "--service", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"hosl: no client is called {shown}; there are none\n"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b" \r\n\n"])
def test_a_file_with_a_join_line_is_read_with_a_mark_of_its_encoding_and_any_end(
    secured, tiny_run, tmp_path, capsys, mark, end
):
    """The line's token is another one: what the server says of it shows that the line was read."""
    line = dataclasses.replace(JoinLine.parse(secured.line), token=TOKEN)
    (tmp_path / "line").write_bytes(mark + str(line).encode() + end)
    config, halves = tiny_run(), split(tmp_path / "model-in", tmp_path / "halves")
    words = ["join", str(halves / "client"), "--to", f"@{tmp_path / 'line'}", "--config", str(config)]
    assert main(words) == 2
    assert "this token is not known here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fingerprint", "words", "plaintext", "says"),
    [
        (
            False,
            [],
            False,
            r"lacks the fingerprint of the certificate of .*copy the whole line .*#token\.fing",
        ),
        (True, [], True, "speaks TLS: leave --plaintext out"),
        (False, ["--plaintext"], False, "speaks no TLS: .* is joined with --plaintext"),
    ],
)
def test_a_server_that_wants_to_be_trusted_otherwise_says_how(
    secured, halves, tmp_path, fingerprint, words, plaintext, says
):
    with Server(halves / "server", tmp_path / "service", *words) as server:
        line = JoinLine.parse(server.line)
        line = line if fingerprint else dataclasses.replace(line, fingerprint=None)
        with pytest.raises(AccessError, match=says) as refused:
            Channel(line, patience=Patience(connect_s=1.0), proof=Proof(plaintext=plaintext))
        assert line.token not in str(refused.value)


def test_an_authority_that_did_not_sign_is_named(secured, tmp_path):
    authority, _ = issue(tmp_path, "authority")
    line = dataclasses.replace(JoinLine.parse(secured.line), fingerprint=None)
    with pytest.raises(AccessError, match=rf"no authority of {authority} vouches"):
        Channel(line, patience=Patience(connect_s=1.0), proof=Proof(authority=authority))


def _has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback address")
def test_a_server_at_an_ipv6_address_prints_lines_and_addresses_in_brackets_and_is_joined(
    halves, tmp_path, capsys
):
    service = tmp_path / "service"
    with Server(halves / "server", service, "--page", "[::1]:0", listen="[::1]:0") as server:
        said = server.said[-1]
        _, _, port = server.address.rpartition(":")
        assert server.address == f"[::1]:{port}"
        assert f"on [::1]:{port}; live page on https://[::1]:" in said
        lines = [server.line, enrol(service, "second", capsys)]
        assert all(line.startswith(f"hosl://[::1]:{port}#") for line in lines)
        for line in map(JoinLine.parse, lines):
            channel = Channel(line, patience=Patience(connect_s=5.0))
            with pytest.raises(HandshakeError, match="the client 0"):
                channel.ask("Hello", pb.HelloRequest(), pb.HelloReply)
            channel.close()
        url = said.rpartition(" ")[2]
        unchecked = ssl._create_unverified_context()
        with urllib.request.urlopen(f"{url}health", context=unchecked) as answer:
            assert answer.status == 200
        assert json.loads((service / "address.json").read_text())["address"] == f"[::1]:{port}"
        assert server.stop() == 0
