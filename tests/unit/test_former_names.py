"""Settings by the names that they had in version 0.1: read, warned of, refused beside the new name."""

import pytest

from hosl.cli.train import overridden
from hosl.config import Config, parse_config
from hosl.errors import ConfigError
from hosl.study.config import parse_study

FORMER = {
    "zo": {"law": "sphere", "fo_point": "first-plus"},
    "client": {"micro_batch_rows": 3},
    "method": "hosl",
}


def test_former_names_are_read_and_the_new_ones_are_said(caplog):
    config = parse_config(FORMER, where="old.yaml")
    assert (config.zo.distribution, config.zo.server_gradient_at) == ("sphere", "first-plus")
    assert config.client.micro_batch_size == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"hosl: old.yaml: {former} is called {new} now; the former name is read until version 0.3"
        for former, new in (
            ("zo.law", "zo.distribution"),
            ("zo.fo_point", "zo.server_gradient_at"),
            ("client.micro_batch_rows", "client.micro_batch_size"),
        )
    ]


def test_what_hosl_wrote_itself_is_read_without_a_word(caplog):
    parse_config(FORMER, where="summary", warn=False)
    assert not caplog.records


def test_both_names_at_once_are_refused():
    with pytest.raises(
        ConfigError, match=r"zo\.law is the former name of zo\.distribution, and both are given"
    ):
        parse_config({"zo": {"law": "sphere", "distribution": "sphere"}}, where="x")


def test_options_of_the_command_line_keep_their_former_names(capsys):
    for words in (["--zo.law", "sphere"], ["--zo.law=sphere"]):
        assert overridden(Config(), words).zo.distribution == "sphere"
        assert "--zo.law is called --zo.distribution now" in capsys.readouterr().err
    assert overridden(Config(), ["--client.micro-batch-rows", "3"]).client.micro_batch_size == 3


def test_a_study_may_use_former_names_in_every_part(caplog):
    study = parse_study(
        {
            "output_dir": "x", "server_rates": [0.1], "base": {"zo": {"law": "sphere"}},
            "tasks": {"a": {"client": {"micro_batch_rows": 2}}},
            "methods": {"frozen": {}, "fo-fo": {"rates": [1.0]},
                        "hosl": {"rates": [1.0], "settings": {"zo": {"fo_point": "first-plus"}}}},
        },
        where="study.yaml",
    )  # fmt: skip
    assert study.server_learning_rates == (0.1,)
    assert study.base["zo"] == {"distribution": "sphere"}
    assert study.tasks["a"]["client"] == {"micro_batch_size": 2}
    assert study.methods["hosl"].settings["zo"] == {"server_gradient_at": "first-plus"}
    assert len(caplog.records) == 4
