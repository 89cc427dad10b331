"""Attacks on activations: what they find is right, they read no answers, and their parts are those of others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from hosl.cli import main
from hosl.errors import NonFiniteError
from hosl.privacy.expectation import expectation
from hosl.privacy.inversion import Seen, better, nearest, ridge, share, spread
from hosl.privacy.search import CLOSE, Search
from hosl.split import split_model
from tests.integration.languages import language_model, tuning

LENGTHS = (7, 1, 5, 9)


def seen_by(half, lengths, seed, vocabulary=97):
    """Random texts, and what a half makes of them, row by row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]
    with torch.no_grad():
        states = [half(row[None], torch.ones_like(row)[None])[0] for row in rows]
    return Seen(torch.cat(states), torch.cat(rows), tuple(lengths))


def table_of(half):
    with torch.no_grad():
        return half.model.get_input_embeddings()(torch.arange(97))


def all_wrong(seen):
    """A ranking that has the right token of no position."""

    def ranking(states, k):
        return (seen.tokens[:, None] + 1 + torch.arange(k)) % 97

    return ranking


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2"])
@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_search_finds_every_token_of_a_causal_model(tiny, family, cut):
    half = split_model(tiny(family), cut)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    settled = []
    found = Search(half, table, known).found(
        seen, ridge(table, known), lambda done, of: settled.append((done, of))
    )
    assert torch.equal(found, seen.tokens)
    assert settled == sorted(settled)
    assert settled[-1] == (sum(LENGTHS), sum(LENGTHS))


def test_search_does_not_read_the_answers(tiny):
    half = split_model(tiny("llama"), 2)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    hidden = Seen(seen.states, torch.zeros_like(seen.tokens), seen.lengths)
    assert torch.equal(Search(half, table, known).found(hidden, ridge(table, known)), seen.tokens)


def test_search_without_good_candidates_follows_the_gradient(tiny):
    """From candidates that are all wrong, and fewer tries than there are tokens, most are found at a shallow cut."""
    half = split_model(tiny("llama"), 1)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)

    found = Search(half, table, known, tries=40).found(seen, all_wrong(seen))
    assert share(all_wrong(seen)(seen.states, 8)[:, 0], seen.tokens) == 0
    assert share(found, seen.tokens) > 0.9
    few = Search(half, table, known, tries=1).found(seen, all_wrong(seen))
    assert share(few, seen.tokens) == 0


@pytest.mark.parametrize(("tries", "share_found"), [(2, 0.0), (8, 1.0)])
def test_no_more_tokens_are_tried_than_were_asked_for(tiny, tries, share_found):
    """The right token is the eighth of each ranking."""
    half = split_model(tiny("llama"), 2)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, (1, 1, 1, 1), 2)

    def eighth(states, k):
        return ((seen.tokens[:, None] + 8 - torch.arange(1, 9)) % 97)[:, :k]

    assert share(Search(half, table, known, tries=tries).found(seen, eighth), seen.tokens) == share_found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_search_of_the_whole_vocabulary_finds_every_token_whatever_its_candidates(tiny, family):
    half = split_model(tiny(family), 3)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)

    assert torch.equal(Search(half, table, known, tries=97).found(seen, all_wrong(seen)), seen.tokens)


def test_a_search_that_is_told_what_to_expect_needs_few_tries(tiny):
    """At a deep cut, from candidates that are all wrong; each expectation is of the text as it was settled so far."""
    half = split_model(tiny("llama"), 3)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    rows, asked = seen.tokens.split(seen.lengths), []

    def expected(texts):
        asked.extend(texts)
        scores = torch.zeros(len(texts), 97)
        scores[:, 0] = 2  # the right one is not the most probable
        for of_text, text in zip(scores, texts, strict=True):
            for row in rows:
                if len(row) > len(text) and torch.equal(row[: len(text)], text):
                    of_text[row[len(text)]] = 1
        return scores

    alone = Search(half, table, known, tries=20).found(seen, all_wrong(seen))
    assert share(alone, seen.tokens) < 0.5
    found = Search(half, table, known, tries=20, expectation=expected).found(seen, all_wrong(seen))
    assert torch.equal(found, seen.tokens)
    assert len(asked) == len(seen.tokens)  # once a position


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom"])
def test_what_is_expected_are_the_logits_of_transformers(tmp_path, family):
    folder = language_model(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    texts = [torch.tensor([5, 17, 40]), torch.tensor([60]), torch.tensor([], dtype=torch.int64)]
    found = expectation(str(folder), 97)(texts)
    for text, scores in zip(texts[:2], found, strict=False):
        assert torch.allclose(scores, model(text[None]).logits[0, -1], rtol=1e-5, atol=1e-6)
    assert not found[2].any()


def test_a_distance_that_counts_as_found_is_far_below_that_of_another_token(tiny):
    half = split_model(tiny("llama"), 2)[0]
    known = seen_by(half, [20] * 10, 1)
    _, scale = spread(known.states)
    apart = [seen_by(half, [1], seed) for seed in range(30)]
    away = [
        float(((a.states - b.states) / scale).square().mean().sqrt())
        for a in apart for b in apart if int(a.tokens) != int(b.tokens)
    ]  # fmt: skip
    assert min(away) > 2 * CLOSE


def test_nearest_is_the_largest_cosine_by_hand(tiny):
    half = split_model(tiny("bert"), 1)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    plain = F.normalize(seen.states, dim=-1) @ F.normalize(table, dim=-1).T
    middle = known.states.mean(0)
    centred = F.normalize(seen.states - middle, dim=-1) @ F.normalize(table - table.mean(0), dim=-1).T
    found = nearest(table, known)(seen.states, 3)
    assert any(torch.equal(found, scores.topk(3).indices) for scores in (plain, centred))


def test_ridge_is_least_squares_with_rows_for_the_penalty(tiny):
    half = split_model(tiny("bert"), 2)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    middle, scale = spread(known.states)
    x, y = ((known.states - middle) / scale).double().numpy(), (table[known.tokens] - table.mean(0)).double()
    found, width, theirs = ridge(table, known)(seen.states, 1)[:, 0], x.shape[1], []
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        rows = np.concatenate([x, np.sqrt(strength * len(x)) * np.eye(width)])
        weights = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((width, width))]), rcond=None)[0]
        mapped = torch.from_numpy(((seen.states - middle) / scale).double().numpy() @ weights)
        scores = F.normalize(mapped, dim=-1) @ F.normalize(table - table.mean(0), dim=-1).double().T
        theirs.append(scores.argmax(-1))
    assert any(torch.equal(found, of_strength) for of_strength in theirs)


