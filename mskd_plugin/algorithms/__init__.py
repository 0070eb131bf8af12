"""Distillation algorithms, registered in MMRazor's ``MODELS``."""

from mskd_plugin.algorithms.frozen_teacher_distill import FrozenTeacherDistill
from mskd_plugin.algorithms.two_phase_distill import TwoPhaseDistill

__all__ = [
    "FrozenTeacherDistill",
    "TwoPhaseDistill",
]
