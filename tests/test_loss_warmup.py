"""The warm-up of distillation losses: the factor of each epoch, in real runs, resumed ones too."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmrazor.registry import MODELS

from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import LossWarmupHook
from mskd_plugin.launch import build_runner
from mskd_plugin.recipes import distill, dkd, ft, kd, mskd, two_phases

LOSS = "loss_mskd_stage3"


class Seen(Hook):
    """Note what the loss gives in each step, and what it gives without the warm-up."""

    priority = "LOWEST"

    def __init__(self, loss=LOSS):
        self.loss, self.steps = loss, []

    def before_train(self, runner):
        module = runner.model.distiller.distill_losses[self.loss]
        forward = module.forward

        def noted(*args, **kwargs):
            self.plain = forward(*args, **kwargs)
            return self.plain

        module.forward = noted

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if f"distill.{self.loss}" not in outputs:  # of the other phase
            return
        ratio = outputs[f"distill.{self.loss}"] / self.plain
        logged = runner.message_hub.get_scalar(
            f"train/warmup/{self.loss.removeprefix('loss_')}"
        ).current()
        self.steps.append((runner.epoch, ratio.item(), logged))


def config(folder, epochs=3, model=None, **settings):
    model = model or toy.algorithm(
        teacher_ckpt=str(toy.teacher_file(folder)), loss_warmup={LOSS: 4}
    )
    return toy.runner_config(folder, model, **{"train_cfg.max_epochs": epochs, **settings})


def train(cfg, loss=LOSS):
    runner = build_runner(cfg)
    seen = Seen(loss)
    runner.register_hook(seen)
    runner.train()
    return runner, seen.steps


def test_the_factor_is_min_of_epoch_by_warmup_and_1(tmp_path):
    cfg = config(tmp_path, epochs=3)
    cfg.model.loss_warmup = {LOSS: 2}
    runner, steps = train(cfg)
    assert [epoch for epoch, *_ in steps] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch, ratio, logged in steps:
        assert logged == min((epoch + 1) / 2, 1)
        assert ratio == pytest.approx(logged, rel=1e-6)
    lines = (tmp_path / runner.timestamp / "vis_data" / "scalars.json").read_text().splitlines()
    written = [line["warmup/mskd_stage3"] for line in map(json.loads, lines) if "lr" in line]
    assert written and set(written) <= {0.5, 1.0}
    # After training the loss is as it was.
    assert not runner.model.distiller.distill_losses[LOSS]._forward_hooks


def test_no_factor_has_a_name_that_mmengine_averages_over_steps():
    hook, logged = LossWarmupHook({"kd_loss": 4}), {}
    hook.factors = {"kd_loss": 0.25}
    hub = SimpleNamespace(update_scalar=logged.setdefault)
    hook.before_train_iter(SimpleNamespace(message_hub=hub), 0)
    assert logged == {"train/warmup/kd": 0.25}


def test_a_resumed_run_goes_on_with_the_next_epochs_factor(tmp_path):
    train(config(tmp_path, epochs=1))
    cfg = config(tmp_path, epochs=2)
    cfg.resume, cfg.load_from = True, str(tmp_path / "epoch_1.pth")
    _, steps = train(cfg)
    assert [(epoch, logged) for epoch, _, logged in steps] == [(1, 0.5)] * 3
    assert all(ratio == pytest.approx(0.5, rel=1e-6) for _, ratio, _ in steps)


def test_a_loss_of_phase_2_warms_up_from_the_end_of_phase_1(tmp_path):
    methods = ft(base(), init_epochs=2), dkd(base(), warmup=2)
    model = distill(base(), *methods)
    model["loss_warmup"]["loss_ft_paraphraser"] = 4
    model["teacher_ckpt"] = str(tmp_path / "teacher.pth")
    torch.save(MODELS.build(model["teacher"]).state_dict(), model["teacher_ckpt"])

    def factors(folder, **settings):
        cfg = config(tmp_path / folder, epochs=3, model=ConfigDict(model))
        cfg.default_hooks.checkpoint.max_keep_ckpts = -1
        cfg.update({**two_phases(cfg, *methods), **settings})
        runner = build_runner(cfg)
        seen = Seen("loss_ft_paraphraser"), Seen("loss_dkd")
        for hook in seen:
            runner.register_hook(hook)
        runner.train()
        for hook in seen:
            for _, ratio, logged in hook.steps:
                assert ratio == pytest.approx(logged, rel=1e-6)
        history, _ = runner.message_hub.get_scalar("train/warmup/dkd").data
        assert set(history) <= {0.0, 0.5, 1.0}  # 0 in phase 1, which does not compute it
        return [{epoch: logged for epoch, _, logged in hook.steps} for hook in seen]

    assert factors("whole") == [{0: 0.25, 1: 0.5}, {2: 0.5, 3: 1.0, 4: 1.0}]
    last = str(tmp_path / "whole" / "epoch_3.pth")
    assert factors("resumed", resume=True, load_from=last) == [{}, {3: 1.0, 4: 1.0}]


def test_the_hook_may_state_it_for_mmrazors_own_classes(tmp_path):
    distiller = dict(
        type="ConfigurableDistiller",
        student_recorders=dict(logits=dict(type="ModuleOutputs", source="head.fc")),
        teacher_recorders=dict(logits=dict(type="ModuleOutputs", source="head.fc")),
        distill_losses=dict(loss_kd=dict(type="KLDivergence", tau=2)),
        loss_forward_mappings=dict(
            loss_kd=dict(
                preds_S=dict(recorder="logits", from_student=True),
                preds_T=dict(recorder="logits", from_student=False),
            )
        ),
    )
    model = toy.algorithm(
        "SingleTeacherDistill",
        distiller=distiller,
        teacher_ckpt=str(toy.teacher_file(tmp_path)),
    )
    hooks = [dict(type="LossWarmupHook", losses=dict(loss_kd=4))]
    cfg = config(tmp_path, epochs=2, model=model, custom_hooks=hooks)
    _, steps = train(cfg, "loss_kd")
    for epoch, ratio, logged in steps:
        assert logged == (epoch + 1) / 4
        assert ratio == pytest.approx(logged, rel=1e-6)


def test_only_the_named_loss_is_scaled_and_its_gradient_with_it():
    hook = LossWarmupHook({"loss_a": 4})
    losses = torch.nn.ModuleDict({"loss_a": torch.nn.Identity(), "loss_b": torch.nn.Identity()})
    hook._follow("loss_a", losses["loss_a"])
    hook._warmup = hook.losses
    hook.before_train_epoch(SimpleNamespace(epoch=0))
    value = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses["loss_a"](value).backward()
    assert value.grad.item() == 0.25
    assert losses["loss_b"](value).item() == 2.0
    assert losses["loss_a"]([value, value])[1].item() == 0.5


def test_a_training_begun_anew_scales_once_and_ends_without_a_scale():
    model = toy.build(loss_warmup={LOSS: 4})
    hook = LossWarmupHook()
    runner = SimpleNamespace(model=model, train_loop=None, epoch=0)
    plain = model(**toy.batch(), mode="loss")[f"distill.{LOSS}"]
    for _ in range(2):
        hook.before_train(runner)
        hook.before_train_epoch(runner)
    torch.testing.assert_close(model(**toy.batch(), mode="loss")[f"distill.{LOSS}"], plain / 4)
    hook.after_train(runner)
    torch.testing.assert_close(model(**toy.batch(), mode="loss")[f"distill.{LOSS}"], plain)
    assert hook.factors == {}


def test_the_losses_are_found_inside_a_distributed_wrapper(tmp_path):
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = toy.build(loss_warmup={LOSS: 4})
        wrapped = MMDistributedDataParallel(model)
        hook = LossWarmupHook()
        runner = SimpleNamespace(model=wrapped, train_loop=None, epoch=0)
        plain = wrapped(**toy.batch(), mode="loss")[f"distill.{LOSS}"]
        hook.before_train(runner)
        for runner.epoch, factor in ((0, 0.25), (3, 1.0), (9, 1.0)):
            hook.before_train_epoch(runner)
            scaled = wrapped(**toy.batch(), mode="loss")[f"distill.{LOSS}"]
            torch.testing.assert_close(scaled, factor * plain)
    finally:
        torch.distributed.destroy_process_group()


def base():
    return dict(
        pair=dict(teacher="resnet20", student="resnet8", num_classes=10),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
    )


def test_a_recipe_asks_for_it():
    first, second = mskd(base()), kd(base())
    assert "loss_warmup" not in distill(base(), first, second)
    second["loss_warmup"] = {"loss_kd": 20}
    model = distill(base(), first, second)
    assert model["loss_warmup"] == {"loss_kd": 20}
    assert MODELS.build(model).loss_warmup == {"loss_kd": 20}
    other = {"loss_warmup": {"loss_kd": 10}}
    with pytest.raises(SettingError, match="loss_warmup.*two different 'loss_kd'"):
        distill(base(), first, second, other)


@pytest.mark.parametrize(
    "warmup, match",
    [
        ({"loss_dkd": 20}, f"loss_warmup.*{LOSS}.*'loss_dkd'"),
        ({LOSS: 0}, rf"loss_warmup\.{LOSS}.*above 0.*0"),
        ({LOSS: True}, "above 0"),
        ({LOSS: float("inf")}, "above 0"),
        ({LOSS: "20"}, "above 0.*'20'"),
        (20, "loss_warmup.*dict.*20"),
    ],
)
def test_the_algorithm_refuses(warmup, match):
    with pytest.raises(SettingError, match=match):
        toy.build(loss_warmup=warmup)


def test_a_part_of_an_epoch_is_enough():
    assert toy.build(loss_warmup={LOSS: 0.5}).loss_warmup == {LOSS: 0.5}


@pytest.mark.parametrize(
    "losses, match",
    [({"loss_a": -1}, r"losses\.loss_a.*above 0.*-1"), ([3], r"losses.*dict.*\[3\]")],
)
def test_the_hook_refuses(losses, match):
    with pytest.raises(SettingError, match=match):
        LossWarmupHook(losses)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(custom_hooks=[dict(type="LossWarmupHook", losses={LOSS: 2})]), f"{LOSS}.*4.*2"),
        (dict(custom_hooks=[dict(type="LossWarmupHook", losses={"loss_x": 2})]), f"{LOSS}.*loss_x"),
        (dict(custom_hooks=[dict(type="PreflightHook")]), "custom_hooks.*LossWarmupHook"),
        (dict(custom_hooks=[dict(type="EMAHook")]), r"custom_hooks.*\[\*_base_\.custom_hooks"),
        (
            dict(
                train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4),
                custom_hooks=[dict(type="LossWarmupHook")],
            ),
            "by_epoch.*True",
        ),
    ],
)
def test_training_refuses(tmp_path, changes, match):
    cfg = config(tmp_path)
    for name, value in changes.items():
        cfg[name] = value
    with pytest.raises(SettingError, match=match):
        build_runner(cfg).train()
