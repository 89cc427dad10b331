"""A Hugging Face model in two halves: with HF's own forward and parameter names, bit for bit the whole model.

`cut_to_client_` and `cut_to_server_` are the one place where modules are taken away; `split_model` uses them on a model
in memory, `hosl.split.artifact` on a skeleton that is then filled from a split folder.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from hosl.errors import SplitError
from hosl.split.caches import HalfCache
from hosl.split.families import Family, Head
from hosl.split.reading.config_json import PLAIN_CALLS
from hosl.split.stand_ins import PassThrough, stand_in
from hosl.split.structure import family_for, submodule
from hosl.system.model_limits import check_row_length


class Half:
    """The base of all pieces: an HF module tree of which only one side is left."""

    def __init__(self, model: Any, family: Family, cut: int) -> None:
        self.model = model
        """The HF model; parameters keep their names in the whole model, prefix included."""
        self.config = _settle_calls_(model)
        """The Hugging Face config of the whole model, as it is written; `model.config` is that of the calls."""
        self.cut = cut
        self._family = family
        for name in family.shared:
            if (module := submodule(model, name)) is not None:
                module.requires_grad_(False)
        for block in model.get_submodule(family.blocks):
            for name in family.alone:
                if not isinstance(block, PassThrough):
                    block.get_submodule(name).one_evaluation_at_a_time = True
        self.eval()

    @property
    def family(self) -> str:
        """The value of `config.model_type`."""
        return self._family.model_type

    @property
    def causal(self) -> bool:
        """Whether tokens see only those before them."""
        return self._family.is_decoder

    @property
    def head(self) -> Head:
        """The kind of the whole model's head."""
        return self._family.head

    @property
    def head_names(self) -> tuple[str, ...]:
        """The modules after the blocks, by their dotted names."""
        return tuple(self._family.server_only)

    @property
    def blocks_name(self) -> str:
        """The dotted name of the block list; parameters of blocks start with it."""
        return self._family.blocks

    @property
    def shared(self) -> tuple[str, ...]:
        """The modules outside the blocks that each half has and neither trains, by their dotted names."""
        return self._family.shared

    @property
    def output_projections(self) -> tuple[str, ...]:
        """The layers of a block whose outputs are added to the residual stream, by their names within the block.

        Raises:
            SplitError: if they are not known, as where the architecture has no row in `hosl.split.families`.
        """
        if not self._family.output_projections:
            raise _unknown(self.family, "the layers of a block that write to the residual stream")
        return self._family.output_projections

    @property
    def norms_above(self) -> Mapping[str, tuple[str, ...]]:
        """By output projection, the norms between it and the block's output, from the projection up."""
        return self._family.norms_above if self._has_norms else {}

    @property
    def norms_on_stream(self) -> tuple[str, ...]:
        """The norms of a block that the residual stream itself passes (post-LN), from the block's input up."""
        return self._family.norms_on_stream if self._has_norms else ()

    @property
    def _has_norms(self) -> bool:
        return self._family.has_norms(lambda name: getattr(self.config, name))

    @property
    def output_scale(self) -> str:
        """The attribute of a block by which outputs are multiplied before they join the residual stream, or ""."""
        return self._family.output_scale

    @property
    def query(self) -> str:
        """The layer of a block that computes the queries, by its name within the block; errors as above."""
        if self._family.query is None:
            raise _unknown(self.family, "a layer of a block that computes the tokens' queries alone")
        return self._family.query

    @property
    def query_features(self) -> torch.Tensor:
        """The indices of the queries in the output of `query`, int64: all, unless keys and values are in it too."""
        config = self.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if self._family.query_place == "by head":
            groups = getattr(config, "num_kv_heads", None) or heads
            if getattr(config, "multi_query", False) and not getattr(
                config, "new_decoder_architecture", False
            ):
                groups = 1
            in_group = heads // groups
            places = torch.arange(groups * (in_group + 2) * size)
            return places.view(groups, in_group + 2, size)[:, :in_group].flatten()
        return torch.arange(heads * size)

    @property
    def own_blocks(self) -> range:
        """The indices of this side's blocks."""
        return range(self.cut, len(self.model.get_submodule(self._family.blocks)))

    def new_cache(self) -> HalfCache:
        """An empty cache, for calls that go on with one text."""
        return HalfCache(self.config, self.own_blocks)

    def _keeping(self, cache: HalfCache | None) -> dict[str, Any]:
        """The options of HF's forward about the cache."""
        if not self._family.is_decoder:
            return {}
        return {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache.states}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This side's parameters by their names in the whole model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This side's parameters."""
        return self.model.parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This side's tensors by their names in the whole model."""
        return self.model.state_dict()

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], *, assign: bool = False) -> None:
        """Load tensors under their names in the whole model; all of this side must be there, and no other."""
        self.model.load_state_dict(tensors, assign=assign)

    def convert(self, dtype: torch.dtype) -> "Half":
        """Change the parameters' dtype, in place; buffers keep theirs, as when HF loads a model in a dtype."""
        for p in self.model.parameters():
            if p.is_floating_point():
                p.data = p.data.to(dtype)
        return self

    def to(self, target: torch.device | torch.dtype) -> "Half":
        """Move to a device or convert to a dtype, as torch.nn.Module.to; nothing is done on the device already."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        if isinstance(target, torch.dtype) or any(t.device != target for t in tensors):
            self.model.to(target)
        return self

    def eval(self) -> "Half":
        """Turn dropout off, as it is in a new half and must be for probes; returns the half."""
        self.model.eval()
        return self

    def train(self) -> "Half":
        """Turn dropout on, where the config has any; returns the half."""
        self.model.train()
        return self


class ClientHalf(Half):
    """Embeddings and blocks 0..cut-1. `client_half(input_ids, attention_mask)` is the hidden state at the cut."""

    hidden_dtype: torch.dtype | None = None
    """The dtype of the returned hidden state; None: as computed. A low-precision base keeps the dtype of the model."""

    @property
    def own_blocks(self) -> range:
        """The indices of this side's blocks."""
        return range(self.cut)

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: HalfCache | None = None
    ) -> torch.Tensor:
        """The hidden state at the cut, h = f_c(x).

        Args:
            input_ids: [rows, seq], int64.
            attention_mask: [rows, seq], int64; 0 is padding, on either side. With a cache: of its tokens too.
            cache: the tokens before these, for one row of a causal model; is made longer in place.

        Returns:
            The hidden state [rows, seq, width] in the weights' dtype, or in `hidden_dtype`.

        Raises:
            SplitError: if the rows are so long that rotary scaling would make them depend on each other.
        """
        text = self.config.get_text_config().to_dict()
        check_row_length(text, self.config.model_type, attention_mask.shape[1])
        base = getattr(self.model, self.model.base_model_prefix)
        options = self._keeping(cache)
        if self._family.positions_from_mask:
            seen = attention_mask.shape[1] - input_ids.shape[1]
            places = torch.arange(seen, attention_mask.shape[1], device=input_ids.device)
            # from a row's first token on: the argmax of its mask
            options["position_ids"] = (places - attention_mask.argmax(-1, keepdim=True)).clamp(min=0)
        h = base(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        if cache is not None:
            cache.advance_(input_ids.shape[1])
        return h if self.hidden_dtype is None else h.to(self.hidden_dtype)


class ServerHalf(Half):
    """Blocks cut..n-1 and the head. `server_half(hidden, attention_mask)` is the logits."""

    def __call__(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: HalfCache | None = None,
    ) -> torch.Tensor:
        """The logits, f_s(h).

        Args:
            hidden: [rows, seq, width], what the client half returned.
            attention_mask: [rows, seq], int64, the same as the client's.
            positions: [positions], int64; the positions of the logits, for a causal model. None: all. Or
                [scored, 2], int64, each a row and a position in it: of each row its own.
            cache: the tokens before these, for one row of a causal model; is made longer in place.

        Returns:
            Logits: [rows, classes], or [rows, seq or positions, vocabulary]; of each row its own:
            [1, scored, vocabulary], in the order of `positions`.
        """
        if positions is not None and positions.dim() == 2:
            return self._logits_at(hidden, attention_mask, positions)
        options = self._keeping(cache)
        if self._family.pools_last_token:
            # transformers would look for padding in ids, which a server does not have
            base = getattr(self.model, self.model.base_model_prefix)
            states = base(inputs_embeds=hidden, attention_mask=attention_mask, **options).last_hidden_state
            return at_last_token(self.model.score(states), attention_mask)
        if positions is not None and self._family.head == "causal":
            options["logits_to_keep"] = positions
        logits = self.model(inputs_embeds=hidden, attention_mask=attention_mask, **options).logits
        if cache is not None:
            cache.advance_(hidden.shape[1])
        return logits

    def _logits_at(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """The logits at rows and positions; states are taken before the head, which is most of a small model."""
        columns, column = places[:, 1].unique(return_inverse=True)

        def take(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            (states,) = arguments  # [rows, columns, width]
            return (states[places[:, 0], column][None],)

        with self.model.get_output_embeddings().register_forward_pre_hook(take):
            return self(hidden, attention_mask, columns)


def at_last_token(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """[rows, features], the values [rows, seq, features] at each row's last token that is no padding."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (places * (attention_mask != 0)).argmax(-1)
    return values[torch.arange(len(values), device=values.device), last.to(values.device)]


def split_model(model: Any, cut: int) -> tuple[ClientHalf, ServerHalf]:
    """Cut a Hugging Face model between blocks cut-1 and cut.

    The halves share the model's tensors: no weight is copied, and training a half trains the model's too. Only a tied
    output head is copied, since the embedding that it is tied to stays with the client: each side trains its own copy,
    from the same start. Dropout is off in both halves (`eval`).

    Args:
        model: a `...ForCausalLM` or `...ForSequenceClassification` of a known family, or of one that can be cut by its
            structure.
        cut: 0 (only the embeddings on the client) to n (only the head on the server).

    Raises:
        SplitError: if the family is unknown, or the cut is outside 0..n.
    """
    return halves_of(model, family_for(model), cut)


def halves_of(model: Any, family: Family, cut: int) -> tuple[ClientHalf, ServerHalf]:
    """The two halves of a model whose family is known already; errors as of `split_model`."""
    check_cut(family, model, cut)
    client_model, server_model = (
        deepcopy(model, {id(p): p for p in model.parameters()}) for _ in ("client", "server")
    )
    cut_to_client_(client_model, family, cut)
    cut_to_server_(server_model, family, cut)
    separate_ties_(client_model, server_model)
    return ClientHalf(client_model, family, cut), ServerHalf(server_model, family, cut)


def check_cut(family: Family, model: Any, cut: int) -> None:
    """Refuse a cut outside the model, and a model with modules that no cut allows.

    Raises:
        SplitError: saying how many blocks there are, or what stands in the way.
    """
    for name, reason in family.cannot.items():
        if submodule(model, name) is not None:
            raise SplitError(f"cannot cut this {family.model_type}: its config adds {name}, {reason}")
    n = len(model.get_submodule(family.blocks))
    if not 0 <= cut <= n:
        raise SplitError(
            f"cut={cut} is outside 0..{n}: {type(model).__name__} has {n} blocks. "
            f"0 keeps only the embeddings on the client; {n} leaves the server the head."
        )


def cut_to_client_(model: Any, family: Family, cut: int) -> None:
    """Take away, in place, what the server owns."""
    blocks = model.get_submodule(family.blocks)
    kept = list(blocks[:cut]) or ([_passing(blocks[0], family)] if family.needs_a_block else [])
    _replace_(model, family.blocks, nn.ModuleList(kept))
    for name, kind in family.server_only.items():
        _replace_(model, name, stand_in(kind))


def cut_to_server_(model: Any, family: Family, cut: int) -> None:
    """Take away, in place, what the client owns."""
    blocks = model.get_submodule(family.blocks)
    passing = [_passing(block, family) for block in blocks[:cut]]
    _replace_(model, family.blocks, nn.ModuleList(passing + list(blocks[cut:])))
    for name, kind in family.client_only.items():
        _replace_(model, name, stand_in(kind))


def _passing(block: nn.Module, family: Family) -> nn.Module:
    return PassThrough(block, returns_tuple=family.blocks_return_tuples)


def _settle_calls_(model: Any) -> Any:
    """Have a model return named outputs without caches and attentions, in one piece, whatever its config asks for.

    Returns the config to write: of what was asked, it lacks only what plain transformers may fail with.
    """
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = PLAIN_CALLS["chunk_size_feed_forward"]
    model.config.update(PLAIN_CALLS)
    written = deepcopy(model.config)
    written._attn_implementation = (
        None  # this process's; a config is not written if it does not fit output_attentions
    )
    model.config.update({"use_cache": False, "output_attentions": False, "output_hidden_states": False})
    return written


def _replace_(model: Any, name: str, value: nn.Module | float | None) -> None:
    if submodule(model, name) is not None:  # OPT has no project_in when the widths agree
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, value)


def _unknown(family: str, what: str) -> SplitError:
    return SplitError(
        f"this method moves {what}, which hosl does not know of {family}; choose one that moves all weights, such as "
        "hosl or hosl-gradient"
    )


def separate_ties_(client_model: nn.Module, server_model: nn.Module) -> None:
    """Give the server's model copies of the parameters that it shares with the client's."""
    clients = {id(p) for p in client_model.parameters()}
    for module in server_model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None and id(p) in clients:
                setattr(module, key, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
