"""What checkpoints and schedules read from validation is tried before training, and nothing of that
stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from mmengine.evaluator import BaseMetric
from mmengine.runner import ValLoop

from mskd_plugin.datasets import Digits
from mskd_plugin.hooks import PreflightHook
from mskd_plugin.launch import build_runner


@pytest.mark.parametrize(
    "settings, match",
    [
        (
            {"default_hooks.checkpoint.save_best": "top1"},
            "save_best` to be a number that validation measures: accuracy/top1, but got 'top1'",
        ),
        ({"default_hooks.checkpoint.save_best": ["accuracy/top1", "accuracy/top5"]}, "'.*/top5'"),
        ({"val_evaluator.topk": (1, 11)}, "`val_evaluator` to be metrics .* Top-11 accuracy"),
        (
            {"model.architecture.head.in_channels": 7},
            "`model.architecture` to be a network that can predict .* RuntimeError .*8 and 7x10",
        ),
    ],
    ids=["name", "list", "topk", "network"],
)
def test_preflight_tries_validation(tmp_path, settings, match):
    cfg = toy.runner_config(tmp_path, **settings)
    cfg.default_hooks.checkpoint.rule = "greater"
    toy.fails(cfg, match)


@pytest.mark.parametrize(
    "rule, match",
    [
        (None, "rule` to be 'greater' or 'less' for 'conf"),
        ("less", "save_best` to be a number .*: accuracy/top1, but got 'confusion_matrix/result'"),
    ],
)
def test_preflight_looks_at_what_is_chosen_by_itself(tmp_path, rule, match):
    cfg = toy.runner_config(tmp_path)
    cfg.val_evaluator = [dict(type="ConfusionMatrix"), dict(type="Accuracy", topk=(1,))]
    cfg.default_hooks.checkpoint.update(save_best="auto", rule=rule)
    toy.fails(cfg, match)


def test_preflight_looks_at_what_ends_the_training(tmp_path):
    cfg = toy.runner_config(tmp_path)
    cfg.custom_hooks.append(dict(type="EarlyStoppingHook", monitor="accuracy/top3", strict=True))
    toy.fails(cfg, "`EarlyStoppingHook.monitor` .*: accuracy/top1, but got 'accuracy/top3'")
    cfg.custom_hooks[-1]["strict"] = False  # which only warns
    cfg.experiment_name += "_b"
    assert toy.train(cfg)[1].count == 6
    plateau = dict(type="ReduceOnPlateauLR", monitor="accuracy/top3", rule="greater", by_epoch=True)
    toy.fails(
        toy.runner_config(tmp_path / "b", param_scheduler=[plateau]),
        "`param_scheduler.monitor` .*: accuracy/top1, but got 'accuracy/top3'",
    )
    plateau["monitor"] = "accuracy/top1"
    assert toy.train(toy.runner_config(tmp_path / "c", param_scheduler=[plateau]))[1].count == 6


def test_preflight_validates_images_one_by_one_where_the_training_does(tmp_path, monkeypatch):
    read = Digits.__getitem__

    def of_two_sizes(dataset, index):
        data = read(dataset, index)
        if len(dataset) == 20:  # the validation's
            data["inputs"] = torch.nn.functional.pad(data["inputs"], (0, index % 2))
        return data

    monkeypatch.setattr(Digits, "__getitem__", of_two_sizes)
    cfg = toy.runner_config(tmp_path, **{"val_dataloader.batch_size": 1})
    assert toy.train(cfg)[1].count == 6


def test_preflight_wants_a_validation_for_the_best_checkpoint(tmp_path):
    cfg = toy.runner_config(tmp_path, **{"default_hooks.checkpoint.save_best": "auto"})
    for part in ("dataloader", "cfg", "evaluator"):
        cfg.pop(f"val_{part}")
    toy.fails(cfg, "`default_hooks.checkpoint.save_best` to be None without validation, .*'auto'")


def test_preflight_compares_the_cycles_steps_with_the_trainings(tmp_path):
    cycle = dict(type="OneCycleLR", eta_max=0.1, total_steps=2, by_epoch=True)
    by_step = {**cycle, "convert_to_iter_based": True}
    settings = dict(param_scheduler=[by_step])
    toy.train(toy.runner_config(tmp_path / "a", **settings))
    longer = {"train_cfg.max_epochs": 3}
    told = (
        "`param_scheduler.total_steps` .* the 9 iterations of this training, but got 6 of OneCycle"
    )
    toy.fails(toy.runner_config(tmp_path / "b", **settings, **longer), told)
    by_epoch = dict(param_scheduler=[cycle])
    toy.fails(
        toy.runner_config(tmp_path / "c", **by_epoch, **longer), "the 3 epochs .* got 2 of One"
    )


def test_preflight_writes_no_results(tmp_path):
    cfg = toy.runner_config(tmp_path, **{"default_hooks.checkpoint.save_best": "accuracy/top5"})
    dump = dict(type="DumpResults", out_file_path=str(tmp_path / "results.pkl"))
    cfg.val_evaluator = [dict(type="Accuracy", topk=(1,)), dump]
    toy.fails(cfg, "save_best")
    assert not (tmp_path / "results.pkl").exists()


class OwnMetric(BaseMetric):
    """Keeps its results elsewhere, as mmpretrain's ``MultiTasksMetric`` does."""

    default_prefix = "own"

    def __init__(self):
        super().__init__()
        self.count = 0

    def process(self, data_batch, data_samples):
        self.count += len(data_samples)

    def evaluate(self, size):
        count, self.count = self.count, 0
        return {"own/count": count}

    def compute_metrics(self, results):  # abstract in MMEngine; this `evaluate` has no use for it
        raise NotImplementedError


