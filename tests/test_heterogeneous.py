"""Pairs between convolutional networks, transformers and MLPs, of mmpretrain's models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import MODELS, OPTIM_WRAPPERS, init_default_scope
from mmpretrain.registry import TRANSFORMS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mskd_plugin.errors import SettingError
from mskd_plugin.launch import build_runner
from mskd_plugin.networks import NETWORKS, classifier
from mskd_plugin.recipes import METHODS, alone, distill, kd, mskd

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "heterogeneous").glob("mskd_*_cifar100.py"))

# Published parameters with 1000 classes; shape of each stage's output for one image of 224x224.
TABLE = {
    "swin_t": (28_288_354, [(56 * 56, 96), (28 * 28, 192), (14 * 14, 384), (7 * 7, 768)]),
    "deit_t": (5_717_416, [(1 + 14 * 14, 192)] * 4),
    "vit_s": (22_050_664, [(1 + 14 * 14, 384)] * 4),
    "mixer_b16": (59_880_472, [(14 * 14, 768)] * 4),
    "convnext_t": (28_589_128, [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]),
}


def build(name: str, num_classes: int = 1000) -> nn.Module:
    init_default_scope("mmpretrain")
    return MODELS.build(classifier(name, num_classes))


def outputs_of(model: nn.Module, sources: list[str], images: Tensor) -> list[Tensor]:
    seen: dict[str, Tensor] = {}

    def note(source):
        def hook(module, args, output):
            seen[source] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(s).register_forward_hook(note(s)) for s in sources]
    with torch.no_grad():
        seen["logits"] = model.eval()(images)
    for handle in handles:
        handle.remove()
    return [seen[source] for source in [*sources, "logits"]]


@pytest.mark.parametrize("name", TABLE)
def test_counts_and_stages(name):
    parameters, shapes = TABLE[name]
    net, model = NETWORKS[name], build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    sources = [source for source, _ in (*net.stages, net.stem, net.final)]
    *stages, stem, final, logits = outputs_of(
        model.to("meta"), sources, torch.empty(1, 3, 224, 224, device="meta")
    )
    assert [tuple(stage.shape[1:]) for stage in stages] == shapes
    assert net.tokens == (stages[0].dim() == 3)
    axis = 2 if net.tokens else 1
    taps = (*net.stages, net.stem, net.final)
    assert [m.shape[axis] for m in (*stages, stem, final)] == [width for _, width in taps]
    assert model.head.fc.in_features == net.width == net.final[1]
    assert logits.shape == (1, 1000)


@pytest.mark.parametrize("name", ["swin_t", "deit_t", "mixer_b16", "convnext_t"])
def test_the_classifier_reads_what_the_table_says(name):
    torch.manual_seed(0)
    net, model = NETWORKS[name], build(name, 10)
    model.init_weights()
    final, logits = outputs_of(model, [net.final[0]], torch.randn(1, 3, 224, 224))
    mean = final.flatten(2).mean(2) if final.dim() == 4 else final.mean(1)
    equal = torch.allclose(model.head.fc(mean), logits, atol=1e-5)
    assert equal == net.final_is_pooled
    if name == "deit_t":
        torch.testing.assert_close(model.head.fc(final[:, 0]), logits)
    if name == "convnext_t":
        normed = model.backbone.norm3(mean[:, :, None, None]).flatten(1)
        torch.testing.assert_close(model.head.fc(normed), logits)


@pytest.mark.parametrize("name", ["swin_t", "deit_t", "vit_s"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = build(name)
    model.init_weights()
    for path, module in model.named_modules():
        # mmpretrain's vision transformers initialise their feed-forward layers by themselves.
        if isinstance(module, nn.Linear) and (name == "swin_t" or ".ffn." not in path):
            # A normal distribution cut at far more than its deviation.
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), path
            assert module.bias is None or (module.bias == 0).all(), path


def test_initialisation_of_a_mixer():
    torch.manual_seed(0)
    model = build("mixer_s16")
    model.init_weights()
    patches = model.backbone.patch_embed.projection.weight  # of 16 x 16 pixels in three colours
    assert patches.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)


def config(file: Path) -> Config:
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    return cfg


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator),
        "data_samples": [DataSample().set_gt_label(label) for label in (3, 5)],
    }


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_mskd_takes_steps_that_lower_its_loss(file):
    cfg = config(file)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.student.init_weights()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapper = OPTIM_WRAPPERS.build(
        {"type": "OptimWrapper", "optimizer": torch.optim.SGD(trained, 1e-2)}
    )
    seen: dict[str, Tensor] = {}
    for role in ("student", "teacher"):
        getattr(model, role).backbone.register_forward_pre_hook(
            lambda module, args, role=role: seen.__setitem__(role, args[0])
        )
    losses = []
    for _ in range(3):
        # The same mix of images and the same dropped paths in each step.
        torch.manual_seed(1)
        np.random.seed(1)
        losses.append(model.train_step(batch(), wrapper))
        assert torch.equal(seen["student"], seen["teacher"])
    name = next(key for key in losses[0] if "loss_mskd" in key)
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert losses[0][name] > 0
    mixed = bool(cfg.data_preprocessor.get("batch_augments"))
    assert mixed == (cfg.pair.student in ("deit_t", "mixer_s16"))
    plain = model.data_preprocessor(batch(), False)["inputs"]
    assert torch.equal(seen["student"], plain) == (not mixed)


def test_the_class_token_is_no_region():
    cfg = config(next(f for f in CONFIGS if "resnet50_deit-t" in f.stem))
    recorders = cfg.model.distiller.student_recorders
    assert [r.source for r in recorders.values()] == ["backbone.ln1"]
    connector = MODELS.build(dict(cfg.model.distiller.connectors.final_student, projector="none",
                                  out_channels=None, _scope_="mmrazor"))  # fmt: skip
    tokens = torch.randn(2, 197, 192)
    whole, *_ = connector(tokens)
    expected = sum(tokens[:, 1 + position] for position in range(196)) / 196
    torch.testing.assert_close(whole[:, 0], expected)


def base(teacher: str, student: str, **pair) -> dict:
    return {
        "pair": {"teacher": teacher, "student": student, "num_classes": 10, **pair},
        "data_preprocessor": {"type": "ClsDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3},
    }


@pytest.mark.parametrize("teacher", ["deit_t", "convnext_t"])
def test_regions_are_categorized_only_where_their_average_is_classified(teacher):
    with pytest.raises(SettingError, match=f"teacher.*average.*{teacher} for resnet18"):
        mskd(base(teacher, "resnet18"), keep="consistent")
    mskd(base("swin_t", "resnet18"), keep="consistent")
    mskd(base("resnet18", teacher), keep="consistent")


@pytest.mark.parametrize(
    "method, settings",
    [("dkd", {}), ("nkd", {}), ("wsld", {}), ("mskd", {"exclude_same_class": True})],
)
def test_methods_of_classes_refuse_mixed_images(method, settings):
    pair = base("swin_t", "resnet18")
    METHODS[method](pair, **settings)
    pair["data_preprocessor"]["batch_augments"] = {"augments": {"type": "Mixup", "alpha": 0.8}}
    match = f"batch_augments.*{method}, which reads one class.*swin_t to resnet18"
    with pytest.raises(SettingError, match=match):
        METHODS[method](pair, **settings)
    for name in ("kd", "mskd", "ofa", "at", "fitnet", "vid"):
        METHODS[name](pair)
    pair["data_preprocessor"] |= {"batch_augments": None, "to_onehot": True}
    with pytest.raises(SettingError, match=f"to_onehot.*False with {method}.*got True for swin_t"):
        METHODS[method](pair, **settings)
    METHODS["kd"](pair)


def test_label_smoothing_is_the_students():
    pair = base("swin_t", "resnet18", label_smoothing=0.1)
    model = distill(pair, kd(pair, ce_weight=0.5))
    loss = {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "original"}
    assert model["architecture"]["head"]["loss"] == {**loss, "loss_weight": 0.5}
    assert alone(pair)["head"]["loss"] == {**loss, "loss_weight": 1.0}
    logits, labels = torch.randn(3, 10, dtype=torch.float64), torch.tensor([1, 4, 4])
    init_default_scope("mmpretrain")
    value = MODELS.build(alone(pair)).head.loss_module(logits, labels, avg_factor=3)
    rows = logits.log_softmax(1)
    expected = -sum(0.9 * row[k] + 0.1 * row.mean() for row, k in zip(rows, labels)) / 3
    torch.testing.assert_close(value, expected)
    for wrong in (1.0, -0.1, "0.1", True):
        with pytest.raises(SettingError, match="`pair.label_smoothing` to be a number"):
            alone(base("swin_t", "resnet18", label_smoothing=wrong))


def test_the_published_settings():
    cnn = config(next(f for f in CONFIGS if "swin-t_resnet18" in f.stem))
    vit = config(next(f for f in CONFIGS if "convnext-t_deit-t" in f.stem))
    for cfg in (cnn, vit):
        assert cfg.train_cfg.max_epochs == 300
        assert cfg.train_dataloader.batch_size == 128
        assert cfg.auto_scale_lr.base_batch_size == 8 * 128
        assert cfg.model.architecture.head.loss.label_smooth_val == 0.1
        assert cfg.model.teacher.head.loss.type == "CrossEntropyLoss"
    sgd, adamw = cnn.optim_wrapper.optimizer, vit.optim_wrapper.optimizer
    assert (sgd.type, sgd.lr, sgd.weight_decay) == ("SGD", 0.05, 2e-3)
    assert (adamw.type, adamw.lr, adamw.weight_decay) == ("AdamW", 5e-4, 0.05)
    assert vit.optim_wrapper.clip_grad.max_norm == 5.0
    assert "clip_grad" not in cnn.optim_wrapper
    for cfg, epochs, start, end in ((cnn, 3, 1e-4, 1e-3), (vit, 20, 5e-7, 1e-5)):
        warmup, cosine = cfg.param_scheduler
        assert warmup.end == cosine.begin == epochs and cosine.end == 300
        assert warmup.start_factor * cfg.optim_wrapper.optimizer.lr == pytest.approx(start)
        assert cosine.eta_min == end
    assert [a.type for a in vit.model.data_preprocessor.batch_augments.augments] == [
        "Mixup",
        "CutMix",
    ]


def test_the_published_settings_on_imagenet():
    folder = ROOT / "configs" / "heterogeneous"
    cnn = config(folder / "mskd_swin-t_resnet18_imagenet.py")
    vit = config(folder / "mskd_convnext-t_deit-t_imagenet.py")
    sgd, adamw = cnn.optim_wrapper.optimizer, vit.optim_wrapper.optimizer
    assert (sgd.type, sgd.lr, sgd.weight_decay) == ("SGD", 0.1, 1e-4)
    assert (adamw.type, adamw.lr, adamw.weight_decay) == ("AdamW", 5e-4, 0.05)
    assert (cnn.train_cfg.max_epochs, vit.train_cfg.max_epochs) == (100, 300)
    for cfg, per_process, epochs in ((cnn, 64, 3), (vit, 128, 20)):
        assert cfg.train_dataloader.batch_size == per_process
        assert cfg.auto_scale_lr.base_batch_size == 8 * per_process
        assert cfg.param_scheduler[0].end == epochs
        assert cfg.model.architecture.head.loss.label_smooth_val == 0.1
    assert cnn.param_scheduler[1].milestones == [30, 60, 90]
    assert vit.param_scheduler[1].eta_min == 1e-6
    assert 1 - vit.custom_hooks[-1].momentum == pytest.approx(0.99996)
    assert [hook.type for hook in vit.custom_hooks[:-1]] == [h.type for h in cnn.custom_hooks]
    mixer = config(folder / "mskd_mixer-b16_resnet18_imagenet.py")
    assert mixer.model.data_preprocessor.mean == [127.5] * 3


def test_the_average_of_the_weights_is_what_a_distillation_saves(tmp_path):
    cfg = toy.runner_config(tmp_path)
    cfg.custom_hooks = [dict(type="EMAHook", momentum=0.25, priority="ABOVE_NORMAL")]
    runner = build_runner(cfg)
    seen = []

    class Watch(Hook):
        priority = "VERY_HIGH"

        def after_train_iter(self, runner, *args, **kwargs):
            seen.append(runner.model.student.head.fc.weight.detach().clone())

    runner.register_hook(Watch())
    runner.train()
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    saved = torch.load(tmp_path / "epoch_2.pth")["state_dict"]
    assert len(seen) > 2 and not torch.equal(seen[-1], average)
    torch.testing.assert_close(saved["architecture.head.fc.weight"], average)
    assert not any(key.startswith("teacher.") for key in saved)


@pytest.mark.parametrize(
    "name", [f"{p}_{d}" for d in ("cifar100", "imagenet") for p in ("swin-t_resnet18",
             "convnext-t_deit-t")]
)  # fmt: skip
def test_the_pipelines_give_the_networks_images(name):
    cfg = config(ROOT / "configs" / "heterogeneous" / f"mskd_{name}.py")
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        steps = [s for s in loader.dataset.pipeline if s.type != "LoadImageFromFile"]
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        for seed in range(5):
            np.random.seed(seed)
            image = np.random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            packed = pipeline({"img": image, "img_shape": (32, 32), "gt_label": 1})
            assert packed["inputs"].shape == (3, 224, 224)
            assert packed["inputs"].dtype == torch.uint8
