from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Report(_message.Message):
    __slots__ = ("hello", "ready", "broken", "beat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ready: Ready
    broken: Broken
    beat: Beat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., broken: _Optional[_Union[Broken, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "name", "incarnation", "weights_per_s", "memory_bytes", "disk_bps", "data_address", "certificate", "layer_s")
    class WeightsPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BPS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    LAYER_S_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    name: str
    incarnation: str
    weights_per_s: _containers.ScalarMap[str, float]
    memory_bytes: int
    disk_bps: float
    data_address: str
    certificate: str
    layer_s: float
    def __init__(self, protocol: _Optional[int] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., weights_per_s: _Optional[_Mapping[str, float]] = ..., memory_bytes: _Optional[int] = ..., disk_bps: _Optional[float] = ..., data_address: _Optional[str] = ..., certificate: _Optional[str] = ..., layer_s: _Optional[float] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Broken(_message.Message):
    __slots__ = ("epoch", "rank", "detail")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    rank: int
    detail: str
    def __init__(self, epoch: _Optional[int] = ..., rank: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("private_bytes", "mapped_bytes")
    PRIVATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    private_bytes: int
    mapped_bytes: int
    def __init__(self, private_bytes: _Optional[int] = ..., mapped_bytes: _Optional[int] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("load", "dismiss", "welcome", "start", "end")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DISMISS_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    load: Load
    dismiss: Dismiss
    welcome: Welcome
    start: Start
    end: End
    def __init__(self, load: _Optional[_Union[Load, _Mapping]] = ..., dismiss: _Optional[_Union[Dismiss, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("epoch", "rank", "peers", "digest", "bytes", "key", "slots", "context", "memory_bytes", "collective", "invariant")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    INVARIANT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    rank: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    digest: str
    bytes: int
    key: bytes
    slots: int
    context: int
    memory_bytes: int
    collective: str
    invariant: bool
    def __init__(self, epoch: _Optional[int] = ..., rank: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., key: _Optional[bytes] = ..., slots: _Optional[int] = ..., context: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., collective: _Optional[str] = ..., invariant: _Optional[bool] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("address", "certificate")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    address: str
    certificate: str
    def __init__(self, address: _Optional[str] = ..., certificate: _Optional[str] = ...) -> None: ...

class Dismiss(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("protocol", "model", "layer")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    layer: int
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., layer: _Optional[int] = ...) -> None: ...

class MeetReply(_message.Message):
    __slots__ = ("model", "context", "max_ask_bytes", "max_guesses")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_ASK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_GUESSES_FIELD_NUMBER: _ClassVar[int]
    model: str
    context: int
    max_ask_bytes: int
    max_guesses: int
    def __init__(self, model: _Optional[str] = ..., context: _Optional[int] = ..., max_ask_bytes: _Optional[int] = ..., max_guesses: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("session", "hidden", "want", "verify", "forget")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    session: str
    hidden: Hidden
    want: Want
    verify: Verify
    forget: bool
    def __init__(self, session: _Optional[str] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., verify: _Optional[_Union[Verify, _Mapping]] = ..., forget: _Optional[bool] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("start", "count", "coding", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: int
    count: int
    coding: str
    data: bytes
    def __init__(self, start: _Optional[int] = ..., count: _Optional[int] = ..., coding: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("id", "position", "deadline_s", "sampling")
    ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    id: int
    position: int
    deadline_s: float
    sampling: bytes
    def __init__(self, id: _Optional[int] = ..., position: _Optional[int] = ..., deadline_s: _Optional[float] = ..., sampling: _Optional[bytes] = ...) -> None: ...

class Verify(_message.Message):
    __slots__ = ("id", "position", "guesses", "deadline_s", "sampling")
    ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    GUESSES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    id: int
    position: int
    guesses: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    sampling: bytes
    def __init__(self, id: _Optional[int] = ..., position: _Optional[int] = ..., guesses: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ..., sampling: _Optional[bytes] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("id", "session", "accepted", "token", "known", "compute_s", "reason", "detail")
    ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    id: int
    session: str
    accepted: int
    token: int
    known: int
    compute_s: float
    reason: str
    detail: str
    def __init__(self, id: _Optional[int] = ..., session: _Optional[str] = ..., accepted: _Optional[int] = ..., token: _Optional[int] = ..., known: _Optional[int] = ..., compute_s: _Optional[float] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...
