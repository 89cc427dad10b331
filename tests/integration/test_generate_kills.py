"""Either side is killed in the middle of generating: the other says so, and the server's memory comes back."""

import json
import random
import subprocess
from collections import Counter

import pytest
import transformers

from hosl.cli import main
from hosl.wire import hosl_pb2 as pb
from tests import conftest
from tests.integration.languages import language_model
from tests.integration.network import ENVIRONMENT, HOSL, Server, wait_until
from tests.integration.peers import Peer, model_of, refused_as
from tests.integration.test_network_mutations import mutated, text_of

MIB = 1 << 20
BLOCKS, WIDTH, PROMPT = 2, 1024, 1500
CACHE_BYTES = PROMPT * BLOCKS * 2 * WIDTH * 4
"""The keys and values of the prompt: 5 % of the server's memory, and more."""
# all blocks are the server's, and few weights; an answer that takes minutes
SIZES = {
    "vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 16,
    "max_position_embeddings": 16384, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as patched:
        wide = (transformers.LlamaForCausalLM, transformers.LlamaConfig, SIZES)
        patched.setitem(conftest.MODELS, "wide", wide)
        language_model(folder / "model", "wide")
    assert main(["split", str(folder / "model"), str(folder / "halves"), "--cut", "0", "--json"]) == 0
    (folder / "prompts.txt").write_text("w1 w2 w3 " * (PROMPT // 3))
    return folder / "halves"


def generating(halves, server, *words):
    """`hosl generate` in a process of its own, once the first piece of its answer has come."""
    command = [
        *HOSL, "generate", str(halves / "client"), "--to", server.line, "--max-new-tokens", "10000",
        "--prompts", str(halves.parent / "prompts.txt"), *words,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout.read(2), process.stderr.read()
    return process


def resident_bytes(process):
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def ended(server):
    return [event for event in server.events if event["event"] == "generated"]


def test_a_client_that_is_killed_leaves_nothing_on_the_server(halves, tmp_path, capsys):
    with Server(halves / "server", tmp_path / "service") as server:
        words = ["generate", str(halves / "client"), "--to", server.line, "--max-new-tokens", "2", "--json"]
        # a text of the same length that ends by itself: what it leaves is kept once; the second comes after that
        assert main([*words, "--prompts", str(halves.parent / "prompts.txt")]) == 0
        assert main([*words, "--prompt", "w1"]) == 0
        base = resident_bytes(server.process)
        for count in (3, 4):  # what one leaves may fit into what is free already, two do not
            client = generating(halves, server)
            assert resident_bytes(server.process) - base > CACHE_BYTES
            client.kill()
            client.communicate()
            wait_until(lambda: len(ended(server)) == count)  # noqa: B023  (it waits inside the loop)
            assert ended(server)[-1]["cache_bytes"] >= CACHE_BYTES
        wait_until(lambda: resident_bytes(server.process) <= 1.05 * base)
        with capsys.disabled():
            print(f"server: {base / MIB:.0f} MiB before, {resident_bytes(server.process) / MIB:.0f} after")
        assert main([*words, "--prompt", "w1"]) == 0
        assert server.stop() == 0


def test_a_server_that_is_killed_is_named_in_one_line(halves, tmp_path):
    with Server(halves / "server", tmp_path / "service") as server:
        client = generating(halves, server)
        server.process.kill()
        _, err = client.communicate(timeout=60)
    *_, last = err.splitlines()
    assert client.returncode == 1
    assert last.startswith(f"hosl: server {server.address}: unavailable:")
    assert "Traceback" not in err


def test_a_text_that_is_longer_than_its_limit_is_refused_by_name(halves, tmp_path, capsys):
    with Server(halves / "server", tmp_path / "service", "--cache-limit", "1") as server:
        assert any("up to 1 MiB a client and 1,024 MiB in all" in line for line in server.said)
        words = ["generate", str(halves / "client"), "--to", server.line, "--prompt", "w1 w2"]
        assert main([*words, "--max-new-tokens", "63"]) == 1
        assert "asked for 65 tokens of cache, allowed 64" in capsys.readouterr().err
        assert main([*words, "--max-new-tokens", "62"]) == 0


def test_mutated_texts_are_refused_by_name_and_nothing_is_left_of_them(tmp_path):
    model = language_model(tmp_path / "model", "llama")
    words = ["--cut", "1", "--labels-at", "server", "--json"]
    assert main(["split", str(model), str(tmp_path / "halves"), *words]) == 0
    facts = model_of(json.loads((tmp_path / "halves" / "client" / "half.json").read_text()))
    words = ["--plaintext", "--calls-per-s", "100000", "--idle", "3"]
    with Server(tmp_path / "halves" / "server", tmp_path / "service", *words) as server:
        peer, valid, chance, refused = Peer(server.line, facts), text_of(facts), random.Random(5), Counter()
        for _ in range(300):
            refused[refused_as(peer, "Generate", mutated(chance, valid))] += 1
        assert refused["FailureError"] == 0, refused
        assert 100 < 300 - refused[None] < 300
        replies = [pb.GenerateReply.FromString(reply) for reply in peer.call("Generate", valid)]
        assert [len(reply.next.tokens) for reply in replies] == [0, 2, 2, 2]
        # of four texts at once: had one kept its room, none of the later ones would have got it
        assert len(ended(server)) > 100
        peer.channel.close()
