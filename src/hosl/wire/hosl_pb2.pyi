from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Compression]
    TO_BFLOAT16: _ClassVar[Compression]
    TO_INT8: _ClassVar[Compression]

class Method(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_UNSPECIFIED: _ClassVar[Method]
    HOSL: _ClassVar[Method]
    HOSL_GRADIENT: _ClassVar[Method]
    FO_FO: _ClassVar[Method]
    ZO_ZO: _ClassVar[Method]
    FO_ZO: _ClassVar[Method]
    FROZEN: _ClassVar[Method]

class Distribution(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTRIBUTION_UNSPECIFIED: _ClassVar[Distribution]
    GAUSSIAN: _ClassVar[Distribution]
    RADEMACHER: _ClassVar[Distribution]
    SPHERE: _ClassVar[Distribution]
    LOW_RANK: _ClassVar[Distribution]

class Trainable(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINABLE_UNSPECIFIED: _ClassVar[Trainable]
    ALL: _ClassVar[Trainable]
    LORA: _ClassVar[Trainable]

class OptimiserName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMISER_UNSPECIFIED: _ClassVar[OptimiserName]
    SGD: _ClassVar[OptimiserName]
    ADAMW: _ClassVar[OptimiserName]

class Schedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONSTANT: _ClassVar[Schedule]
    LINEAR: _ClassVar[Schedule]
    COSINE: _ClassVar[Schedule]

class Labels(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LABELS_AT_SERVER: _ClassVar[Labels]
    LABELS_AT_CLIENT: _ClassVar[Labels]

class Halves(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PERSONAL: _ClassVar[Halves]
    SHARED: _ClassVar[Halves]

class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENTIAL: _ClassVar[Order]
    SYNCHRONOUS: _ClassVar[Order]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT64: DType
NONE: Compression
TO_BFLOAT16: Compression
TO_INT8: Compression
METHOD_UNSPECIFIED: Method
HOSL: Method
HOSL_GRADIENT: Method
FO_FO: Method
ZO_ZO: Method
FO_ZO: Method
FROZEN: Method
DISTRIBUTION_UNSPECIFIED: Distribution
GAUSSIAN: Distribution
RADEMACHER: Distribution
SPHERE: Distribution
LOW_RANK: Distribution
TRAINABLE_UNSPECIFIED: Trainable
ALL: Trainable
LORA: Trainable
OPTIMISER_UNSPECIFIED: OptimiserName
SGD: OptimiserName
ADAMW: OptimiserName
CONSTANT: Schedule
LINEAR: Schedule
COSINE: Schedule
LABELS_AT_SERVER: Labels
LABELS_AT_CLIENT: Labels
PERSONAL: Halves
SHARED: Halves
SEQUENTIAL: Order
SYNCHRONOUS: Order

class HelloRequest(_message.Message):
    __slots__ = ("protocol", "run", "model", "training", "restorable", "current", "version", "may_go_back", "look")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    RESTORABLE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAY_GO_BACK_FIELD_NUMBER: _ClassVar[int]
    LOOK_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    model: Model
    training: Training
    restorable: _containers.RepeatedScalarFieldContainer[int]
    current: int
    version: str
    may_go_back: bool
    look: bool
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., training: _Optional[_Union[Training, _Mapping]] = ..., restorable: _Optional[_Iterable[int]] = ..., current: _Optional[int] = ..., version: _Optional[str] = ..., may_go_back: _Optional[bool] = ..., look: _Optional[bool] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("family", "cut", "base_digest", "client_digest", "server_digest", "dtype", "labels")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    family: str
    cut: int
    base_digest: str
    client_digest: str
    server_digest: str
    dtype: DType
    labels: Labels
    def __init__(self, family: _Optional[str] = ..., cut: _Optional[int] = ..., base_digest: _Optional[str] = ..., client_digest: _Optional[str] = ..., server_digest: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., labels: _Optional[_Union[Labels, str]] = ...) -> None: ...

class Training(_message.Message):
    __slots__ = ("method", "seed", "distribution", "trainable", "learning_rate", "optimiser", "lora", "schedule", "warmup_steps", "max_steps", "compression", "clients", "halves", "order", "grace_s", "labels_digest", "personal_server")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMISER_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    HALVES_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    LABELS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_SERVER_FIELD_NUMBER: _ClassVar[int]
    method: Method
    seed: int
    distribution: Distribution
    trainable: Trainable
    learning_rate: float
    optimiser: Optimiser
    lora: Lora
    schedule: Schedule
    warmup_steps: int
    max_steps: int
    compression: Compression
    clients: int
    halves: Halves
    order: Order
    grace_s: float
    labels_digest: str
    personal_server: bool
    def __init__(self, method: _Optional[_Union[Method, str]] = ..., seed: _Optional[int] = ..., distribution: _Optional[_Union[Distribution, str]] = ..., trainable: _Optional[_Union[Trainable, str]] = ..., learning_rate: _Optional[float] = ..., optimiser: _Optional[_Union[Optimiser, _Mapping]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, str]] = ..., warmup_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., compression: _Optional[_Union[Compression, str]] = ..., clients: _Optional[int] = ..., halves: _Optional[_Union[Halves, str]] = ..., order: _Optional[_Union[Order, str]] = ..., grace_s: _Optional[float] = ..., labels_digest: _Optional[str] = ..., personal_server: _Optional[bool] = ...) -> None: ...

class Optimiser(_message.Message):
    __slots__ = ("name", "momentum", "weight_decay")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    name: OptimiserName
    momentum: float
    weight_decay: float
    def __init__(self, name: _Optional[_Union[OptimiserName, str]] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("r", "alpha", "target_modules")
    R_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    r: int
    alpha: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, r: _Optional[int] = ..., alpha: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("session", "start", "limits", "journal_updates", "client")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_UPDATES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    session: str
    start: int
    limits: Limits
    journal_updates: int
    client: str
    def __init__(self, session: _Optional[str] = ..., start: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., journal_updates: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("tensor_bytes", "chunk_bytes", "calls_per_s", "concurrent_calls")
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALLS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_CALLS_FIELD_NUMBER: _ClassVar[int]
    tensor_bytes: int
    chunk_bytes: int
    calls_per_s: int
    concurrent_calls: int
    def __init__(self, tensor_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., calls_per_s: _Optional[int] = ..., concurrent_calls: _Optional[int] = ...) -> None: ...

class Upload(_message.Message):
    __slots__ = ("losses", "scores", "gradient", "probe", "states", "step", "step_states", "chunk")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_STATES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    losses: AskLosses
    scores: AskScores
    gradient: AskGradient
    probe: AskProbe
    states: AskStates
    step: AskStep
    step_states: AskStepStates
    chunk: bytes
    def __init__(self, losses: _Optional[_Union[AskLosses, _Mapping]] = ..., scores: _Optional[_Union[AskScores, _Mapping]] = ..., gradient: _Optional[_Union[AskGradient, _Mapping]] = ..., probe: _Optional[_Union[AskProbe, _Mapping]] = ..., states: _Optional[_Union[AskStates, _Mapping]] = ..., step: _Optional[_Union[AskStep, _Mapping]] = ..., step_states: _Optional[_Union[AskStepStates, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Where(_message.Message):
    __slots__ = ("session", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("shape", "dtype", "compression")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    compression: Compression
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ..., compression: _Optional[_Union[Compression, str]] = ...) -> None: ...

class AskLosses(_message.Message):
    __slots__ = ("where", "activations", "targets")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: _containers.RepeatedCompositeFieldContainer[Tensor]
    targets: Targets
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ...) -> None: ...

class AskScores(_message.Message):
    __slots__ = ("where", "activations", "targets")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: Tensor
    targets: Targets
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ...) -> None: ...

class AskGradient(_message.Message):
    __slots__ = ("where", "activations", "targets")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: Tensor
    targets: Targets
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ...) -> None: ...

class AskProbe(_message.Message):
    __slots__ = ("where", "activations", "targets", "seed", "epsilon")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: _containers.RepeatedCompositeFieldContainer[Tensor]
    targets: Targets
    seed: int
    epsilon: float
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ..., seed: _Optional[int] = ..., epsilon: _Optional[float] = ...) -> None: ...

class AskStates(_message.Message):
    __slots__ = ("where", "activations", "positions")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: _containers.RepeatedCompositeFieldContainer[Tensor]
    positions: Positions
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., positions: _Optional[_Union[Positions, _Mapping]] = ...) -> None: ...

class AskStep(_message.Message):
    __slots__ = ("where", "activations", "targets", "want_gradient")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    WANT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: Tensor
    targets: Targets
    want_gradient: bool
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ..., want_gradient: _Optional[bool] = ...) -> None: ...

class AskStepStates(_message.Message):
    __slots__ = ("where", "activations", "positions", "want_gradient")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    WANT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    where: Where
    activations: Tensor
    positions: Positions
    want_gradient: bool
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., positions: _Optional[_Union[Positions, _Mapping]] = ..., want_gradient: _Optional[bool] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("rows", "seq", "bits")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    seq: int
    bits: bytes
    def __init__(self, rows: _Optional[int] = ..., seq: _Optional[int] = ..., bits: _Optional[bytes] = ...) -> None: ...

class Targets(_message.Message):
    __slots__ = ("mask", "classes", "options")
    MASK_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    mask: Mask
    classes: Classes
    options: Options
    def __init__(self, mask: _Optional[_Union[Mask, _Mapping]] = ..., classes: _Optional[_Union[Classes, _Mapping]] = ..., options: _Optional[_Union[Options, _Mapping]] = ...) -> None: ...

class Classes(_message.Message):
    __slots__ = ("labels",)
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, labels: _Optional[_Iterable[int]] = ...) -> None: ...

class Options(_message.Message):
    __slots__ = ("span", "positions", "tokens", "by_token")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    span: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    by_token: bool
    def __init__(self, span: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., by_token: _Optional[bool] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("mask", "positions", "scored")
    MASK_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    mask: Mask
    positions: _containers.RepeatedScalarFieldContainer[int]
    scored: Mask
    def __init__(self, mask: _Optional[_Union[Mask, _Mapping]] = ..., positions: _Optional[_Iterable[int]] = ..., scored: _Optional[_Union[Mask, _Mapping]] = ...) -> None: ...

class LossesReply(_message.Message):
    __slots__ = ("losses", "server_s")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    losses: _containers.RepeatedScalarFieldContainer[float]
    server_s: float
    def __init__(self, losses: _Optional[_Iterable[float]] = ..., server_s: _Optional[float] = ...) -> None: ...

class ScoresReply(_message.Message):
    __slots__ = ("rows", "scores", "values", "server_s")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    rows: int
    scores: int
    values: bytes
    server_s: float
    def __init__(self, rows: _Optional[int] = ..., scores: _Optional[int] = ..., values: _Optional[bytes] = ..., server_s: _Optional[float] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("done", "chunk")
    DONE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    done: StepDone
    chunk: bytes
    def __init__(self, done: _Optional[_Union[StepDone, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("loss", "gradient", "server_s")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    loss: float
    gradient: Tensor
    server_s: float
    def __init__(self, loss: _Optional[float] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., server_s: _Optional[float] = ...) -> None: ...

class StatesReply(_message.Message):
    __slots__ = ("done", "chunk")
    DONE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    done: StatesDone
    chunk: bytes
    def __init__(self, done: _Optional[_Union[StatesDone, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class StatesDone(_message.Message):
    __slots__ = ("states", "server_s")
    STATES_FIELD_NUMBER: _ClassVar[int]
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedCompositeFieldContainer[Tensor]
    server_s: float
    def __init__(self, states: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., server_s: _Optional[float] = ...) -> None: ...

class StepStatesReply(_message.Message):
    __slots__ = ("states", "done", "chunk")
    STATES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    states: Tensor
    done: StepDone
    chunk: bytes
    def __init__(self, states: _Optional[_Union[Tensor, _Mapping]] = ..., done: _Optional[_Union[StepDone, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DescendRequest(_message.Message):
    __slots__ = ("where", "seeds", "coefficients")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    where: Where
    seeds: _containers.RepeatedScalarFieldContainer[int]
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., coefficients: _Optional[_Iterable[float]] = ...) -> None: ...

class DescendReply(_message.Message):
    __slots__ = ("server_s",)
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    server_s: float
    def __init__(self, server_s: _Optional[float] = ...) -> None: ...

class JournalRequest(_message.Message):
    __slots__ = ("where", "have", "seeds", "scales", "examples")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    where: Where
    have: int
    seeds: _containers.RepeatedScalarFieldContainer[int]
    scales: _containers.RepeatedScalarFieldContainer[float]
    examples: int
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ..., have: _Optional[int] = ..., seeds: _Optional[_Iterable[int]] = ..., scales: _Optional[_Iterable[float]] = ..., examples: _Optional[int] = ...) -> None: ...

class JournalReply(_message.Message):
    __slots__ = ("step", "updates", "late")
    STEP_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    late: bool
    def __init__(self, step: _Optional[int] = ..., updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., late: _Optional[bool] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("step", "seeds", "scales")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    step: int
    seeds: _containers.RepeatedScalarFieldContainer[int]
    scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, step: _Optional[int] = ..., seeds: _Optional[_Iterable[int]] = ..., scales: _Optional[_Iterable[float]] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("where",)
    WHERE_FIELD_NUMBER: _ClassVar[int]
    where: Where
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ...) -> None: ...

class SaveReply(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("where",)
    WHERE_FIELD_NUMBER: _ClassVar[int]
    where: Where
    def __init__(self, where: _Optional[_Union[Where, _Mapping]] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("ask", "hidden", "chunk")
    ASK_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ask: AskGenerate
    hidden: Tensor
    chunk: bytes
    def __init__(self, ask: _Optional[_Union[AskGenerate, _Mapping]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class AskGenerate(_message.Message):
    __slots__ = ("protocol", "model", "run", "base", "most_tokens", "candidates", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: Model
    run: str
    base: bool
    most_tokens: int
    candidates: int
    version: str
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., run: _Optional[str] = ..., base: _Optional[bool] = ..., most_tokens: _Optional[int] = ..., candidates: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("ready", "next", "chunk")
    READY_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ready: GenerateReady
    next: Next
    chunk: bytes
    def __init__(self, ready: _Optional[_Union[GenerateReady, _Mapping]] = ..., next: _Optional[_Union[Next, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GenerateReady(_message.Message):
    __slots__ = ("run", "step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    step: int
    def __init__(self, run: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Next(_message.Message):
    __slots__ = ("step", "server_s", "tokens", "logits", "tensor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SERVER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    server_s: float
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logits: _containers.RepeatedScalarFieldContainer[float]
    tensor: Tensor
    def __init__(self, step: _Optional[int] = ..., server_s: _Optional[float] = ..., tokens: _Optional[_Iterable[int]] = ..., logits: _Optional[_Iterable[float]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class HalfRequest(_message.Message):
    __slots__ = ("run", "step", "list_digest", "offset")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LIST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run: str
    step: int
    list_digest: str
    offset: int
    def __init__(self, run: _Optional[str] = ..., step: _Optional[int] = ..., list_digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class HalfReply(_message.Message):
    __slots__ = ("list", "chunk")
    LIST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    list: HalfList
    chunk: bytes
    def __init__(self, list: _Optional[_Union[HalfList, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class HalfList(_message.Message):
    __slots__ = ("step", "tensors", "more")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    step: int
    tensors: _containers.RepeatedCompositeFieldContainer[HalfTensor]
    more: bool
    def __init__(self, step: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[HalfTensor, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class HalfTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class GiveRequest(_message.Message):
    __slots__ = ("given", "list", "chunk")
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    given: Given
    list: HalfList
    chunk: bytes
    def __init__(self, given: _Optional[_Union[Given, _Mapping]] = ..., list: _Optional[_Union[HalfList, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Given(_message.Message):
    __slots__ = ("run", "weights", "lora", "low_precision", "digest", "updates", "blocks")
    class Weights(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        WEIGHTS_UNSPECIFIED: _ClassVar[Given.Weights]
        ALL: _ClassVar[Given.Weights]
        BLOCKS: _ClassVar[Given.Weights]
        LAST_BLOCK: _ClassVar[Given.Weights]
        LORA: _ClassVar[Given.Weights]
        OUTPUT_PROJECTIONS: _ClassVar[Given.Weights]
    WEIGHTS_UNSPECIFIED: Given.Weights
    ALL: Given.Weights
    BLOCKS: Given.Weights
    LAST_BLOCK: Given.Weights
    LORA: Given.Weights
    OUTPUT_PROJECTIONS: Given.Weights
    RUN_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LOW_PRECISION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    run: str
    weights: Given.Weights
    lora: Lora
    low_precision: bool
    digest: bytes
    updates: int
    blocks: int
    def __init__(self, run: _Optional[str] = ..., weights: _Optional[_Union[Given.Weights, str]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., low_precision: _Optional[bool] = ..., digest: _Optional[bytes] = ..., updates: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class GiveReply(_message.Message):
    __slots__ = ("have", "complete")
    HAVE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    have: int
    complete: bool
    def __init__(self, have: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...
