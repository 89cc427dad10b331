"""Join lines that devices can use, connections that go where the line says, and tokens that are shown nowhere."""

import socket
import threading

import pytest

from hosl.cli import main
from hosl.errors import AccessError, HandshakeError
from hosl.transport.channel import Channel, Patience, Proof
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.integration.certificates import issue
from tests.integration.network import Server, enrol

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
    ],
)
@pytest.mark.parametrize("how", ["argument", "file", "extra", "half"])
def test_the_token_of_a_wrong_line_is_shown_nowhere(halves, tiny_run, tmp_path, capsys, text, how):
    config, half = tiny_run(), str(halves / "client")
    (tmp_path / "line").write_text(f"secret words\n{text}\n")
    words = {
        "argument": [half, "--to", text],
        "file": [half, "--to", f"@{tmp_path / 'line'}"],
        "extra": [half, "--to", "hosl://a:1#" + "t" * 43, "--too", f"hosl://a:1#{text}"],
        "half": [f"hosl://a:1#{TOKEN}.{FINGERPRINT}", "--to", "hosl://a:1#" + "t" * 43],
    }[how]
    assert main(["join", *words, "--config", str(config), "--json"]) != 0
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
