"""Tiny random models of every family, batches for them, and the way to real data."""

import os
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import transformers as hf

from hosl.core.targets import Batch, ClassTargets, OptionTargets
from hosl.parties.engine.memory import TorchMemory  # noqa: F401  (imports the profiler once, before warnings are errors)
from tests import remembered_peaks
from tests.families import MORE_MODELS

hf.logging.disable_progress_bar()  # its bars would stand among the lines that tests count

BLOCKS = 3
_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
_WIDE = _SIZES | {"intermediate_size": 64}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_OPT = _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_DISTIL = {"vocab_size": 97, "dim": 32, "hidden_dim": 64, "n_layers": BLOCKS, "n_heads": 4}

# a window of 5 is shorter than the test sequences, so sliding and full attention differ
MODELS = {
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT),
    "opt-post-ln": (hf.OPTForCausalLM, hf.OPTConfig, _OPT | {"do_layer_norm_before": False}),
    "opt-projections": (hf.OPTForCausalLM, hf.OPTConfig, _OPT | {"word_embed_proj_dim": 16}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _WIDE),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _GROUPED | {"sliding_window": 5}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _GROUPED | {"head_dim": 8}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, _WIDE),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, _WIDE | {"num_labels": 5}),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig, _WIDE | {"num_labels": 5}),
    "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig, _DISTIL | {"num_labels": 5}),
}


def build(name, dtype=torch.float32, seed=0, attention=None, **changed):
    """A tiny model of a family, every weight drawn from the seed; biases and norms too, so that none is trivial.

    `changed`: settings of its config in place of, or beside, the usual ones.
    """
    model_class, config_class, settings = (MODELS | MORE_MODELS)[name]
    config = config_class(**settings | changed)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return model.to(dtype)


@pytest.fixture(scope="session", autouse=True)
def peaks_once(tmp_path_factory):
    """The plan of a report's page is made once, here and in forked processes (`tests.remembered_peaks`)."""
    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "peaks"
    folder.mkdir(exist_ok=True)
    os.environ[remembered_peaks.FOLDER] = str(folder)
    remembered_peaks.remember(folder)
    yield
    remembered_peaks.forget()
    del os.environ[remembered_peaks.FOLDER]


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture
def unchecked():
    """Annotations are not verified meanwhile: for long runs of what shorter tests verify."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny():
    """`tiny(name)` builds a tiny model."""
    return build


@pytest.fixture
def padded():
    """`padded(side)` gives ids and mask [3, 11] with that side padded."""

    def batch(side, rows=3, width=11, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 97, (rows, width), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate((0, 4, 2)[:rows]):
            if side == "left":
                mask[row, :length] = 0
            elif side == "right" and length:
                mask[row, -length:] = 0
        ids[mask == 0] = 1
        return ids, mask

    return batch


@pytest.fixture
def class_batch(padded):
    ids, mask = padded("right")
    targets = ClassTargets(mask.numpy().astype(np.int8), np.array([0, 3, 1], dtype=np.int64))
    return Batch(ids.numpy(), targets)


@pytest.fixture
def option_batch(padded):
    ids, mask = padded("left")
    positions = np.array([[8, 9], [9, 0], [8, 9]], dtype=np.int32)
    tokens = ids.numpy()[:, 9:].astype(np.int32).copy()
    tokens[1] = [tokens[1, 1], -1]
    return Batch(ids.numpy(), OptionTargets(mask.numpy().astype(np.int8), positions, tokens))


@pytest.fixture
def hosl_data():
    """The folder of real tasks and weights, for tests that need them."""
    folder = os.environ.get("HOSL_DATA")
    if not folder:
        pytest.skip("HOSL_DATA is not set: it names the folder with data/tasks and models/minilm-l6-as-opt")
    return Path(folder)
