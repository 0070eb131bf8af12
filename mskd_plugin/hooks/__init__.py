"""Hooks of MMEngine's runner."""

from mskd_plugin.hooks.deferred_log import DeferredRuntimeInfoHook
from mskd_plugin.hooks.epoch_seed import EpochSeedHook
from mskd_plugin.hooks.fast_networks import FastNetworksHook
from mskd_plugin.hooks.loss_warmup import LossWarmupHook
from mskd_plugin.hooks.missed_validation import MissedValidationHook
from mskd_plugin.hooks.phases import PhaseHook
from mskd_plugin.hooks.preflight import PreflightHook
from mskd_plugin.hooks.teacher_evaluation import TeacherEvaluationHook
from mskd_plugin.hooks.teacher_identity import TeacherIdentityHook

__all__ = [
    "DeferredRuntimeInfoHook",
    "EpochSeedHook",
    "FastNetworksHook",
    "LossWarmupHook",
    "MissedValidationHook",
    "PhaseHook",
    "PreflightHook",
    "TeacherEvaluationHook",
    "TeacherIdentityHook",
]
