"""Decoders with a language model's head, one row each; each is a classifier's row too (`Family.as_classifier`)."""

from hosl.split.families.family import Family, QueryPlace, StandIn


def _llama_like(
    model_type: str,
    *,
    query: str = "self_attn.q_proj",
    query_place: QueryPlace = "all",
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj"),
    norm: str = "model.norm",
    before: dict[str, StandIn] | None = None,
    norms: tuple[str, ...] = (),
    output_scale: str = "",
) -> Family:
    return Family(
        model_type,
        "causal",
        blocks="model.layers",
        client_only={"model.embed_tokens": "none", **(before or {})},
        server_only={norm: "identity", "lm_head": "identity"},
        output_projections=writers,
        norms_above={writer: (name,) for writer, name in zip(writers, norms, strict=False)},
        output_scale=output_scale,
        query=query,
        query_place=query_place,
    )


_EXPERTS = ("self_attn.o_proj",)  # what follows is a choice of experts, not a layer


def _gpt2_like(model_type: str, query: str, writers: tuple[str, str], query_place: QueryPlace) -> Family:
    return Family(
        model_type,
        "causal",
        blocks="transformer.h",
        client_only={"transformer.wte": "none", "transformer.wpe": "zeros", "transformer.drop": "identity"},
        server_only={"transformer.ln_f": "identity", "lm_head": "identity"},
        output_projections=writers,
        query=query,
        query_place=query_place,
        positions_from_mask=True,
        blocks_return_tuples=model_type == "gpt_neo",
    )


DECODERS = (
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
        norms_above={
            "self_attn.out_proj": ("self_attn_layer_norm", "final_layer_norm"), "fc2": ("final_layer_norm",),
        },
        norms_on_stream=("self_attn_layer_norm", "final_layer_norm"),
        norms_where=("do_layer_norm_before", False),
        query="self_attn.q_proj",
    ),
    _gpt2_like("gpt2", "attn.c_attn", ("attn.c_proj", "mlp.c_proj"), "first"),
    _gpt2_like("gpt_bigcode", "attn.c_attn", ("attn.c_proj", "mlp.c_proj"), "by head"),
    _gpt2_like("gpt_neo", "attn.attention.q_proj", ("attn.attention.out_proj", "mlp.c_proj"), "all"),
    Family(
        "gptj",
        "causal",
        blocks="transformer.h",
        client_only={"transformer.wte": "none", "transformer.drop": "identity"},
        server_only={"transformer.ln_f": "identity", "lm_head": "identity"},
        output_projections=("attn.out_proj", "mlp.fc_out"),
        query="attn.q_proj",
        blocks_return_tuples=True,
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
    Family(
        "bloom",
        "causal",
        blocks="transformer.h",
        client_only={
            "transformer.word_embeddings": "none",
            "transformer.word_embeddings_layernorm": "identity",
        },
        server_only={"transformer.ln_f": "identity", "lm_head": "identity"},
        output_projections=("self_attention.dense", "mlp.dense_4h_to_h"),
        norms_above={"self_attention.dense": ("post_attention_layernorm",)},
        norms_on_stream=("input_layernorm", "post_attention_layernorm"),
        norms_where=("apply_residual_connection_post_layernorm", True),
        query="self_attention.query_key_value",
        query_place="by head",
        blocks_return_tuples=True,
    ),
    Family(
        "falcon",
        "causal",
        blocks="transformer.h",
        client_only={"transformer.word_embeddings": "none"},
        server_only={"transformer.ln_f": "identity", "lm_head": "identity"},
        output_projections=("self_attention.dense", "mlp.dense_4h_to_h"),
        query="self_attention.query_key_value",
        query_place="by head",
        blocks_return_tuples=True,
    ),
    Family(
        "mpt",
        "causal",
        blocks="transformer.blocks",
        client_only={"transformer.wte": "none"},
        server_only={"transformer.norm_f": "identity", "lm_head": "identity"},
        output_projections=("attn.out_proj", "ffn.down_proj"),
        query="attn.Wqkv",
        query_place="first",
        blocks_return_tuples=True,
    ),
    *(
        _llama_like(m)
        for m in (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "cohere", "cohere2", "stablelm",
        )
    ),
    *(
        _llama_like(m, norms=("post_attention_layernorm", "post_feedforward_layernorm"))
        for m in ("gemma2", "gemma3_text", "olmo2", "exaone4")
    ),
    _llama_like("glm4", norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    *(_llama_like(m, writers=_EXPERTS) for m in ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss")),
    _llama_like("granite", before={"model.embedding_multiplier": "one"}, output_scale="residual_multiplier"),
    _llama_like(
        "phi",
        before={"model.embed_dropout": "identity"},
        writers=("self_attn.dense", "mlp.fc2"),
        norm="model.final_layernorm",
    ),
    _llama_like("phi3", query="self_attn.qkv_proj", query_place="first"),
    _llama_like(
        "starcoder2", before={"model.embedding_dropout": "zero"}, writers=("self_attn.o_proj", "mlp.c_proj")
    ),
)  # fmt: skip
