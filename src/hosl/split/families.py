"""One row per architecture: the names on either side of a cut. To add a model, add a row; tests do the rest.

Names are dotted paths from Hugging Face's top-level model (`OPTForCausalLM`, `BertForSequenceClassification`, ...).
"""

from dataclasses import dataclass
from typing import Any, Literal

from hosl.errors import SplitError

Head = Literal["causal", "classification"]
QueryPlace = Literal["all", "first", "by head"]
"""The place of the queries in a layer's output. `first`: before keys and values. `by head`: first within each head."""
StandIn = Literal["none", "identity", "zeros", "inputs_embeds"]
"""The kind of module that replaces one of the other side (`hosl.split.stand_ins`)."""


@dataclass(frozen=True, slots=True)
class Family:
    """The names of an architecture's modules on either side of a cut."""

    model_type: str
    """The value of `config.model_type`."""
    head: Head
    blocks: str
    """The name of the list of transformer blocks."""
    client_only: dict[str, StandIn]
    """The modules before the blocks, and what replaces each in the server half."""
    server_only: dict[str, StandIn]
    """The modules after the blocks, and what replaces each in the client half."""
    output_projections: tuple[str, str]
    """The layers of a block whose outputs are added to the residual stream: attention's and the feed-forward's last."""
    query: str
    """The layer of a block that computes the queries."""
    query_place: QueryPlace = "all"
    positions_from_mask: bool = False
    """Whether the forward pass counts padding as positions, which are absolute: it is told them by the mask instead."""


def _llama_like(model_type: str, query: str = "self_attn.q_proj", query_place: QueryPlace = "all") -> Family:
    return Family(
        model_type,
        "causal",
        blocks="model.layers",
        client_only={"model.embed_tokens": "none"},
        server_only={"model.norm": "identity", "lm_head": "identity"},
        output_projections=("self_attn.o_proj", "mlp.down_proj"),
        query=query,
        query_place=query_place,
    )


_ROWS = (
    Family(
        "opt",
        "causal",
        blocks="model.decoder.layers",
        client_only={
            "model.decoder.embed_tokens": "none",
            "model.decoder.embed_positions": "zeros",
            "model.decoder.project_in": "none",
        },
        server_only={
            "model.decoder.final_layer_norm": "none",
            "model.decoder.project_out": "none",
            "lm_head": "identity",
        },
        output_projections=("self_attn.out_proj", "fc2"),
        query="self_attn.q_proj",
    ),
    Family(
        "gpt2",
        "causal",
        blocks="transformer.h",
        client_only={"transformer.wte": "none", "transformer.wpe": "zeros", "transformer.drop": "identity"},
        server_only={"transformer.ln_f": "identity", "lm_head": "identity"},
        output_projections=("attn.c_proj", "mlp.c_proj"),
        query="attn.c_attn",
        query_place="first",
        positions_from_mask=True,
    ),
    Family(
        "gpt_neox",
        "causal",
        blocks="gpt_neox.layers",
        client_only={"gpt_neox.embed_in": "none", "gpt_neox.emb_dropout": "identity"},
        server_only={"gpt_neox.final_layer_norm": "identity", "lm_head": "identity"},
        output_projections=("attention.dense", "mlp.dense_4h_to_h"),
        query="attention.query_key_value",
        query_place="by head",
    ),
    *(_llama_like(m) for m in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")),
    _llama_like("phi3", "self_attn.qkv_proj", "first"),
    Family(
        "bert",
        "classification",
        blocks="bert.encoder.layer",
        client_only={"bert.embeddings": "inputs_embeds"},
        server_only={"bert.pooler": "none", "classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        query="attention.self.query",
    ),
    Family(
        "roberta",
        "classification",
        blocks="roberta.encoder.layer",
        client_only={"roberta.embeddings": "inputs_embeds"},
        server_only={"classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        query="attention.self.query",
    ),
    Family(
        "distilbert",
        "classification",
        blocks="distilbert.transformer.layer",
        client_only={"distilbert.embeddings": "inputs_embeds"},
        server_only={"pre_classifier": "identity", "classifier": "identity"},
        output_projections=("attention.out_lin", "ffn.lin2"),
        query="attention.q_lin",
    ),
)

FAMILIES: dict[tuple[str, Head], Family] = {(row.model_type, row.head): row for row in _ROWS}


def family_of(config: Any, architecture: str) -> Family:
    """The row for a Hugging Face config and the name of its top-level class.

    Raises:
        SplitError: if there is no such row.
    """
    head: Head = "classification" if architecture.endswith("ForSequenceClassification") else "causal"
    has_known_head = architecture.endswith(("ForSequenceClassification", "ForCausalLM", "LMHeadModel"))
    row = FAMILIES.get((config.model_type, head)) if has_known_head else None
    if row is None:
        rows = ", ".join(f"{name} ({head})" for name, head in FAMILIES)
        raise SplitError(
            f"cannot cut {architecture} (model_type {config.model_type!r}): no such family. Known: {rows}. "
            f"To add it, write a row for ({config.model_type!r}, its head) in hosl/split/families.py"
        )
    return row


def known_types() -> str:
    """The model types that hosl can cut, as a line."""
    return ", ".join(sorted({model_type for model_type, _ in FAMILIES}))
