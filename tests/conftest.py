"""What keeps the tests apart from each other and quick: none of it is part of what they test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Before mmengine looks for a GPU: runners would train on it, and the numbers to compare with are a
# CPU's. What MSKD_TEST_GPUS names stays visible, for test_deferred_log's steps.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("MSKD_TEST_GPUS", "")

import torch
from mmengine.config import config
from mmengine.registry import DefaultScope

import mskd_plugin  # noqa: F401  (before any test file imports mmrazor.models)

#: Test files that look at the text of configs, which the others only write.
READ_CONFIG_TEXT = ("test_configs", "test_export_student")


@pytest.fixture(scope="session", autouse=True)
def _light_process() -> Iterator[None]:
    """Use one core, and let garbage collections skip what was imported.

    The networks here are too small for two cores. mmengine collects for each data set that it
    builds, which takes 0.5 s with all host packages imported.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _unformatted_configs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write configs as valid Python, but not formatted.

    mmengine formats the config with yapf whenever it writes or logs one: three times for a runner
    and once for a checkpoint, 0.3 to 1 s each. What the text says stays the same.
    """

    def unchanged(text: str, **_: Any) -> tuple[str, bool]:
        return text, True

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in READ_CONFIG_TEXT:
            patch.setattr(config, "FormatCode", unchanged)
        yield


@contextmanager
def _same_default_scope() -> Iterator[None]:
    """Take back the default scope that a runner sets for its whole process."""
    instances = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = instances


@pytest.fixture(scope="module", autouse=True)
def _default_scope_of_module() -> Iterator[None]:
    with _same_default_scope():
        yield


@pytest.fixture(autouse=True)
def _default_scope_of_test() -> Iterator[None]:
    with _same_default_scope():
        yield
