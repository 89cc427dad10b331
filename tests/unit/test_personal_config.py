"""`clients.server: personal` is refused by name where it cannot be, and travels in Hello."""

import pytest

from hosl.config import parse_config
from hosl.errors import ConfigError
from hosl.network.handshake import config_of, model_message, protocol_of, training_message

PERSONAL = {
    "method": "fo-fo",
    "clients": {"count": 3, "server": "personal"},
    "server": {"trainable": "lora"},
}
FACTS = {"family": "bert", "cut": 2, "base_digest": "", "client_digest": "", "server_digest": ""}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"server": {"trainable": "all"}}, r"set server\.trainable: lora"),
        ({"method": "fo-zo"}, "needs a server that is trained by backprop, method is fo-zo"),
        ({"clients": {"count": 1, "server": "personal"}}, r"is for clients\.count of 2 and more"),
        (
            {"clients": {"count": 3, "server": "personal", "schedule": "synchronous"}},
            r"clients\.schedule: synchronous, in which devices train one half together",
        ),
        (
            {"method": "hosl", "clients": {"count": 3, "server": "personal", "halves": "shared"}},
            r"clients\.halves: shared",
        ),
    ],
    ids=["all weights", "zeroth-order", "one device", "rounds", "shared halves"],
)
def test_what_does_not_go_with_a_personal_server_is_refused_by_name(changed, said):
    with pytest.raises(ConfigError, match=r"clients\.server: personal") as refused:
        parse_config(PERSONAL | changed, where="test")
    assert refused.match(said)


def test_the_setting_travels_in_hello_and_is_absent_by_default():
    config = parse_config(PERSONAL, where="test")
    told = training_message(config)
    assert config_of(model_message(FACTS, config), told, device="cpu").clients.server == "personal"
    assert protocol_of(config) == 2
    usual = parse_config(PERSONAL | {"clients": {"count": 3}}, where="test")
    assert protocol_of(usual) == 1
    assert b"\x88\x01" not in training_message(usual).SerializeToString()  # field 17 is not sent
    assert told.SerializeToString().endswith(b"\x88\x01\x01")
