import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState

class Replica(_message.Message):
    __slots__ = ("index", "state", "pid", "start_time", "restarts", "trouble", "cpus", "gpus", "active_calls", "total_calls")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_CALLS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CALLS_FIELD_NUMBER: _ClassVar[int]
    index: int
    state: ReplicaState
    pid: int
    start_time: _timestamp_pb2.Timestamp
    restarts: int
    trouble: str
    cpus: _containers.RepeatedScalarFieldContainer[int]
    gpus: str
    active_calls: int
    total_calls: int
    def __init__(self, index: _Optional[int] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., pid: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., restarts: _Optional[int] = ..., trouble: _Optional[str] = ..., cpus: _Optional[_Iterable[int]] = ..., gpus: _Optional[str] = ..., active_calls: _Optional[int] = ..., total_calls: _Optional[int] = ...) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("address", "replicas_wanted", "replicas", "kept_settings")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    KEPT_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    address: str
    replicas_wanted: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    kept_settings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, address: _Optional[str] = ..., replicas_wanted: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., kept_settings: _Optional[_Iterable[str]] = ...) -> None: ...

class GetFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScaleFleetRequest(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    def __init__(self, replicas: _Optional[int] = ...) -> None: ...

class RestartFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
