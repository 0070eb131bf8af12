"""Marks of tests that need a newer torch than the oldest that works."""

from __future__ import annotations

import pytest

from mskd_plugin.speed import COMPILES_BACKBONES, COMPILES_LOSSES

torch_2_4 = pytest.mark.skipif(
    not COMPILES_BACKBONES, reason="torch before 2.4 traces no recorders, has no fused SGD on CPUs"
)
torch_2_9 = pytest.mark.skipif(
    not COMPILES_LOSSES, reason="torch before 2.9 traces backward passes under autocast"
)
