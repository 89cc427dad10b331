"""Own text, instructions and chats, learned token by token: rows in TRL's formats -> spans of scored tokens."""

from hosl.tasks.sft.task import SftTask, sft_task

__all__ = ["SftTask", "sft_task"]
