"""Text -> batches: the embedded task, your own files, your own text to learn, the paper's prompts. No torch here."""

from collections.abc import Sequence

from hosl.tasks.base import Example, Task, task_digest
from hosl.tasks.configs import DocstringsConfig, FilesConfig, PromptsConfig, SftConfig, TaskConfig
from hosl.tasks.docstrings import docstrings_task
from hosl.tasks.files import files_task
from hosl.tasks.label_order import in_model_order, labels_digest, model_labels
from hosl.tasks.prompts import prompts_task
from hosl.tasks.sft import own_chat_template, sft_task
from hosl.tasks.tokenizer import TextTokenizer


def load_task(
    config: TaskConfig, tokenizer: TextTokenizer, *, seed: int, model_labels: Sequence[str] = ()
) -> Task:
    """The task that a config describes, read, checked, split and encoded.

    Args:
        config: the settings of the task.
        tokenizer: the model's.
        seed: the seed of the rows that train_rows keeps.
        model_labels: the classes of the model's head (`model_labels`), whose order the task takes where it has every
            class of the data and task.labels says nothing else.

    Raises:
        TaskError: if its data cannot serve.
    """
    match config:
        case DocstringsConfig():
            return in_model_order(docstrings_task(config, tokenizer, seed=seed), model_labels)
        case FilesConfig():
            task = files_task(config, tokenizer, seed=seed)
            return in_model_order(task, model_labels, reorder=not config.labels)
        case PromptsConfig():
            return prompts_task(config, tokenizer, seed=seed)
        case SftConfig():
            return sft_task(config, tokenizer, seed=seed)


__all__ = [
    "DocstringsConfig", "Example", "FilesConfig", "PromptsConfig", "SftConfig", "Task", "TaskConfig", "TextTokenizer",
    "labels_digest", "load_task", "model_labels", "own_chat_template", "task_digest",
]  # fmt: skip