class OwnLoop(ValLoop):
    """Measures something else."""

    def run(self):
        return {"own/count": 7}


def test_preflight_leaves_other_metrics_and_loops_alone(tmp_path, capsys):
    cfg = toy.runner_config(tmp_path, **{"default_hooks.checkpoint.save_best": "own/count"})
    cfg.default_hooks.checkpoint.rule = "greater"
    cfg.val_evaluator = [OwnMetric(), dict(type="Accuracy", topk=(1,))]
    runner, _ = toy.train(cfg)
    assert runner.message_hub.get_scalar("val/own/count").data[0].tolist() == [20, 20]
    assert "tried on two images" not in "".join(capsys.readouterr())
    cfg = toy.runner_config(tmp_path / "b", **{"default_hooks.checkpoint.save_best": "own/count"})
    cfg.default_hooks.checkpoint.rule = "greater"
    cfg.val_cfg.type = OwnLoop
    assert toy.train(cfg)[1].count == 6


@pytest.mark.parametrize("best", ["auto", "accuracy/top5"])
def test_preflight_leaves_nothing_of_the_trial(tmp_path, best):
    cfg = toy.runner_config(tmp_path, **{"default_hooks.checkpoint.save_best": best})
    cfg.val_evaluator = [dict(type="Accuracy", topk=(1, 5))]
    runner = build_runner(cfg)
    metrics = [*runner.val_loop.evaluator.metrics]
    PreflightHook().before_train(runner)
    assert runner.val_loop.evaluator.metrics == metrics and not metrics[0].results
    runner.train()
    shares = runner.message_hub.get_scalar("val/accuracy/top1").data[0]
    assert len(shares) == 2
    np.testing.assert_allclose(shares * 20 / 100, (shares * 20 / 100).round(), atol=1e-6)
    name = "accuracy_top1" if best == "auto" else "accuracy_top5"
    assert list(tmp_path.glob(f"best_{name}_epoch_*.pth"))


def test_preflight_only_warns_of_a_metric_of_ones_own(tmp_path, capsys):
    class Demanding(BaseMetric):
        default_prefix = "own"

        def process(self, data_batch, data_samples):
            self.results += data_samples

        def compute_metrics(self, results):
            if len(results) < 20:
                raise ValueError("too few images")
            return dict(count=len(results))

    cfg = toy.runner_config(tmp_path)
    cfg.val_evaluator = [Demanding(), dict(type="Accuracy", topk=(1,))]
    runner, _ = toy.train(cfg)
    assert runner.message_hub.get_scalar("val/own/count").current() == 20
    assert "WARNING - Validation was tried on two images and failed: ValueError: too few" in (
        "".join(capsys.readouterr())
    )
