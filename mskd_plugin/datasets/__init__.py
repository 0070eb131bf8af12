"""Data sets, registered in mmpretrain's ``DATASETS``, and the collate function of whole batches."""

from mskd_plugin.datasets.batch import BatchSample, collate_batch
from mskd_plugin.datasets.digits import Digits
from mskd_plugin.datasets.in_memory import InMemoryImages

__all__ = ["BatchSample", "Digits", "InMemoryImages", "collate_batch"]
