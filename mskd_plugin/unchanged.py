"""Work beside the training that must not change its random numbers, or its model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Give ``random``, NumPy and torch (CPU and the current GPU) the states back that they had
    before.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run without gradients in eval mode, so that no parameter or running statistic moves."""
    was_training = model.training
    model.eval()
    try:
        with unchanged_random_state(), torch.no_grad():
            yield
    finally:
        model.train(was_training)
