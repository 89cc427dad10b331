"""The batches of a run against the largest tensor that its server takes, before the first step. No torch."""

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.methods.schedule import longest_batch
from hosl.tasks import Task
from hosl.wire.tensors import packed_bytes


def check_tensor_limit(config: Config, task: Task, *, width: int, limit_bytes: int) -> None:
    """Refuse a run of which the longest batch of training, dev or test is more than the server takes at once.

    Args:
        config: the settings of the run.
        task: its data.
        width: the width of the hidden state.
        limit_bytes: the largest tensor, as the server's reply to Hello states it.

    Raises:
        ConfigError: naming the part, the setting and the largest value that it may have.
    """
    each = task.rows_per_example()
    rows, tokens = longest_batch(task, config)
    batches = [("train", "per_device_train_batch_size", rows, tokens)]
    for part, examples in (("dev", task.dev), ("test", task.test)):
        rows = min(max(config.per_device_eval_batch_size // each, 1), len(examples)) * each
        tokens = max(len(row) for example in examples for row in example.rows)
        batches.append((part, "per_device_eval_batch_size", rows, tokens))
    for part, setting, rows, tokens in batches:
        size = packed_bytes((rows, tokens, width), config.model.dtype, "none")
        if size > limit_bytes:
            most = limit_bytes // packed_bytes((1, tokens, width), config.model.dtype, "none")
            lower = f"set {setting} to {most} or less, " if most >= (each if part != "train" else 1) else ""
            raise ConfigError(
                f"a batch of {part}, {rows} rows of {tokens} tokens, takes {size:,} bytes on its way, the server takes "
                f"{limit_bytes:,} at once: {lower}lower task.max_tokens, or raise the server's --tensor-limit"
            )
