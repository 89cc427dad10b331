"""A Hugging Face model -> two halves, and back. Names are imported at first use: the settings need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hosl.split.adapters import add_lora, set_trainable
    from hosl.split.artifact import SplitInfo, load_half, load_head, split_folder
    from hosl.split.export import export_adapter, export_checkpoint
    from hosl.split.halves import ClientHalf, ServerHalf, split_model
    from hosl.split.quantised import quantise_
    from hosl.split.reading.loading import LoadedModel, load_model
    from hosl.split.reading.model_folder import resolve_model_folder
    from hosl.split.reading.tokenizer import transformers_tokenizer
    from hosl.split.specs import LoraSpec
    from hosl.split.u_shape import HeadHalf, TrunkHalf, joined_server_half, split_u_shape

_MODULES = {
    "LoraSpec": "specs",
    "add_lora": "adapters",
    "set_trainable": "adapters",
    "SplitInfo": "artifact",
    "load_half": "artifact",
    "split_folder": "artifact",
    "export_adapter": "export",
    "export_checkpoint": "export",
    "ClientHalf": "halves",
    "ServerHalf": "halves",
    "split_model": "halves",
    "quantise_": "quantised",
    "HeadHalf": "u_shape",
    "TrunkHalf": "u_shape",
    "split_u_shape": "u_shape",
    "joined_server_half": "u_shape",
    "load_head": "artifact",
    "LoadedModel": "reading.loading",
    "load_model": "reading.loading",
    "resolve_model_folder": "reading.model_folder",
    "transformers_tokenizer": "reading.tokenizer",
}

__all__ = [
    "ClientHalf", "HeadHalf", "LoadedModel", "LoraSpec", "ServerHalf", "SplitInfo", "TrunkHalf", "add_lora",
    "export_adapter", "export_checkpoint", "joined_server_half", "load_half", "load_head", "load_model", "quantise_",
    "resolve_model_folder", "set_trainable", "split_folder", "split_model", "split_u_shape", "transformers_tokenizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module hosl.split has no name {name!r}")
    return getattr(import_module(f"hosl.split.{_MODULES[name]}"), name)
