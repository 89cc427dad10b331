"""The choice of the next token, against transformers' own warpers; where an answer ends; text in whole characters."""

import numpy as np
import pytest
import tokenizers
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hosl.errors import ConfigError, NonFiniteError
from hosl.inference.answering import Answer, Ending, answer, end_ids
from hosl.inference.decoding import Candidates, Sampling, choose, distribution, most_probable
from hosl.tasks import TextTokenizer

VOCABULARY = 97
LOGITS = (3 * np.random.default_rng(5).standard_normal(VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.8), (1.7, 9, 1.0), (1.3, 12, 0.7), (0.4, 0, 1e-6)]
)  # fmt: skip
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    warped = torch.from_numpy(LOGITS)[None].double()
    warped = TemperatureLogitsWarper(temperature)(None, warped)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, probabilities = distribution(most_probable(LOGITS, sampling.candidates), sampling)
    ours = np.zeros(VOCABULARY)
    ours[tokens] = probabilities
    np.testing.assert_allclose(ours, warped.softmax(-1)[0].numpy(), rtol=1e-12, atol=1e-15)


def test_the_candidates_that_a_choice_needs_give_the_same_draws_as_all():
    sampling = Sampling(temperature=1.1, top_k=7, top_p=0.9, seed=3)
    few, every = most_probable(LOGITS, sampling.candidates), most_probable(LOGITS, 0)
    assert len(few.tokens) == 7
    first, second = sampling.random(0), sampling.random(0)
    drawn = [choose(few, sampling, first) for _ in range(50)]
    assert drawn == [choose(every, sampling, second) for _ in range(50)]
    assert len(set(drawn)) > 1
    third = Sampling(temperature=1.1, top_k=7, top_p=0.9, seed=4).random(0)
    assert drawn != [choose(few, sampling, third) for _ in range(50)]


def test_draws_follow_the_distribution():
    sampling, draws = Sampling(temperature=0.9, top_p=0.95), 4000
    candidates, random = most_probable(LOGITS, 0), Sampling(seed=11).random(0)
    tokens, probabilities = distribution(candidates, sampling)
    counts = np.bincount([choose(candidates, sampling, random) for _ in range(draws)], minlength=VOCABULARY)
    error = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(counts[tokens] / draws - probabilities) < 4 * error).all()
    assert counts.sum() == counts[tokens].sum()


def test_equal_logits_are_ordered_by_their_ids_however_many_are_asked_for():
    logits = np.array([1, 2, 2, 0, 2, 1], np.float32)
    for count in range(1, 7):
        assert most_probable(logits, count).tokens.tolist() == [1, 2, 4, 0, 5, 3][:count]
    assert most_probable(logits, 0).tokens.tolist() == [1, 2, 4, 0, 5, 3]


def test_a_model_that_has_diverged_says_so_instead_of_a_token():
    with pytest.raises(NonFiniteError, match="diverged"):
        most_probable(np.array([0.0, np.nan], np.float32), 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top-p"), ({"top_k": -1}, "top-k")],
    ids=["temperature", "top-p", "top-k"],
)
def test_an_impossible_sampling_is_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=said):
        Sampling(**settings)


def test_a_temperature_next_to_nothing_draws_the_most_probable_token():
    candidates = most_probable(np.array([0.5, 3.0, 2.9], np.float32), 0)
    tokens, probabilities = distribution(candidates, Sampling(temperature=1e-320))
    assert (tokens.tolist(), probabilities.tolist()) == ([1], [1.0])


def said(text, *, stop=(), end=frozenset(), most=99):
    """The answer of a model that says the letters of `text`, whose tokens are their code points."""
    letters = iter(text)

    def next_token(ids):
        return Candidates(np.array([ord(next(letters))]), np.zeros(1, np.float32))

    ending = Ending(most_tokens=most, end_ids=end, stop=stop)
    return answer(next_token, [1], ending, Sampling(), Sampling().random(0), chr)


def pieces_and_text(made: Answer):
    return list(made), made.text, made.end


def test_an_answer_ends_before_a_stop_string_and_no_piece_shows_its_beginning():
    assert pieces_and_text(said("one\nto\n\nthree", stop=("\n\n", "zzz"))) == (
        ["o", "n", "e", "\nt", "o"], "one\nto", "stop string",
    )  # fmt: skip


def test_an_answer_ends_with_the_token_that_ends_a_text_or_with_the_last_token():
    ended = said("yes.", end=frozenset({ord(".")}))
    assert pieces_and_text(ended) == (["y", "e", "s"], "yes", "end of text")
    assert ended.tokens == [ord(letter) for letter in "yes"]
    # what might have begun a stop string is part of the answer when nothing follows
    assert pieces_and_text(said("yes\nno", most=4, stop=("\n\n",))) == (
        ["y", "e", "s", "\n"],
        "yes\n",
        "length",
    )


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop string"):
        Ending(most_tokens=1, stop=("",))


def byte_level(folder):
    """A tokenizer whose tokens are single bytes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer.load(folder)


def test_text_comes_in_whole_characters(tmp_path):
    tokenizer, text = byte_level(tmp_path), "né \N{PERSONAL COMPUTER}\u200d日本."
    decode = tokenizer.continuation(tokenizer.encode("before", 99))
    pieces = [decode(token) for token in tokenizer.encode(text, 99)]
    assert len(pieces) == len(text.encode())
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    half = tokenizer.encode("é", 99)[0]
    assert decode(half) == ""  # at the end of an answer nothing is shown of it


def test_the_end_of_a_text_is_what_the_models_folder_says(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    assert end_ids(tmp_path, {"<|end|>": 7}.get) == {7}
    (tmp_path / "config.json").write_text('{"eos_token_id": null, "text_config": {"eos_token_id": 5}}')
    assert end_ids(tmp_path, {"<|end|>": 7}.get) == {5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert end_ids(tmp_path, {"<|end|>": 7}.get) == {3, 4}
    assert end_ids(tmp_path / "elsewhere", {"<|end|>": 7}.get) == frozenset()
