"""The parties of a config's method on PyTorch: which weights are trained, and who holds them."""

from collections.abc import Sequence
from typing import Any

import torch

from hosl.config import Config
from hosl.methods.schedule import learning_rate
from hosl.parties.authors_head import NoisyFirstOrderServer, NoisyZerothOrderClient
from hosl.parties.clients.activation_guided import ActivationGuidedClient, MixedClient
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.clients.guided import GuidedClient
from hosl.parties.clients.node import NodeClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.memory import resident_bytes
from hosl.parties.servers.basic import FirstOrderServer, TorchServer, ZerothOrderServer
from hosl.parties.servers.headed import HeadedServer, Trunk
from hosl.parties.servers.synchronous import SynchronousServer
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import ClientHalf, HeadHalf, TrunkHalf, add_lora, quantise_, set_trainable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_client(config: Config, half: ClientHalf, *, low_precision: bool = True) -> FrozenClient:
    """The client party of a method, its trained weights chosen.

    Args:
        config: the run's.
        half: is given to the party.
        low_precision: whether client.dtype is applied; False leaves the base weights as they are, for export.
    """
    prepare_client_half_(config, half, low_precision=low_precision)
    return client_on(config, half)


def prepare_client_half_(config: Config, half: ClientHalf, *, low_precision: bool = True) -> None:
    """Make the half's weights what the config wants, in place: low-precision base, adapters, what is trained."""
    of_client = "none" if config.method in ("frozen", "hosl-guided", "hosl-node") else config.client.trainable
    dtype = config.client.dtype
    if dtype != "model" and low_precision:
        quantise_(half, dtype)
    if of_client == "lora":
        adapters = None if dtype == "model" else torch.float32
        add_lora(half, config.client.lora, seed=config.seed, dtype=adapters)
    else:
        set_trainable(half, of_client)


def client_on(config: Config, half: ClientHalf) -> FrozenClient:
    """The client party of a method on a half that is prepared."""
    device, rows = config.client.device, config.client.micro_batch_size
    match config.method:
        case "frozen":
            return FrozenClient(half, micro_batch_size=rows, device=device)
        case "fo-fo" | "fo-zo":
            return FirstOrderClient(half, optimiser=config.client.optimiser, device=device)
        case "fo-recompute":
            return RecomputingClient(half, micro_batch_size=rows, device=device)
        case "hosl-guided" | "hosl-node":
            kind = GuidedClient if config.method == "hosl-guided" else NodeClient
            return kind(half, blocks=config.zo.guided_blocks, micro_batch_size=rows, device=device)
        case "hosl" | "hosl-gradient" | "zo-zo":
            guided = {"activation": ActivationGuidedClient, "mixed": MixedClient}
            kind = guided.get(config.zo.guidance, ZerothOrderClient)
            if config.profile == "authors-head":
                kind = NoisyZerothOrderClient
            return kind(half, distribution=config.zo.distribution, micro_batch_size=rows, device=device)


def make_server(
    config: Config, half: Any, new_weights: Sequence[str], *, synchronous: bool = False
) -> TorchServer | TrunkServer:
    """The server party of a method, its trained weights chosen.

    Args:
        config: the run's.
        half: a `ServerHalf`, or a `TrunkHalf` where the labels stay with the client; is given to the party.
        new_weights: names that the checkpoint did not hold: a new head has nothing to adapt, LoRA trains it itself.
        synchronous: whether several clients' gradients make one update.
    """
    if config.server.trainable == "lora":
        add_lora(half, config.server.lora, seed=config.seed)
        for name, p in half.named_parameters():
            if name in new_weights:
                p.requires_grad_(True)
    else:
        set_trainable(half, "all")
    eta = learning_rate(config, config.server.learning_rate)
    device = config.server.device
    if isinstance(half, TrunkHalf):
        return TrunkServer(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)
    if config.method in ("zo-zo", "fo-zo"):
        return ZerothOrderServer(half, learning_rate=eta, distribution=config.zo.distribution, device=device)
    kind = SynchronousServer if synchronous else FirstOrderServer
    if config.profile == "authors-head":
        kind = NoisyFirstOrderServer
    return kind(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)


def make_head(config: Config, half: HeadHalf, client_half: ClientHalf, trunk: Trunk) -> HeadedServer:
    """The head that a client holds beside its half, over the trunk; a tied weight stays the client's to train."""
    tied = {id(p) for p in client_half.parameters()}
    for p in half.parameters():
        if id(p) not in tied:
            p.requires_grad_(True)
    return HeadedServer(
        trunk, half, learning_rate=learning_rate(config, config.server.learning_rate),
        optimiser=config.server.optimiser, device=config.client.device, without=tied,
    )  # fmt: skip


def party_bytes(party: Any) -> int:
    """Bytes of the weights, buffers and optimiser state that a party holds between its calls."""
    tensors = [*party.half.model.parameters(), *party.half.model.buffers()]
    if isinstance(party, FirstOrderClient | FirstOrderServer):
        for state in party.optimiser.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return resident_bytes(tensors)


def trained_elements(party: Any) -> int:
    """How many numbers a party trains."""
    return sum(p.numel() for p in party.half.parameters() if p.requires_grad)