def test_a_constant_number_of_the_activations_is_no_division_by_zero():
    states = torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    middle, scale = spread(states)
    assert torch.equal(middle, torch.tensor([1.0, 3.0]))
    assert torch.equal(scale, torch.tensor([1.0, 1.0]))


@pytest.fixture
def split_llama(tmp_path):
    """The client's folder, and a config, of a tiny llama; and the attacker's own text."""
    model = language_model(tmp_path / "model", "llama")
    config = tuning(tmp_path, model)
    assert main(["split", str(model), str(tmp_path / "halves"), "--cut", "2"]) == 0
    own = tmp_path / "own.txt"
    generator = np.random.default_rng(0)
    own.write_text(
        "".join(" ".join(f"w{n}" for n in generator.integers(0, 80, 12)) + "\n" for _ in range(40))
    )
    return tmp_path / "halves" / "client", config, own


def attack(capsys, client, config, *words):
    capsys.readouterr()
    assert main(["audit", str(client), "--config", str(config), "--attack", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("unchecked")
def test_audit_measures_the_attacks_on_ones_own_rows(split_llama, tmp_path, capsys):
    client, config, own = split_llama
    rows = tmp_path / "mine.jsonl"
    texts = ["w3 w17 w40", "w9 w22 w71 w5", "w60"]
    rows.write_text(
        json.dumps({"text": texts[0]}) + "\n" + json.dumps({"prompt": texts[1], "completion": ""}) + "\n"
        + json.dumps({"messages": [{"role": "user", "content": texts[2]}]}) + "\n"
    )  # fmt: skip
    found = attack(capsys, client, config, "--rows", rows, "--own", own)
    assert found["texts"] == texts
    by_name = {a["name"]: a for a in found["attacks"]}
    assert list(by_name) == ["nearest embedding", "ridge regression", "search"]
    assert by_name["search"]["tokens_share"] == 1.0
    assert by_name["search"]["rows_share"] == 1.0
    assert by_name["search"]["texts"] == texts
    assert (found["cut"], found["rows"], found["tokens"]) == (2, 3, 8)
    int8 = attack(capsys, client, config, "--rows", rows, "--own", own, "--wire.compression", "int8")
    assert {a["name"]: a["tokens_share"] for a in int8["attacks"]}["search"] == 1.0
    assert main(["audit", str(client), "--config", str(config), "--attack", "--own", str(own)]) == 0
    shown = capsys.readouterr().out
    assert "attacks on the activations of" in shown
    assert shown.count("rebuilt: ") == shown.count("text: ") > 0


@pytest.mark.usefixtures("unchecked")
def test_text_that_is_attacked_is_not_the_attackers_own(split_llama, tmp_path, capsys):
    client, config, own = split_llama
    known = own.read_text().splitlines()
    rows = tmp_path / "same.txt"
    rows.write_text("\n".join(known[:39]) + "\n\n")
    left = attack(capsys, client, config, "--rows", rows, "--own", own)
    assert left["own_tokens"] == len(known[39].split())
    rows.write_text(own.read_text())
    assert (
        main(
            [
                "audit",
                str(client),
                "--config",
                str(config),
                "--attack",
                "--rows",
                str(rows),
                "--own",
                str(own),
            ]
        )
        == 2
    )
    assert "no text that is not attacked" in capsys.readouterr().err


def test_audit_gives_the_search_what_the_public_model_expects(split_llama, tmp_path, capsys, monkeypatch):
    client, config, own = split_llama
    monkeypatch.setattr("hosl.privacy.attack.better", lambda table, known: lambda states, k: torch.zeros(
        len(states), k, dtype=torch.int64
    ))  # fmt: skip
    asked = []

    def spied(name, vocabulary):
        expected = expectation(name, vocabulary)
        return lambda texts: asked.append(texts) or expected(texts)

    monkeypatch.setattr("hosl.privacy.attack.expectation", spied)
    for more in ([], ["--public-model", tmp_path / "model"]):
        assert not asked
        attack(capsys, client, config, "--own", own, "--tries", "3", *more)
    assert asked


def test_a_public_model_is_no_help_against_an_encoder(split_llama, capsys, monkeypatch):
    client, config, _ = split_llama
    monkeypatch.setattr("hosl.privacy.attack._half", lambda *words: SimpleNamespace(causal=False))
    assert (
        main(["audit", str(client), "--config", str(config), "--attack", "--public-model", "no matter"]) == 2
    )
    assert "which is for causal models alone; leave it out for this half" in capsys.readouterr().err


def test_a_public_model_with_other_tokens_is_refused(split_llama, tmp_path, capsys):
    client, config, own = split_llama
    other = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    words = [
        "--config",
        str(config),
        "--attack",
        "--own",
        str(own),
        "--public-model",
        str(tmp_path / "other"),
    ]
    assert main(["audit", str(client), *words]) == 2
    assert (
        "has 96 tokens, the half 97; name the model that the half was split from" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rows", "x.txt"), "hosl audit --rows is about --attack"),
        (("--count", "5"), "hosl audit --count is about --attack"),
        (("--attack", "--count", "0"), "hosl audit --count must be 1 or more"),
        (("--attack", "--tries", "0"), "hosl audit --tries must be 1 or more"),
        (("--public-model", "x"), "hosl audit --public-model is about --attack"),
        (("--attack", "--own-count", "-1"), "hosl audit --own-count must be 1 or more"),
        (("--attack", "--rows", "none.jsonl"), "none.jsonl"),
    ],
)
def test_what_an_attack_cannot_do_is_refused(split_llama, capsys, words, said):
    client, config, _ = split_llama
    assert main(["audit", str(client), "--config", str(config), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("unchecked")
def test_files_that_are_no_texts_are_refused_in_a_line_and_empty_rows_left_out(split_llama, tmp_path, capsys):
    client, config, own = split_llama
    words = ["audit", str(client), "--config", str(config), "--attack", "--own", str(own), "--rows"]
    broken = {
        "latin.txt": "w1 caf\xe9".encode("latin-1"), "chat.jsonl": b'{"messages": ["a"]}\n', "empty.txt": b"\n\n",
        "other.jsonl": b'{"words": "w1"}\n',
    }  # fmt: skip
    said = ("not text in UTF-8", "wanted is `text`", "has no text", "wanted is `text`")
    for (name, data), line in zip(broken.items(), said, strict=True):
        (tmp_path / name).write_bytes(data)
        assert main([*words, str(tmp_path / name)]) == 2
        assert line in capsys.readouterr().err
    marked = tmp_path / "marked.jsonl"
    marked.write_text('{"text": ""}\n{"text": "w3 w4"}\n')
    assert main([*words, str(marked), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["rows"] == 1
    assert "1 of 2 rows without tokens are left out" in out.err


def test_text_in_the_docstrings_that_is_attacked_is_taken_out_though_the_tokenizer_drops_capitals():
    from hosl.privacy.attack import _own_texts
    from hosl.split import resolve_model_folder
    from hosl.tasks import TextTokenizer
    from hosl.tasks.docstrings import library_texts

    tokenizer = TextTokenizer.load(resolve_model_folder("all-MiniLM-L6-v2"))
    attacked = [tokenizer.encode(text, 64) for text in library_texts()[:50]]
    own = _own_texts(tokenizer, None, 64, attacked)
    assert 4000 < len(own) < len(library_texts())
    assert not set(attacked) & set(own)


def test_activations_that_are_no_numbers_are_refused(tiny):
    half = split_model(tiny("llama"), 1)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    seen.states[3, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        Search(half, table, known).found(seen, ridge(table, known))


def test_rows_are_searched_in_pieces_and_a_small_vocabulary_ends_the_search(tiny, monkeypatch):
    monkeypatch.setattr("hosl.privacy.search._ROWS", 3)
    half = split_model(tiny("llama"), 2)[0]
    table, known, seen = table_of(half), seen_by(half, [20] * 10, 1), seen_by(half, LENGTHS, 2)
    assert torch.equal(Search(half, table, known).found(seen, better(table, known)), seen.tokens)
    elsewhere = Seen(seen.states + 50.0, seen.tokens, seen.lengths)  # no token is near
    found = Search(half, table, known, tries=500).found(elsewhere, better(table, known))
    assert found.shape == seen.tokens.shape
