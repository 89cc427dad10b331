"""Own text, instructions and chats, learned token by token: rows in TRL's formats -> spans of scored tokens."""

from hosl.tasks.sft.task import SftTask, own_chat_template, sft_task

__all__ = ["SftTask", "own_chat_template", "sft_task"]
