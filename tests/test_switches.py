"""Mixed precision, the learning rate for another batch size, and what the preflight says of it."""

from __future__ import annotations

import contextlib
import logging
import math

import pytest
import torch
import toy
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from tool_runs import load

from mskd_plugin import launch
from mskd_plugin.errors import SettingError
from mskd_plugin.optim import BFloat16OptimWrapper
from mskd_plugin.switches import scale_learning_rate, use_mixed_precision


class Watch(Hook):
    """Note the student's feature type, the losses, and the learning rate of each step."""

    def __init__(self):
        self.types, self.losses, self.rates = set(), [], []

    def before_train(self, runner):
        runner.model.student.backbone.layer3.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        if module.training:  # not the validation
            self.types.add(output.dtype)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs["loss"].item())
        self.rates.append(runner.optim_wrapper.get_lr()["lr"][0])


def run(cfg):
    runner = launch.build_runner(cfg)
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    return runner, watch


def test_mixed_precision_computes_in_bfloat16_on_a_cpu(tmp_path):
    results = {}
    for mixed in (False, True):
        cfg = toy.runner_config(tmp_path / str(mixed))
        if mixed:
            use_mixed_precision(cfg)
        runner, watch = results[mixed] = run(cfg)
        assert all(math.isfinite(loss) for loss in watch.losses) and len(watch.losses) == 6
        assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
        state = runner.optim_wrapper.optimizer.state.values()
        assert {part["momentum_buffer"].dtype for part in state} == {torch.float32}
    assert isinstance(results[True][0].optim_wrapper, BFloat16OptimWrapper)
    assert results[False][1].types == {torch.float32}
    assert results[True][1].types == {torch.bfloat16}
    # Half precision, so nearly the same first loss, but not the same.
    full, half = results[False][1].losses[0], results[True][1].losses[0]
    assert half == pytest.approx(full, rel=0.02) and half != full


def test_accumulated_gradients_are_joined_once_in_mixed_precision_too():
    network, apart, steps = torch.nn.Linear(2, 1), [], []

    @contextlib.contextmanager
    def no_sync():  # of a distributed wrapper
        apart.append(len(steps))
        yield

    network.no_sync = no_sync
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    wrapper = BFloat16OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.initialize_count_status(network, 0, 4)
    for _ in range(4):
        with wrapper.optim_context(network):
            output = network(torch.ones(1, 2))
        assert output.dtype == torch.bfloat16
        wrapper.update_params(output.float().sum())
        steps.append(output)
    assert apart == [0, 2]


@pytest.mark.parametrize(
    "capability, hip, kind",
    [
        ((9, 0), None, "BFloat16"),
        ((8, 0), None, "BFloat16"),
        ((7, 5), None, "Amp"),
        ((7, 5), "6.0", "BFloat16"),
    ],
)
def test_float16_with_loss_scaling_on_gpus_without_bfloat16(monkeypatch, capability, hip, kind):
    has_bf16 = kind == "BFloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    scaled = load("--cfg-options", "optim_wrapper.loss_scale=512")
    use_mixed_precision(scaled)
    assert scaled.optim_wrapper.loss_scale == 512  # stays as it is stated
    cfg = load("--cfg-options", "optim_wrapper.clip_grad.max_norm=5")
    use_mixed_precision(cfg)
    assert cfg.optim_wrapper.type == f"{kind}OptimWrapper"
    assert cfg.optim_wrapper.get("loss_scale") == (None if has_bf16 else "dynamic")
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5)
    if not has_bf16:  # mmengine's wrapper takes these settings
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        settings = {**cfg.optim_wrapper, "optimizer": optimizer}
        assert settings.pop("type") == "AmpOptimWrapper"
        monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.GradScaler", Scaler)
        assert isinstance(AmpOptimWrapper(**settings).loss_scaler, Scaler)


class Scaler:
    """Stands in for the GPU's gradient scaler."""


def test_a_wrapper_given_as_a_class_takes_mixed_precision():
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper, optimizer=dict(type="SGD", lr=0.1))))
    use_mixed_precision(cfg)
    assert cfg.optim_wrapper.type == "BFloat16OptimWrapper"


