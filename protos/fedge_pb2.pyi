from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sender(_message.Message):
    __slots__ = ("client", "incarnation")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    client: str
    incarnation: str
    def __init__(self, client: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("blobs", "size_bytes", "sha256")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[Blob]
    size_bytes: int
    sha256: bytes
    def __init__(self, blobs: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("sender", "protocol", "layout_hash", "examples")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    protocol: int
    layout_hash: str
    examples: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., protocol: _Optional[int] = ..., layout_hash: _Optional[str] = ..., examples: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("run_id", "layout_hash", "chunk_bytes", "stream_timeout_s", "experiment")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAM_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    layout_hash: str
    chunk_bytes: int
    stream_timeout_s: float
    experiment: str
    def __init__(self, run_id: _Optional[str] = ..., layout_hash: _Optional[str] = ..., chunk_bytes: _Optional[int] = ..., stream_timeout_s: _Optional[float] = ..., experiment: _Optional[str] = ...) -> None: ...

class TasksRequest(_message.Message):
    __slots__ = ("sender", "holding")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    holding: str
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., holding: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "version", "steps", "kind", "hyper")
    class HyperEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    HYPER_FIELD_NUMBER: _ClassVar[int]
    id: str
    version: int
    steps: int
    kind: str
    hyper: _containers.MessageMap[str, Scalar]
    def __init__(self, id: _Optional[str] = ..., version: _Optional[int] = ..., steps: _Optional[int] = ..., kind: _Optional[str] = ..., hyper: _Optional[_Mapping[str, Scalar]] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("flag", "whole", "real", "text")
    FLAG_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    flag: bool
    whole: int
    real: float
    text: str
    def __init__(self, flag: _Optional[bool] = ..., whole: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class TaskOffer(_message.Message):
    __slots__ = ("task", "heartbeat", "finished")
    TASK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    task: Task
    heartbeat: Empty
    finished: str
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., heartbeat: _Optional[_Union[Empty, _Mapping]] = ..., finished: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("sender", "version", "offset")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    version: int
    offset: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., version: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadPart(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    chunk: Chunk
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadBegin(_message.Message):
    __slots__ = ("sender", "task_id", "base_version", "steps", "examples", "manifest", "timings", "metrics")
    class TimingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    task_id: str
    base_version: int
    steps: int
    examples: int
    manifest: Manifest
    timings: _containers.ScalarMap[str, float]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., task_id: _Optional[str] = ..., base_version: _Optional[int] = ..., steps: _Optional[int] = ..., examples: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., timings: _Optional[_Mapping[str, float]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("begin", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: UploadBegin
    chunk: Chunk
    def __init__(self, begin: _Optional[_Union[UploadBegin, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("repeated_delivery",)
    REPEATED_DELIVERY_FIELD_NUMBER: _ClassVar[int]
    repeated_delivery: bool
    def __init__(self, repeated_delivery: _Optional[bool] = ...) -> None: ...

class UploadOffsetRequest(_message.Message):
    __slots__ = ("sender", "task_id")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    task_id: str
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., task_id: _Optional[str] = ...) -> None: ...

class UploadOffsetReply(_message.Message):
    __slots__ = ("offset", "counted")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    offset: int
    counted: bool
    def __init__(self, offset: _Optional[int] = ..., counted: _Optional[bool] = ...) -> None: ...

class FailRequest(_message.Message):
    __slots__ = ("sender", "task_id", "reason")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    task_id: str
    reason: str
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., task_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("sender",)
    SENDER_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClientStatus(_message.Message):
    __slots__ = ("client", "state", "updates", "refused")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    client: str
    state: str
    updates: int
    refused: int
    def __init__(self, client: _Optional[str] = ..., state: _Optional[str] = ..., updates: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run_id", "version", "updates", "running_s", "finished", "clients", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    version: int
    updates: int
    running_s: float
    finished: str
    clients: _containers.RepeatedCompositeFieldContainer[ClientStatus]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, run_id: _Optional[str] = ..., version: _Optional[int] = ..., updates: _Optional[int] = ..., running_s: _Optional[float] = ..., finished: _Optional[str] = ..., clients: _Optional[_Iterable[_Union[ClientStatus, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...
