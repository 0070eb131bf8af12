"""Random numbers that depend on the seed, the epoch and the rank alone."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed all random generators anew before each training epoch.

    MMEngine seeds once, at the start, and checkpoints hold no generator state, so a resumed run
    draws other augmentations than an uninterrupted one. With this hook, and
    ``worker_init_fn=dict(type="keep_worker_seed")`` in a data loader whose workers do not persist,
    resuming at an epoch's end continues exactly.
    """

    priority = "HIGHEST"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed ``random``, NumPy and torch from (seed, epoch, rank)."""
        sequence = np.random.SeedSequence((runner.seed, runner.epoch, get_rank()))
        seed = int(sequence.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """Leave a data loader's worker as torch seeded it, from this epoch's random state.

    MMEngine's default worker function seeds each worker from the run's seed, so that workers which
    do not persist would draw the same numbers every epoch.

    Args:
        worker_id: Index of the worker, unused; torch has mixed it into the seed already.
    """
