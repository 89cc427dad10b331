"""Settings before the file or behind it: the same options and settings, or a refusal that names the right form."""

import pytest

from hosl.cli import main
from hosl.cli.answers import command_parser, options_and_settings
from hosl.errors import ConfigError

YAML, SETTINGS = "my.yaml", ["--seed", "-1", "--zo.epsilon=1e-4", "--task.labels", "b", "a"]


def _parser(command):
    """A parser like those of train, plan and join; its first argument."""
    parser = command_parser(command, "")
    parser.add_argument("first", nargs="?" if command == "train" else None)
    parser.add_argument("--resume")
    parser.add_argument("--max-steps")
    return parser


@pytest.mark.parametrize("command", ["train", "plan", "join"])
@pytest.mark.parametrize(
    "words",
    [
        [YAML, *SETTINGS],
        [*SETTINGS, YAML],
        ["--seed", "-1", YAML, "--zo.epsilon=1e-4", "--task.labels", "b", "a"],
        ["--seed", "-1", "--zo.epsilon=1e-4", YAML, "--task.labels", "b", "a"],
        ["--json", YAML, *SETTINGS],
        [*SETTINGS, YAML, "--max-steps", "-1"],
        ["--max-steps", "-1", *SETTINGS, YAML, "--json"],
    ],
)
def test_settings_are_read_alike_in_either_order(command, words):
    options, settings = options_and_settings(_parser(command), words, "first")
    assert (options.first, settings) == (YAML, SETTINGS)
    assert options.max_steps == ("-1" if "--max-steps" in words else None)


def test_a_folder_behind_the_settings_is_found_and_a_value_is_none(tmp_path):
    for name in ("half", "rows"):
        (tmp_path / name).mkdir()
    half, rows = str(tmp_path / "half"), str(tmp_path / "rows")
    options, settings = options_and_settings(_parser("join"), ["--task.train", rows, half], "first")
    assert (options.first, settings) == (half, ["--task.train", rows])
    with pytest.raises(ConfigError, match=r"required: first.*`hosl join FIRST --a.b value`"):
        options_and_settings(_parser("join"), ["--task.train", rows], "first")


def test_a_flag_before_the_file_leaves_it_the_file():
    options, settings = options_and_settings(_parser("train"), ["--save-best", YAML], "first")
    assert (options.first, settings) == (YAML, ["--save-best"])


def test_a_run_to_resume_is_no_config():
    options, settings = options_and_settings(
        _parser("train"), ["--resume", YAML, "--max-steps", "7"], "first"
    )
    assert (options.first, options.resume, settings) == (None, YAML, [])


def test_a_word_too_many_is_no_value_of_a_setting():
    _, settings = options_and_settings(_parser("train"), [YAML, "extra", "--task.labels", "a"], "first")
    assert settings == ["extra", "--task.labels", "a"]


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["train", "--seed", "7"], "hosl train CONFIG.yaml --a.b value"),
        (["train", "--seed", "7", "my-config"], "hosl train CONFIG.yaml --a.b value"),
        (["plan", "--seed", "7", "--device-memory", "2GiB"], "hosl plan WHAT --a.b value"),
        (["join", "--seed", "7", "--to", "x", "--config", "my.yaml"], "hosl join HALF --a.b value"),
        (["audit", "--seed", "7", "--config", "my.yaml"], "hosl audit HALF --a.b value"),
    ],
)
def test_a_command_without_its_first_argument_names_the_form_and_not_a_value(
    tmp_path, monkeypatch, capsys, words, form
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert form in said
    assert "7:" not in said  # it was read as the file


@pytest.mark.parametrize("settings", [["--max-steps", "5"], ["--seed", "7"], ["--zo.epsilon", "0"]])
def test_train_reads_the_file_behind_a_setting(tmp_path, capsys, settings):
    """A file that does not exist is named in either order, and the setting's value never."""
    missing = str(tmp_path / "none.yaml")
    told = []
    for words in ([missing, *settings], [*settings, missing]):
        assert main(["train", *words]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "none.yaml" in told[0]
