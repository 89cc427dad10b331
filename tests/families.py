"""Tiny configs of the families that only their own contract tests build; `tests.conftest` has those of every test."""

import transformers as hf

BLOCKS = 3
_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
_WIDE = _SIZES | {"intermediate_size": 64}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_SLIDING = {"sliding_window": 5}  # shorter than the test sequences, so that sliding and full attention differ
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
_MPT = {"vocab_size": 97, "d_model": 32, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 64}
_NEO = {"vocab_size": 97, "hidden_size": 32, "num_layers": BLOCKS, "num_heads": 4, "intermediate_size": 64}
_NEO |= {
    "max_position_embeddings": 64,
    "window_size": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_NEO |= {"attention_types": [[["global", "local", "global"], 1]]}
_BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4}
_ALIBI = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
_GROUPED_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 64}
_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
_GRANITE |= {"attention_multiplier": 0.3}
_COHERE2 = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_FIVE = _WIDE | {"num_labels": 5}
_MODERN = {"local_attention": 6, "global_attn_every_n_layers": 2, "classifier_pooling": "cls"}
_MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "pad_token_id": 0,
}
_DEBERTA |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_DEBERTA |= {"type_vocab_size": 0}

LANGUAGE_MODELS = {
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, _HEADS | _EXPERTS),
    "qwen2_moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, _GROUPED | _LOCAL_EXPERTS | _SLIDING),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig, _HEADS | _LOCAL_EXPERTS | _SLIDING),
    "olmo": (hf.OlmoForCausalLM, hf.OlmoConfig, _GROUPED | {"clip_qkv": 3.0}),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, _GROUPED),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config, _GROUPED | {"no_rope_layer_interval": 2}),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, _GROUPED | {"use_qk_norm": True}),
    "cohere2": (hf.Cohere2ForCausalLM, hf.Cohere2Config, _GROUPED | _SLIDING | _COHERE2),
    "starcoder2": (hf.Starcoder2ForCausalLM, hf.Starcoder2Config, _GROUPED | _SLIDING),
    "gpt_bigcode": (hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, _GPT),
    "gpt_bigcode-heads": (hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, _GPT | {"multi_query": False}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, _HEADS),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, _GROUPED),
    "stablelm": (
        hf.StableLmForCausalLM,
        hf.StableLmConfig,
        _GROUPED | {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "exaone4": (hf.Exaone4ForCausalLM, hf.Exaone4Config, _GROUPED | _SLIDING | {"sliding_window_pattern": 2}),
    "glm4": (hf.Glm4ForCausalLM, hf.Glm4Config, _HEADS),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, _GROUPED | _GRANITE),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig, _SIZES | _GROUPED_FALCON),
    "falcon-multi-query": (hf.FalconForCausalLM, hf.FalconConfig, _SIZES | {"ffn_hidden_size": 64}),
    "falcon-alibi": (hf.FalconForCausalLM, hf.FalconConfig, _SIZES | _ALIBI),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, _BLOOM),
    "mpt": (hf.MptForCausalLM, hf.MptConfig, _MPT),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, _GPT | {"rotary_dim": 4}),
    "gpt_neo": (hf.GPTNeoForCausalLM, hf.GPTNeoConfig, _NEO),
}

ENCODERS = {
    "xlm-roberta": (hf.XLMRobertaForSequenceClassification, hf.XLMRobertaConfig, _FIVE),
    "camembert": (hf.CamembertForSequenceClassification, hf.CamembertConfig, _FIVE),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig, _FIVE | {"embedding_size": 16}),
    "modernbert": (hf.ModernBertForSequenceClassification, hf.ModernBertConfig, _FIVE | _MODERN),
    "deberta-v2": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, _FIVE | _DEBERTA),
}

_LABELS = {"num_labels": 5, "pad_token_id": 1}
_OPT = _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}
LAST_TOKEN_CLASSIFIERS = {
    "llama (class)": (hf.LlamaForSequenceClassification, hf.LlamaConfig, _GROUPED | _LABELS),
    "gpt2 (class)": (hf.GPT2ForSequenceClassification, hf.GPT2Config, _GPT | _LABELS),
    "opt (class)": (hf.OPTForSequenceClassification, hf.OPTConfig, _OPT | _LABELS),
    "qwen2 (class)": (hf.Qwen2ForSequenceClassification, hf.Qwen2Config, _GROUPED | _LABELS),
    "qwen3 (class)": (hf.Qwen3ForSequenceClassification, hf.Qwen3Config, _HEADS | _LABELS),
    "mistral (class)": (hf.MistralForSequenceClassification, hf.MistralConfig, _GROUPED | _SLIDING | _LABELS),
    "gpt_neox (class)": (hf.GPTNeoXForSequenceClassification, hf.GPTNeoXConfig, _WIDE | _LABELS),
    "gemma3 (class)": (
        hf.Gemma3TextForSequenceClassification,
        hf.Gemma3TextConfig,
        _HEADS | _SLIDING | _LABELS,
    ),
    "bloom (class)": (hf.BloomForSequenceClassification, hf.BloomConfig, _BLOOM | _LABELS),
    "falcon (class)": (
        hf.FalconForSequenceClassification,
        hf.FalconConfig,
        _SIZES | _GROUPED_FALCON | _LABELS,
    ),
    "mixtral (class)": (
        hf.MixtralForSequenceClassification,
        hf.MixtralConfig,
        _GROUPED | _LOCAL_EXPERTS | _LABELS,
    ),
}

MORE_MODELS = LANGUAGE_MODELS | ENCODERS | LAST_TOKEN_CLASSIFIERS

UNUSUAL = (
    "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "gpt_bigcode", "gpt_bigcode-heads", "granite", "falcon",
    "falcon-multi-query", "falcon-alibi", "bloom", "mpt", "gptj", "gpt_neo", "electra", "modernbert", "deberta-v2",
    "opt (class)",
)  # fmt: skip
"""Those whose blocks take or return something that no other family's do: the parties' engine is tried on them."""
