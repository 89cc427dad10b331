"""Whatever a peer does wrong is refused by name, on the side that can act; nothing is changed and the others go on."""

import dataclasses
import json
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from hosl.cli import main
from hosl.errors import AccessError, ConfigError, LinkError
from hosl.transport.channel import Channel, Patience, Proof
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.integration.certificates import issue
from tests.integration.network import Server, anew
from tests.integration.peers import SEQ, WIDTH, Peer, model_of, refused_as


@pytest.fixture(scope="module")
def plain(halves, tmp_path_factory):
    """A server in plaintext, and a factory of peers that share its one client's token."""
    service = tmp_path_factory.mktemp("plain") / "service"
    words = [
        "--plaintext",
        "--calls-per-s",
        "100000",
        "--idle",
        "3",
        "--tensor-limit",
        "1",
        "--runs-at-once",
        "2",
    ]
    with Server(halves / "server", service, *words) as server:
        yield server


@pytest.fixture
def peer(plain, halves):
    facts = json.loads((halves / "client" / "half.json").read_text())
    made = Peer(plain.line, model_of(facts))
    made.greet()
    yield made
    made.channel.close()


def test_an_honest_peer_is_answered(peer):
    (answer,) = peer.call("Losses", peer.upload("losses", count=2))
    assert len(pb.LossesReply.FromString(answer).losses) == 2


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("shape-of-two", "WireError", "one shape [rows, seq, width]"),
        ("no-rows", "WireError", "each at least 1, got [0, 5, 32]"),
        ("width", "WireError", "activations are 32 wide in this model, got 31"),
        ("label", "WireError", "label 9 is outside 0..1"),
        ("labels", "WireError", "3 rows need 3 labels, got 1"),
        ("mask", "WireError", "the mask is [2, 5], the activations are [3, 5, ...]"),
        ("nan", "WireError", "NaN or Inf"),
        ("oversize", "LimitError", "the limit is 1048576"),
        ("too-many-bytes", "WireError", "bytes, "),
        ("truncated", "WireError", "ended before its request was complete"),
        ("more-after-the-end", "WireError", "more arrived than the request announced"),
        ("reordered", "WireError", "this call begins with `losses`, got `chunk`"),
        ("other-call", "WireError", "this call begins with `losses`, got `step`"),
        ("garbage", "WireError", "are no Upload of protocol 1"),
        ("past", "StepError", "step 0 of client first is from the past"),
        ("future", "StepError", "step 7 of client first is from the future: the server waits for step 1"),
        ("session", "SessionError", "say hello again"),
        ("empty", "WireError", "ended before its request"),
        ("other-targets", "WireError", "this model's head takes classes"),
        ("dtype", "WireError", "DType 9 is unknown"),
    ],
)
def test_a_wrong_question_is_refused_by_name(peer, what, error, said):
    ones = np.ones((3, SEQ, WIDTH), np.float32)
    whole = peer.upload("losses")
    header = pb.Upload.FromString(whole[0])
    header.losses.activations[0].dtype = 9
    mask = pb.Mask(rows=3, seq=SEQ, bits=b"\xff\xff")
    two = pb.Mask(rows=2, seq=SEQ, bits=b"\xff\xff")
    frames = {
        "shape-of-two": lambda: [
            pb.Upload(losses=pb.AskLosses(where=pb.Where(session=peer.session, step=1), activations=[
                pb.Tensor(shape=[3, SEQ, WIDTH], dtype=1), pb.Tensor(shape=[2, SEQ, WIDTH], dtype=1)],
                targets=pb.Targets(mask=mask, classes=pb.Classes(labels=[0, 0, 0])))).SerializeToString()],
        "width": lambda: peer.upload("losses", shape=(3, SEQ, WIDTH - 1)),
        "label": lambda: peer.upload("losses", targets=pb.Targets(mask=mask, classes=pb.Classes(labels=[0, 9, 0]))),
        "labels": lambda: peer.upload("losses", targets=pb.Targets(mask=mask, classes=pb.Classes(labels=[0]))),
        "mask": lambda: peer.upload("losses", targets=pb.Targets(mask=two, classes=pb.Classes(labels=[0, 0, 0]))),
        "nan": lambda: peer.upload("losses", values=ones * np.nan),
        "oversize": lambda: peer.upload("losses", shape=(300, 30, WIDTH)),
        "too-many-bytes": lambda: peer.upload("losses", chunks=[b"\0" * 4000]),
        "truncated": lambda: whole[:1],
        "more-after-the-end": lambda: [*whole, whole[1]],
        "reordered": lambda: [whole[1], whole[0]],
        "other-call": lambda: peer.upload("step"),
        "garbage": lambda: [b"\xff\xfe\xfd"],
        "past": lambda: peer.upload("losses", step=0),
        "future": lambda: peer.upload("losses", step=7),
        "session": lambda: (setattr(peer, "session", "another"), peer.upload("losses"))[1],
        "empty": lambda: [],
        "no-rows": lambda: peer.upload("losses", shape=(0, 5, WIDTH), targets=pb.Targets(
            mask=pb.Mask(rows=0, seq=5), options=pb.Options(span=1))),
        "other-targets": lambda: peer.upload("losses", targets=pb.Targets(
            mask=mask, options=pb.Options(span=1, positions=[0, 0, 0], tokens=[1, 1, 1]))),
        "dtype": lambda: [header.SerializeToString(), whole[1]],
    }[what]()  # fmt: skip
    named, details = peer.refusal("Losses", frames)
    assert (named, said in details) == (error, True), (named, details)
    peer.greet()
    assert peer.call("Losses", peer.upload("losses"))


