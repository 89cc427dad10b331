"""What the two sides of a network run agree on, as messages and back as settings. No torch."""

from typing import Any

import msgspec

from hosl.config import ClientsConfig, Config, ServerConfig, WireConfig, ZOConfig
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.split.specs import LoraSpec
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum, to_enum

_SERVED_AS = {"fo-recompute": "fo-fo", "hosl-guided": "hosl-gradient", "hosl-node": "hosl-gradient"}
"""Methods that differ in the client alone, and what a server knows them as."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F64": "float64"}


def model_message(facts: dict[str, Any], config: Config) -> pb.Model:
    """The model as a half's half.json describes it, in the dtype of the run."""
    return pb.Model(
        family=facts["family"], cut=facts["cut"], base_digest=facts["base_digest"],
        client_digest=facts["client_digest"], server_digest=facts["server_digest"],
        dtype=to_enum(pb.DType, config.model.dtype), labels=to_enum(pb.Labels, facts.get("labels", "server")),
    )  # fmt: skip


def training_message(config: Config) -> pb.Training:
    """The settings of a run that the server must know."""
    server, clients = config.server, config.clients
    optimiser = pb.Optimiser(
        name=to_enum(pb.OptimiserName, server.optimiser.name), momentum=server.optimiser.momentum,
        weight_decay=server.optimiser.weight_decay,
    )  # fmt: skip
    lora = pb.Lora(r=server.lora.r, alpha=server.lora.alpha, target_modules=server.lora.target_modules or ())
    method = _SERVED_AS.get(config.method, config.method)
    return pb.Training(
        method=to_enum(pb.Method, method), seed=config.seed, distribution=to_enum(pb.Distribution,
        config.zo.distribution), trainable=to_enum(pb.Trainable, server.trainable), learning_rate=server.learning_rate,
        optimiser=optimiser, lora=lora, schedule=to_enum(pb.Schedule, config.lr_scheduler_type),
        warmup_steps=config.warmup_steps, max_steps=config.max_steps, compression=to_enum(pb.Compression,
        config.wire.compression), clients=clients.count, halves=to_enum(pb.Halves, clients.halves),
        order=to_enum(pb.Order, clients.schedule), grace_s=clients.grace_s,
    )  # fmt: skip


def config_of(model: pb.Model, training: pb.Training, *, device: str) -> Config:
    """The settings that a server half is made with; what concerns the client alone stays at its default.

    Raises:
        WireError: if a message names what does not exist. ConfigError: if settings contradict each other.
    """
    optimiser: Any = OptimiserSpec(
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
    )  # fmt: skip
    base = Config(
        method=_name(pb.Method, training.method), seed=training.seed, zo=ZOConfig(distribution=_name(pb.Distribution,
        training.distribution)), server=ServerConfig(
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
    return from_enum(kind, value)
