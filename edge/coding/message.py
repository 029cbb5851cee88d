"""A coded tensor as the message that carries it. Must never encode or decode."""

from fedge.edge.coding.codings import Coded
from fedge.protos import edge_pb2 as pb


def to_pb(coded: Coded) -> pb.Coded:
    """One tensor, ready to travel."""
    return pb.Coded(
        name=coded.name,
        dtype=coded.dtype,
        shape=coded.shape,
        coding=coded.coding,
        low=coded.low,
        high=coded.high,
        data=coded.data,
    )
