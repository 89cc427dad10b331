"""Text -> batches: the embedded task, your own files, the paper's six tasks as prompts. No torch here."""

from hosl.tasks.base import Example, Task, task_digest
from hosl.tasks.configs import DocstringsConfig, FilesConfig, PromptsConfig, TaskConfig
from hosl.tasks.docstrings import docstrings_task
from hosl.tasks.files import files_task
from hosl.tasks.prompts import prompts_task
from hosl.tasks.tokenizer import TextTokenizer


def load_task(config: TaskConfig, tokenizer: TextTokenizer, *, seed: int) -> Task:
    """The task that a config describes, read, checked, split and encoded.

    Raises:
        TaskError: if its data cannot serve.
    """
    match config:
        case DocstringsConfig():
            return docstrings_task(config, tokenizer, seed=seed)
        case FilesConfig():
            return files_task(config, tokenizer, seed=seed)
        case PromptsConfig():
            return prompts_task(config, tokenizer, seed=seed)


__all__ = [
    "DocstringsConfig", "Example", "FilesConfig", "PromptsConfig", "Task", "TaskConfig", "TextTokenizer", "load_task",
    "task_digest",
]  # fmt: skip