def test_a_repeated_step_is_answered_from_the_cache(peer):
    first = peer.call("Step", peer.upload("step", want_gradient=True))
    again = peer.call("Step", peer.upload("step", want_gradient=True))
    losses = [pb.StepReply.FromString(parts[0]).done.loss for parts in (first, again)]
    assert losses[0] == losses[1]
    assert first[1:] == again[1:]
    (scored,) = peer.call("Losses", peer.upload("losses", step=2))
    assert pb.LossesReply.FromString(scored).losses[0] != losses[0]  # the step was made, and only once
    assert peer.refusal("Step", peer.upload("step", step=3))[0] == "StepError"
    assert (
        peer.greet().start == 0
    )  # this client has nothing but its base weights: the server goes back with it


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"protocol": 2}, "HandshakeError", "this server speaks protocol 1, the client 2"),
        ({"run": "../../etc"}, "WireError", "run name"),
        ({"model": {"server_digest": "0" * 64}}, "HandshakeError", "the server has server_digest = "),
        ({"model": {"cut": 1}}, "HandshakeError", "cut"),
        (
            {"training": {"learning_rate": 0.5}},
            "HandshakeError",
            "the server has learning_rate = 0.001, this client 0.5",
        ),
        ({"training": {"method": 77}}, "HandshakeError", "method"),
    ],
)
def test_sides_that_do_not_fit_are_told_both_values(peer, changed, error, said):
    messages = {}
    for name, value in changed.items():
        if isinstance(value, dict):
            messages[name] = type(getattr(peer, name))()
            messages[name].CopyFrom(getattr(peer, name))
            for key, inner in value.items():
                setattr(messages[name], key, inner)
        else:
            messages[name] = value
    named, details = peer.refusal("Hello", peer.hello(**messages))
    assert (named, said in details) == (error, True), details


