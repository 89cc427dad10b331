"""A Hugging Face checkpoint of a Llama -> one GGUF file, as llama.cpp reads it. By the package gguf (extra `gguf`).

Names, metadata and the order of the rows of queries and keys are llama.cpp's; tensors are read one at a time. Rotary
scaling and tokenizers for which llama.cpp has no name that is known here are refused, or left out and said.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch

from hosl.errors import ConfigError, FailureError, FolderError
from hosl.split.reading.config_json import read_config

GgufDtype = Literal["float32", "float16"]
FAMILIES = ("llama",)
"""The families that can be written."""
_FAMILY_OF_TOKENIZER = {
    "smollm": ("Digits", "ByteLevel"),
    "gpt-2": ("ByteLevel",),
}
"""llama.cpp's name of a byte-level tokenizer -> what it does ahead of its merges."""
_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
"""The beginning of the pattern by which the tokenizer of Llama 3 splits; `llama-bpe` for llama.cpp."""


def check_gguf(family: str, out: Path) -> None:
    """Refuse what cannot be written, before anything else is done.

    Raises:
        ConfigError: if the family is another. FolderError: if the file is there already.
        ModuleNotFoundError: if gguf is not installed.
    """
    import gguf  # noqa: F401

    if family not in FAMILIES:
        raise ConfigError(
            f"--gguf writes models of the family {', '.join(FAMILIES)}, this is a {family}; leave --gguf out, and "
            "convert the folder by llama.cpp's own convert_hf_to_gguf.py"
        )
    if out.exists():
        raise FolderError(f"{out} exists; nothing is overwritten: name another file")


def write_gguf(folder: Path, out: Path, say: Callable[[str], None], *, dtype: GgufDtype = "float32") -> int:
    """Write the checkpoint in `folder` as the GGUF file `out`, whole or not at all; returns its bytes.

    Args:
        folder: config, one model.safetensors, tokenizer; as hosl exports them.
        out: a file to make.
        say: is called with a line where there is no tokenizer that llama.cpp could read.
        dtype: of the matrices; vectors are float32.

    Raises:
        ConfigError: if the family is another, or the model has what a Llama of llama.cpp has not.
        FolderError: if the file is there already. FailureError: if it cannot be written.
    """
    config: Any = read_config(folder, str(folder))
    check_gguf(config.model_type, out)
    import gguf

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _add_metadata(writer, config, out.stem, dtype)
        lacking = _add_tokenizer(writer, folder, config.vocab_size)
        if lacking:
            say(f"{out} holds no tokenizer: {lacking}")
        with safetensors.safe_open(folder / "model.safetensors", "pt") as content:
            _write_tensors(writer, content, config, dtype)
        writer.close()
        partial.replace(out)
    except OSError as cause:
        raise FailureError(
            f"{out} could not be written: {cause.strerror or cause}; nothing was left behind"
        ) from cause
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return out.stat().st_size


def _add_metadata(writer: Any, config: Any, name: str, dtype: GgufDtype) -> None:
    import gguf

    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"--gguf: rotary scaling {rope['rope_type']} is not written; convert the folder by llama.cpp's own "
            "convert_hf_to_gguf.py"
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_tensors(writer: Any, content: Any, config: Any, dtype: GgufDtype) -> None:
    """Announce every tensor, then write them one after the other."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    keys = list(content.keys())
    for key in keys:
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"--gguf: a Llama of llama.cpp has no tensor for {key}")
        shape = tuple(content.get_slice(key).get_shape())
        stored = np.dtype(dtype if len(shape) > 1 else "float32")
        writer.add_tensor_info(name, shape, stored, int(np.prod(shape)) * stored.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key in keys:
        tensor: torch.Tensor = content.get_tensor(key)
        array = tensor.to(torch.float32).numpy()
        writer.write_tensor_data(
            np.ascontiguousarray(_as_stored(key, array, config)).astype(
                dtype if array.ndim > 1 else "float32"
            )
        )


def _as_stored(key: str, array: np.ndarray, config: Any) -> np.ndarray:
    """The rows of queries and keys in llama.cpp's order: both halves of a head's rotation are woven together there."""
    heads = config.num_attention_heads
    if ".k_proj." in key:
        heads = getattr(config, "num_key_value_heads", None) or heads
    elif ".q_proj." not in key:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> str | None:
    """Add the tokenizer's metadata; returns why there is none."""
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        return "the model's folder has no tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = _kind(tokenizer)
    if kind is None:
        return "llama.cpp knows tokenizers by name, and this one's is not known here"
    texts, types = _tokens(tokenizer, vocabulary)
    model, pre = kind
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if model == "llama":
        order = dict[str, int]()
        for rank, merge in enumerate(_merged(tokenizer)):
            order.setdefault(merge, rank)
        writer.add_token_scores([-float(order.get(text, len(order))) for text in texts])
    writer.add_add_space_prefix(_prepends_space(tokenizer))
    special = gguf.SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)
    return None


def _kind(tokenizer: dict[str, Any]) -> tuple[str, str] | None:
    """llama.cpp's model and name of a tokenizer; None: it is not known."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        return "llama", "default"
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if steps[0].get("type") == "Split" and str(steps[0]["pattern"].get("Regex", "")).startswith(_LLAMA_3):
        return "gpt2", "llama-bpe"
    types = tuple(step.get("type") for step in steps)
    found = next((name for name, known in _FAMILY_OF_TOKENIZER.items() if known == types), None)
    return ("gpt2", found) if found else None


def _tokens(tokenizer: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and type of every token by its id; ids without a token are unused."""
    import gguf

    kinds = gguf.TokenType
    texts = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(kinds.UNUSED)] * vocabulary
    for text, index in tokenizer["model"]["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[index], types[index] = text, int(kinds.BYTE if is_byte else kinds.NORMAL)
    unknown = tokenizer["model"].get("unk_token")
    for added in tokenizer.get("added_tokens", ()):
        kind = kinds.UNKNOWN if added["content"] == unknown else kinds.CONTROL
        index = added["id"]
        texts[index] = added["content"]
        types[index] = int(kind if added["special"] else kinds.USER_DEFINED)
    return texts, types


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a text gets a space ahead of it, as SentencePiece does by default."""
    normalizer, before = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    prepends = any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
    return prepends or before.get("prepend_scheme") in ("always", "first")


def _merged(tokenizer: dict[str, Any]) -> list[str]:
    """The tokens that merges make, the first first: their order is what SentencePiece calls a score."""
    merges = tokenizer["model"].get("merges", [])
    return ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
