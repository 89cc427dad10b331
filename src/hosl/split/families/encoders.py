"""Encoders with a classification head, one row each."""

from hosl.split.families.family import Family

_POST_LN = {
    "attention.output.dense": ("attention.output.LayerNorm", "output.LayerNorm"), "output.dense": ("output.LayerNorm",),
}  # fmt: skip
_ON_STREAM = ("attention.output.LayerNorm", "output.LayerNorm")


def _roberta_like(model_type: str) -> Family:
    return Family(
        model_type,
        "classification",
        blocks="roberta.encoder.layer",
        client_only={"roberta.embeddings": "inputs_embeds"},
        server_only={"classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        norms_above=_POST_LN,
        norms_on_stream=_ON_STREAM,
        query="attention.self.query",
    )


ENCODERS = (
    Family(
        "bert",
        "classification",
        blocks="bert.encoder.layer",
        client_only={"bert.embeddings": "inputs_embeds"},
        server_only={"bert.pooler": "none", "classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        norms_above=_POST_LN,
        norms_on_stream=_ON_STREAM,
        query="attention.self.query",
    ),
    *(_roberta_like(m) for m in ("roberta", "xlm-roberta", "camembert")),
    Family(
        "distilbert",
        "classification",
        blocks="distilbert.transformer.layer",
        client_only={"distilbert.embeddings": "inputs_embeds"},
        server_only={"pre_classifier": "identity", "classifier": "identity"},
        output_projections=("attention.out_lin", "ffn.lin2"),
        norms_above={
            "attention.out_lin": ("sa_layer_norm", "output_layer_norm"),
            "ffn.lin2": ("output_layer_norm",),
        },
        norms_on_stream=("sa_layer_norm", "output_layer_norm"),
        query="attention.q_lin",
    ),
    Family(
        "electra",
        "classification",
        blocks="electra.encoder.layer",
        client_only={"electra.embeddings": "inputs_embeds", "electra.embeddings_project": "identity"},
        server_only={"classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        norms_above=_POST_LN,
        norms_on_stream=_ON_STREAM,
        query="attention.self.query",
    ),
    Family(
        "modernbert",
        "classification",
        blocks="model.layers",
        client_only={"model.embeddings": "inputs_embeds"},
        server_only={"model.final_norm": "identity", "head": "identity", "classifier": "identity"},
        output_projections=("attn.Wo", "mlp.Wo"),
        query="attn.Wqkv",
        query_place="first",
    ),
    Family(
        "deberta-v2",
        "classification",
        blocks="deberta.encoder.layer",
        client_only={"deberta.embeddings": "inputs_embeds"},
        server_only={"pooler": "identity", "classifier": "identity"},
        output_projections=("attention.output.dense", "output.dense"),
        norms_above=_POST_LN,
        norms_on_stream=_ON_STREAM,
        query=None,  # attention.self.query_proj also turns distances into queries, for all tokens at once
        blocks_return_tuples=True,
        needs_a_block=True,
        alone=("attention.self",),
        shared=("deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),
        cannot={"deberta.encoder.conv": "a convolution after block 0 reads the embeddings again"},
    ),
)