def test_a_token_that_is_unknown_or_missing_is_refused(peer):
    assert peer.refusal("Hello", peer.hello(), token="x" * 43)[0] == "AccessError"
    stub = peer.channel.stream_stream("/hosl.v1.Server/Hello")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub(iter(peer.hello())))
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_revocation_takes_effect_on_the_next_message(halves, tmp_path, capsys):
    with Server(halves / "server", tmp_path / "service", "--plaintext") as server:
        peer = Peer(server.line, model_of(json.loads((halves / "client" / "half.json").read_text())))
        peer.greet()
        frames = peer.upload("losses")
        gate, told = [frames[0]], []

        def slowly():
            yield gate[0]
            assert main(["clients", "revoke", "first", "--service", str(tmp_path / "service")]) == 0
            told.append(True)
            yield frames[1]

        stub = peer.channel.stream_stream("/hosl.v1.Server/Losses")
        with pytest.raises(grpc.RpcError) as refused:
            list(stub(slowly(), metadata=(("authorization", f"Bearer {peer.line.token}"),)))
        assert told
        assert "has been revoked" in refused.value.details()
        peer.channel.close()


def test_a_client_that_stalls_is_dropped_and_another_goes_on(peer):
    whole = peer.upload("losses")

    def stalled():
        yield whole[0]
        release.wait(20)

    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(peer.refusal, "Losses", stalled())
        assert peer.call("Losses", whole)
        named, details = refused.result(20)
        release.set()
    assert named == "LinkError"
    assert "nothing arrived for 3 s" in details


def test_more_calls_at_once_than_allowed_are_refused(peer):
    release = threading.Event()

    def stalled():
        yield peer.upload("losses")[0]
        release.wait(20)

    stub = peer.channel.stream_stream("/hosl.v1.Server/Losses")
    metadata = (("authorization", f"Bearer {peer.line.token}"),)
    held = [stub(stalled(), metadata=metadata) for _ in range(4)]
    try:
        for _ in range(50):
            named = refused_as(peer, "Losses", peer.upload("losses"))
            if named:
                break
        assert named == "BusyError"
    finally:
        release.set()
        for call in held:
            call.cancel()


# ---- TLS ----


@pytest.fixture(scope="module")
def secured(halves, tmp_path_factory):
    with Server(halves / "server", tmp_path_factory.mktemp("secured") / "service", start=anew) as server:
        yield server


def test_another_fingerprint_is_refused(secured):
    line = JoinLine.parse(secured.line)
    wrong = dataclasses.replace(line, fingerprint="A" * 43)
    with pytest.raises(AccessError, match="somebody else answers"):
        Channel(wrong)


def test_tls_1_2_is_refused(secured):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    line = JoinLine.parse(secured.line)
    with (
        socket.create_connection((line.host, line.port)) as plain,
        pytest.raises(OSError, match=r"(?i)handshake|reset|eof"),
    ):
        context.wrap_socket(plain)


def test_plaintext_to_a_tls_server_is_no_connection(secured):
    with pytest.raises(AccessError, match="speaks TLS: leave --plaintext out"):
        Channel(JoinLine.parse(secured.line), patience=Patience(connect_s=2.0), proof=Proof(plaintext=True))


def test_plaintext_beyond_loopback_is_refused(halves, tmp_path, capsys):
    line = JoinLine("example.org", 7070, "t" * 43, None)
    with pytest.raises(ConfigError, match=r"plaintext to example\.org is refused"):
        Channel(line, proof=Proof(plaintext=True))
    words = [
        "serve",
        str(halves / "server"),
        "--listen",
        "0.0.0.0:0",
        "--plaintext",
        "--service",
        str(tmp_path / "s"),
    ]
    assert main(words) == 2
    assert "plaintext is for loopback only" in capsys.readouterr().err


