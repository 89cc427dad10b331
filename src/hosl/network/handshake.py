"""The settings that the two sides of a network run agree on: as messages, and back as a config. No torch."""

from typing import Any

import msgspec

from hosl.config import ClientsConfig, Config, ServerConfig, WireConfig, ZOConfig
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.split.specs import LoraSpec
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum, to_enum
from hosl.wire.protocol import spoken_protocol


def model_message(facts: dict[str, Any], config: Config) -> pb.Model:
    """The message about the model: the facts of a half's half.json, and the dtype of the run."""
    return pb.Model(
        family=facts["family"], cut=facts["cut"], base_digest=facts["base_digest"],
        client_digest=facts["client_digest"], server_digest=facts["server_digest"],
        dtype=to_enum(pb.DType, config.model.dtype), labels=to_enum(pb.Labels, facts.get("labels", "server")),
    )  # fmt: skip


def protocol_of(config: Config) -> int:
    """The number of the protocol in the Hello of a run."""
    return spoken_protocol(personal=config.clients.server == "personal")


def training_message(config: Config, labels_digest: str = "") -> pb.Training:
    """The message about the training: the settings of a run that the server must know.

    Args:
        config: the settings of the run.
        labels_digest: the digest of the names of the classes; not told where the labels stay with the client.
    """
    server, clients = config.server, config.clients
    optimiser = pb.Optimiser(
        name=to_enum(pb.OptimiserName, server.optimiser.name), momentum=server.optimiser.momentum,
        weight_decay=server.optimiser.weight_decay,
    )  # fmt: skip
    lora = pb.Lora(r=server.lora.r, alpha=server.lora.alpha, target_modules=server.lora.target_modules or ())
    return pb.Training(
        method=to_enum(pb.Method, config.method_row.on_the_wire), seed=config.seed,
        distribution=to_enum(pb.Distribution, config.zo.distribution),
        trainable=to_enum(pb.Trainable, server.trainable), learning_rate=config.server_rate, optimiser=optimiser,
        lora=lora, schedule=to_enum(pb.Schedule, config.lr_scheduler_type), warmup_steps=config.warmup_steps,
        max_steps=config.max_steps, compression=to_enum(pb.Compression, config.wire.compression),
        clients=clients.count, halves=to_enum(pb.Halves, clients.halves), order=to_enum(pb.Order, clients.schedule),
        grace_s=clients.grace_s, labels_digest=labels_digest if config.wire.labels == "server" else "",
        personal_server=clients.server == "personal",
    )  # fmt: skip


def config_of(model: pb.Model, training: pb.Training, *, device: str) -> Config:
    """The config that a server half is made with; settings of the client alone keep their defaults.

    Args:
        model: the message about the model.
        training: the message about the training.
        device: the torch device of the server.

    Raises:
        WireError: if a message holds a value that its enumeration does not have.
        ConfigError: if settings contradict each other.
    """
    optimiser = OptimiserSpec(
        name=_name(pb.OptimiserName, training.optimiser.name), momentum=training.optimiser.momentum,
        weight_decay=training.optimiser.weight_decay,
    )  # fmt: skip
    lora = LoraSpec(
        r=training.lora.r,
        alpha=training.lora.alpha,
        target_modules=tuple(training.lora.target_modules) or None,
    )
    clients = ClientsConfig(
        count=training.clients, halves=_name(pb.Halves, training.halves),
        schedule=_name(pb.Order, training.order), grace_s=training.grace_s,
        server="personal" if training.personal_server else "shared",
        directions="common",  # not told: how many directions a round has is seen when they come (`Round.add`)
    )  # fmt: skip
    base = Config(
        method=_name(pb.Method, training.method), seed=training.seed,
        zo=ZOConfig(distribution=_name(pb.Distribution, training.distribution)), server=ServerConfig(
            trainable=_name(pb.Trainable, training.trainable), learning_rate=training.learning_rate,
            optimiser=optimiser, lora=lora, device=device,
        ),
        wire=WireConfig(labels=_name(pb.Labels, model.labels)), clients=clients,
        lr_scheduler_type=_name(pb.Schedule, training.schedule), warmup_steps=training.warmup_steps,
        max_steps=training.max_steps,
    )  # fmt: skip
    return msgspec.structs.replace(
        base, model=msgspec.structs.replace(base.model, dtype=_name(pb.DType, model.dtype), cut=model.cut)
    )


def _name(kind: Any, value: int) -> Any:
    """The name of a value; Any, because a setting accepts only the names of its own enumeration."""
    return from_enum(kind, value)
