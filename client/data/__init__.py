"""Data sets and how they are shared out: loading, checking, and partitions into one shard per client.

Never imports a machine-learning framework, unless the user names a data set that lives in one.
"""

from fedge.client.data.datasets import Dataset, load
from fedge.client.data.partitions import PARTITIONS, Partition, counts

__all__ = ["PARTITIONS", "Dataset", "Partition", "counts", "load"]