def test_several_optimizers_are_left_to_their_own_wrappers():
    wrapper = dict(constructor="Own", generator=dict(type="OptimWrapper"))
    with pytest.raises(SettingError, match="`optim_wrapper` .*one optimizer.*constructor, generat"):
        use_mixed_precision(Config(dict(optim_wrapper=wrapper)))


@pytest.mark.parametrize("kind", ["AmpOptimWrapper", "BFloat16OptimWrapper"])
def test_a_config_that_is_in_mixed_precision_stays_as_it_is(kind):
    cfg = load("--cfg-options", f"optim_wrapper.type={kind}", "optim_wrapper.loss_scale=512")
    before = ConfigDict(cfg.optim_wrapper)
    use_mixed_precision(cfg)
    assert cfg.optim_wrapper == before


def test_other_optimizer_wrappers_are_refused():
    cfg = load("--cfg-options", "optim_wrapper.type=ApexOptimWrapper")
    with pytest.raises(SettingError, match=r"optim_wrapper\.type.*--amp or --fast.*Apex"):
        use_mixed_precision(cfg)


def test_scaling_the_learning_rate(tmp_path):
    cfg = toy.runner_config(tmp_path / "scaled", **{"train_cfg.max_epochs": 1})
    rate = cfg.optim_wrapper.optimizer.lr
    scale_learning_rate(cfg)
    assert set(run(cfg)[1].rates) == {rate * 8 / 64}
    plain = toy.runner_config(tmp_path / "plain", **{"train_cfg.max_epochs": 1})
    assert set(run(plain)[1].rates) == {rate}
    plain.auto_scale_lr = None  # as MMEngine's runner has it by default
    with pytest.raises(SettingError, match=r"auto_scale_lr\.base_batch_size.*--auto-scale-lr"):
        scale_learning_rate(plain)
    plain.pop("auto_scale_lr")
    with pytest.raises(SettingError, match=r"auto_scale_lr\.base_batch_size.*--auto-scale-lr"):
        scale_learning_rate(plain)


def test_accumulated_batches_count_as_one(tmp_path):
    settings = {"train_cfg.max_epochs": 1, "optim_wrapper.accumulative_counts": 4}
    cfg = toy.runner_config(tmp_path, **settings)
    rate = cfg.optim_wrapper.optimizer.lr
    scale_learning_rate(cfg)
    assert set(run(cfg)[1].rates) == {rate * 4 * 8 / 64}


def test_a_rate_that_a_scheduler_states_is_not_scaled():
    cfg = load()
    with pytest.raises(SettingError, match=r"--auto-scale-lr.*OneCycleLR.*eta_max=0\.1"):
        scale_learning_rate(cfg)
    cfg.param_scheduler = [dict(type="LinearLR", start_factor=0.1), cfg.param_scheduler]
    with pytest.raises(SettingError, match="OneCycleLR"):
        scale_learning_rate(cfg)
    assert not cfg.auto_scale_lr.enable


def preflight_warnings(tmp_path, settings):
    """Return what the preflight warns of."""
    runner = launch.build_runner(toy.runner_config(tmp_path, **settings))
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    runner.logger.addHandler(handler)
    next(hook for hook in runner.hooks if type(hook).__name__ == "PreflightHook").before_train(
        runner
    )
    return list(map(logging.LogRecord.getMessage, records))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({}, ("8 images", "base_batch_size=64", "--auto-scale-lr")),
        ({"optim_wrapper.accumulative_counts": 4}, ("32 images", "base_batch_size=64")),
        ({"optim_wrapper.accumulative_counts": 8}, ()),
        ({"auto_scale_lr.base_batch_size": 8}, ()),
        ({"auto_scale_lr.enable": True}, ()),
        ({"auto_scale_lr": None}, ()),
    ],
    ids=str,
)
def test_preflight_warns_of_a_learning_rate_for_another_batch_size(tmp_path, settings, told):
    messages = [m for m in preflight_warnings(tmp_path, settings) if "learning rate" in m]
    assert len(messages) == bool(told)
    assert all(part in messages[0] for part in told)


@pytest.mark.parametrize("count", [1, 4])
def test_preflight_tells_what_accumulation_leaves_apart(tmp_path, count):
    settings = {"optim_wrapper.accumulative_counts": count}
    messages = [m for m in preflight_warnings(tmp_path, settings) if "at a time" in m]
    assert len(messages) == (count > 1)
    assert all(f"see 8 images at a time, not {count} x 8" in message for message in messages)
