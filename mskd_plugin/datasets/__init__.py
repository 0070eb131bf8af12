"""Data sets, registered in mmpretrain's ``DATASETS``."""

from mskd_plugin.datasets.digits import Digits

__all__ = ["Digits"]
