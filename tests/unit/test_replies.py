"""The newest replies of a run: the same bits from memory and from files, within a limit, and nothing left behind."""

import tempfile

import numpy as np
import pytest

from hosl.service.hosted_half import Stepped
from hosl.service.replies import Replies
from hosl.wire.tensors import WireArray


def _reply(number, dtype="float32"):
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    values = np.random.Generator(np.random.Philox(key=number)).standard_normal((2, 8, 16)) * 100
    return Stepped(float(number), WireArray(values.astype(stored), dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_replies_beyond_the_limit_come_back_from_files_bit_for_bit(tmp_path, dtype):
    one_bytes = _reply(0, dtype).gradient.data.nbytes
    replies = Replies(tmp_path, in_memory_bytes=2 * one_bytes)
    for number in range(5):
        replies.put(f"client-{number}", 7, _reply(number, dtype))
    assert replies._bytes == 2 * one_bytes
    for number in range(5):
        back, sent = replies.of(f"client-{number}"), _reply(number, dtype)
        assert replies.step_of(f"client-{number}") == 7
        assert (back.loss, back.gradient.dtype) == (sent.loss, dtype)
        np.testing.assert_array_equal(back.gradient.data, sent.gradient.data)
    replies.put("client-0", 8, _reply(9, dtype))
    np.testing.assert_array_equal(replies.of("client-0").gradient.data, _reply(9, dtype).gradient.data)
    assert not list(tmp_path.iterdir()), "its files have no names: a killed process leaves none"
    replies.clear()
    assert replies._bytes == 0
    assert replies.step_of("client-0") is None


def test_replies_without_gradients_take_no_room(tmp_path):
    replies = Replies(tmp_path, in_memory_bytes=0)
    for number, reply in enumerate((Stepped(0.5), None, Stepped(0.25))):
        replies.put(f"client-{number}", 1, reply)
    assert [replies.of(f"client-{number}") for number in range(3)] == [Stepped(0.5), None, Stepped(0.25)]


def test_a_full_disk_leaves_replies_in_memory(tmp_path, monkeypatch):
    def full(**how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    replies = Replies(tmp_path, in_memory_bytes=0)
    replies.put("a", 1, _reply(1))
    np.testing.assert_array_equal(replies.of("a").gradient.data, _reply(1).gradient.data)