def test_room_for_less_than_one_call_is_refused_before_anything_is_served(tmp_path, capsys):
    half, service = str(tmp_path / "half"), tmp_path / "service"
    words = ["serve", half, "--service", str(service), "--tensor-limit", "256", "--tensor-total", "1023"]
    assert main(words) == 2
    assert "--tensor-total 1023: a call may have two activations" in capsys.readouterr().err
    assert not service.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runs-at-once", "0"), "--runs-at-once must be above 0, got 0"),
        (("--runs-per-client", "-1"), "--runs-per-client must be above 0, got -1"),
        (("--away", "nan"), "--away must be above 0, got nan"),
        (("--seat-days", "0"), "--seat-days must be above 0, got 0"),
        (("--idle", "-1"), "--idle must be above 0, got -1"),
        (("--calls-per-s", "0"), "--calls-per-s must be above 0, got 0"),
        (("--tensor-limit", "-4"), "--tensor-limit must be above 0, got -4"),
        (("--cache-limit", "0"), "--cache-limit must be above 0, got 0"),
        (("--texts-at-once", "-1"), "--texts-at-once must be 0, for none, or more; got -1"),
        (("--adapter-slots", "-1"), "--adapter-slots must be 0, for all clients, or more; got -1"),
        (("--disk-per-client", "0GB"), "'0GB' is no amount of memory"),
    ],
)
def test_limits_by_which_nothing_could_be_served_are_refused_before_anything_is_made(
    tmp_path, capsys, words, said
):
    service = tmp_path / "service"
    assert main(["serve", str(tmp_path / "half"), "--service", str(service), *words]) == 2
    assert said in capsys.readouterr().err
    assert not service.exists()


def test_nobody_at_the_address_is_said(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LinkError, match="check that `hosl serve` runs there"):
        Channel(JoinLine("127.0.0.1", port, "t" * 43, "A" * 43), patience=Patience(connect_s=2.0))


@pytest.mark.parametrize(
    "text", ["", "hosl://host", "hosl://host:99999#" + "t" * 43, "http://host:1#" + "t" * 43]
)
def test_a_join_line_that_is_none_is_refused_without_repeating_the_token(text):
    with pytest.raises(AccessError, match="not of the form") as refused:
        JoinLine.parse(text)
    assert "t" * 43 not in str(refused.value)


def test_a_server_with_our_own_certificate_wants_clients_with_theirs(halves, tmp_path):
    """mTLS: the authority signs both sides; a client without a certificate does not get in."""
    authority = issue(tmp_path, "authority")
    pem, key = issue(tmp_path, "server", by=authority)
    identity = issue(tmp_path, "client", by=authority)
    words = ["--certificate", str(pem), "--key", str(key), "--client-authority", str(authority[0])]
    with Server(halves / "server", tmp_path / "service", *words) as server:
        line = JoinLine.parse(server.line)
        assert line.fingerprint is None
        patience = Patience(connect_s=3.0)
        Channel(line, patience=patience, proof=Proof(authority=authority[0], identity=identity)).close()
        with pytest.raises(LinkError, match="which certificates either side wants"):
            Channel(line, patience=patience, proof=Proof(authority=authority[0]))
        with pytest.raises(AccessError, match="no authority known here vouches"):
            Channel(line, patience=patience, proof=Proof(identity=identity))


def test_an_expired_certificate_is_named(halves, tmp_path):
    service = tmp_path / "service"
    service.mkdir()
    pem, key = issue(tmp_path, "hosl", expired=True)
    (service / "certificate.pem").write_bytes(pem.read_bytes())
    (service / "key.pem").write_bytes(key.read_bytes())
    with (
        Server(halves / "server", service) as server,
        pytest.raises(AccessError, match="certificate has expired"),
    ):
        Channel(JoinLine.parse(server.line))


AUTHORS = {
    "profile": "authors-head",
    "zo": {"distribution": "sphere"},
    "server": {"optimiser": {"name": "sgd", "momentum": 0.9}},
}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (AUTHORS, "profile authors-head asks the server for losses with dropout"),
    ],
)
def test_what_only_one_process_can_do_is_not_for_a_network(tiny_run, tmp_path, capsys, settings, says):
    config = tiny_run(**settings)
    line = JoinLine("127.0.0.1", 7070, "t" * 43, None)
    assert main(["join", str(tmp_path / "nowhere"), "--to", str(line), "--config", str(config)]) == 2
    assert says in capsys.readouterr().err
