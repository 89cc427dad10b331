"""The parties of a config's method on PyTorch, with the weights that they train."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.methods.schedule import learning_rate
from hosl.methods.trained_head import beside_adapters, trained_at_client
from hosl.parties.authors_head import NoisyFirstOrderServer, NoisyZerothOrderClient
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.clients.guided import GuidedClient
from hosl.parties.clients.node import NodeClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.clients.residual import ResidualClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.memory import resident_bytes
from hosl.parties.headed import Trunk
from hosl.parties.servers.basic import FirstOrderServer, TorchServer, ZerothOrderServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.synchronous import SynchronousServer
from hosl.parties.servers.trunk import SynchronousTrunkServer, TrunkServer
from hosl.split import ClientHalf, HeadHalf, LoraSpec, TrunkHalf, add_lora, quantise_, set_trainable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_device(name: str, setting: str) -> None:
    """Refuse a torch device that this machine does not have.

    Args:
        name: the device, such as cuda:0.
        setting: the name of the setting, for the error.

    Raises:
        ConfigError: if no tensor can be made there.
    """
    try:
        if torch.empty(1, device=name).device.type != "meta":
            return
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError) as cause:  # torch has a kind for each build
        reason = str(cause).partition("\n")[0].partition(". ")[0]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise ConfigError(f"{setting}: {name} cannot be used on this machine: {reason}; there is {there}")


def make_client(config: Config, half: ClientHalf, *, low_precision: bool = True) -> FrozenClient:
    """The client party of a method on a half that is not prepared yet.

    Args:
        config: the run's config.
        half: the client half; the party takes it over.
        low_precision: whether client.dtype is applied; False leaves the base weights as they are, for export.
    """
    prepare_client_half_(config, half, low_precision=low_precision)
    return client_on(config, half)


def prepare_client_half_(config: Config, half: ClientHalf, *, low_precision: bool = True) -> None:
    """Prepare the half for the config, in place: low-precision base weights, adapters, choice of trained weights."""
    chosen = config.method_row.trains == "chosen" or config.client.trainable == "lora"
    trained = config.client.trainable if chosen and config.method_row.trains != "nothing" else "none"
    dtype = config.client.dtype
    if dtype != "model" and low_precision:
        quantise_(half, dtype)
    if trained == "lora":
        adapters = None if dtype == "model" else torch.float32
        blocks = config.trained_blocks if config.method_row.needs_blocks else None
        add_lora(half, _adapter_spec(config, half), seed=config.seed, dtype=adapters, blocks=blocks)
    else:
        set_trainable(half, trained, blocks=config.trained_blocks)


def _adapter_spec(config: Config, half: ClientHalf) -> LoraSpec:
    """The client's adapters; of a method of output projections, on these alone.

    Raises:
        ConfigError: if other layers are named for such a method.
    """
    spec = config.client.lora
    if not config.method_row.needs_blocks:
        return spec
    layers = sorted({name.rpartition(".")[2] for name in half.output_projections})
    others = sorted(set(spec.target_modules or ()) - set(layers))
    if others:
        raise ConfigError(
            f"client.lora.target_modules: {', '.join(others)}: method {config.method} trains adapters of layers that "
            f"write to the residual stream, in a {half.family} {', '.join(layers)}; leave the others out"
        )
    return msgspec.structs.replace(spec, target_modules=spec.target_modules or tuple(layers))


def client_on(config: Config, half: ClientHalf) -> FrozenClient:
    """The client party of a method on a prepared half."""
    if config.profile == "authors-head":
        return NoisyZerothOrderClient(half, **_zeroth_order(config))
    return _CLIENTS[config.method](config, half)


def _common(config: Config) -> dict[str, Any]:
    return {"micro_batch_size": config.client.micro_batch_size, "device": config.client.device}


def _zeroth_order(config: Config) -> dict[str, Any]:
    return {"distribution": config.zo.distribution, **_common(config)}


def _residual(config: Config, half: ClientHalf) -> FrozenClient:
    """The client of residual feedback, with measured slopes or without.

    Raises:
        ConfigError: if it shall keep nothing but the stream of a model with norms on the stream.
    """
    residual = config.residual
    options = {"blocks": config.trained_blocks, "decay": residual.decay, **_common(config)}
    if residual.slopes != "none" and half.norms_above:
        raise ConfigError(
            f"residual.slopes: {residual.slopes} measures steps along g^T x, which a {half.family} with norms between "
            "its layers and the residual stream does not have; leave it out"
        )
    if residual.slopes != "none":
        return GuidedClient(half, slopes=residual.slopes, **options)
    if half.norms_on_stream and residual.kept == "stream":
        raise ConfigError(
            f"residual.kept: stream does not go with a {half.family} whose norms stand on the residual stream "
            "(post-LN): the gradient comes down through them, which needs the inputs of blocks; leave it out"
        )
    return ResidualClient(half, kept=residual.kept, optimiser=config.client.optimiser, **options)


def _by_backprop(config: Config) -> dict[str, Any]:
    return {"optimiser": config.client.optimiser, "device": config.client.device}


_CLIENTS: dict[str, Callable[[Config, ClientHalf], FrozenClient]] = {
    "frozen": lambda config, half: FrozenClient(half, **_common(config)),
    "zo-zo": lambda config, half: ZerothOrderClient(half, **_zeroth_order(config)),
    "hosl": lambda config, half: ZerothOrderClient(half, **_zeroth_order(config)),
    "hosl-gradient": lambda config, half: ZerothOrderClient(half, **_zeroth_order(config)),
    "hosl-residual": _residual,
    "hosl-node": lambda config, half: NodeClient(half, blocks=config.trained_blocks, **_common(config)),
    "fo-zo": lambda config, half: FirstOrderClient(half, **_by_backprop(config)),
    "fo-recompute": lambda config, half: RecomputingClient(
        half, optimiser=config.client.optimiser, **_common(config)
    ),
    "fo-fo": lambda config, half: FirstOrderClient(half, **_by_backprop(config)),
}
"""The constructor of each method's client; a new method needs a line here."""


