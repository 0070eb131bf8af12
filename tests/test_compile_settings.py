"""What torch.compile is asked for: its settings, and what cannot be compiled."""

from __future__ import annotations

import needs
import pytest
import torch
import toy
from torch import nn

from mskd_plugin import speed
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import FastNetworksHook
from mskd_plugin.speed import (
    COMPILES_LOSSES,
    check_compile,
    compile_backbones,
    compile_losses,
)

#: Mistyped, what the switch itself is for, and what is compiled.
NO_OPTIONS = [("backnd", "eager"), ("disable", True), ("model", None)]


def test_what_this_torch_cannot_compile_is_refused(monkeypatch):
    monkeypatch.setattr(speed, "COMPILES_BACKBONES", False)
    monkeypatch.setattr(speed, "COMPILES_LOSSES", False)
    with pytest.raises(SettingError, match="`compile` to be False before torch 2.4"):
        compile_backbones(toy.build(), {})
    with pytest.raises(SettingError, match="`compile_losses` to be False before torch 2.9"):
        compile_losses(toy.build(), {})
    # When the hook is built, which is before a work folder is made.
    for setting in ("compile", "compile_losses"):
        for asked in (True, dict(dynamic=False)):
            with pytest.raises(SettingError, match=f"`{setting}` to be False before torch"):
                FastNetworksHook(**{setting: asked})
    FastNetworksHook(channels_last=True)


def test_a_model_without_distillation_has_no_losses_to_compile():
    if COMPILES_LOSSES:
        assert compile_losses(nn.Linear(1, 1), {}).names == []


@needs.torch_2_4
def test_compile_settings():
    assert check_compile("compile", False) is None
    assert check_compile("compile", True) == dict(dynamic=False)
    assert check_compile("compile", dict(mode="max-autotune", dynamic=True)) == dict(
        mode="max-autotune", dynamic=True
    )
    for wrong in ("True", 1, *(dict([item]) for item in NO_OPTIONS)):
        with pytest.raises(SettingError, match="compile.*True, False or a dict.*backend"):
            FastNetworksHook(compile=wrong)
    with pytest.raises(SettingError, match="channels_last.*True or False"):
        FastNetworksHook(channels_last=1)


@needs.torch_2_4
def test_what_cannot_be_compiled(monkeypatch):
    with pytest.raises(SettingError, match="compile.*without a `backbone`.*Linear"):
        compile_backbones(nn.Linear(1, 1), {})
    for side in ("student", "teacher"):
        cfg = toy.distiller()
        cfg[f"{side}_recorders"]["noise"] = dict(type="FunctionOutputs", source="torch.rand")
        with pytest.raises(SettingError, match="compile.*recorders of functions.*noise"):
            compile_backbones(toy.build(distiller=cfg), {})
    deliveries = dict(drawn=dict(type="FunctionOutputs", func_path="torch.rand", max_keep_data=1))
    with pytest.raises(SettingError, match="compile.*deliveries.*drawn"):
        compile_backbones(
            toy.build(distiller=dict(toy.distiller(), distill_deliveries=deliveries)), {}
        )

    def unsupported(*_, **__):
        raise RuntimeError("Dynamo is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", unsupported)
    with pytest.raises(SettingError, match=r"compile.*since torch cannot.*Python 3\.99"):
        compile_backbones(toy.build(), {})