def make_server(
    config: Config, half: Any, new_weights: Sequence[str], *, synchronous: bool = False
) -> TorchServer | TrunkServer:
    """The server party of a method, with its trained weights chosen.

    Args:
        config: the run's config.
        half: a `ServerHalf`, or a `TrunkHalf` where the labels stay with the client; the party takes it over.
        new_weights: names of weights that the checkpoint did not hold; LoRA trains them, and a classifier's head,
            without adapters.
        synchronous: whether the gradients of several clients make one update.
    """
    prepare_server_half_(config, half, new_weights)
    return server_on(config, half, synchronous=synchronous)


def server_on(config: Config, half: Any, *, synchronous: bool = False) -> TorchServer | TrunkServer:
    """The server party of a method on a prepared half."""
    eta = learning_rate(config, config.server_rate)
    device = config.server.device
    if isinstance(half, TrunkHalf):
        trunk_type = SynchronousTrunkServer if synchronous else TrunkServer
        return trunk_type(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)
    if config.method_row.server == "zeroth-order":
        return ZerothOrderServer(half, learning_rate=eta, distribution=config.zo.distribution, device=device)
    server_type = SynchronousServer if synchronous else FirstOrderServer
    if config.profile == "authors-head":
        server_type = NoisyFirstOrderServer
    return server_type(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)


def prepare_server_half_(config: Config, half: Any, new_weights: Sequence[str]) -> None:
    """Prepare a server's half for the config, in place: adapters, choice of trained weights."""
    if config.server.trainable == "lora":
        add_lora(half, config.server.lora, seed=config.seed)
        for name, p in half.named_parameters():
            if beside_adapters(name, new_weights):
                p.requires_grad_(True)
    else:
        set_trainable(half, "all")


def make_head(
    config: Config, half: HeadHalf, client_half: ClientHalf, trunk: Trunk, new_weights: Sequence[str] = ()
) -> HeadedServer:
    """The head on the client's device, over the trunk, with its trained weights chosen.

    A weight tied to the client half is trained there alone; of others see `trained_at_client`.
    """
    tied = {id(p) for p in client_half.parameters()}
    for name, p in half.named_parameters():
        if id(p) not in tied:
            p.requires_grad_(trained_at_client(config, name, new_weights))
    return HeadedServer(
        trunk, half, learning_rate=learning_rate(config, config.server_rate),
        optimiser=config.server.optimiser, device=config.client.device, without=tied,
    )  # fmt: skip


def party_bytes(party: Any, head: HeadedServer | None = None) -> int:
    """Bytes of the weights, buffers and optimiser state that a party holds between its calls.

    `head`: the head on its device, where the labels stay; a tied weight is counted once.
    """
    tensors = held_tensors(party.half, party)
    return resident_bytes(tensors if head is None else [*tensors, *held_tensors(head.head, head)])


def held_tensors(half: Any, party: Any) -> list[torch.Tensor]:
    """The weights and buffers of a half, and the state of the optimiser that its party may have."""
    tensors = [*half.model.parameters(), *half.model.buffers()]
    for state in getattr(getattr(party, "optimiser", None), "state", {}).values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def trained_elements(party: Any) -> int:
    """The number of weight elements that a party trains."""
    return sum(p.numel() for p in party.half.parameters() if p.requires_grad)


def head_elements(head: HeadedServer) -> int:
    """The number of weight elements that the head on a client's device trains."""
    return sum(p.numel() for p in head.trained.values())
