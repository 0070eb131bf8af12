"""Every config under configs/: it reads, says only what is its own, builds, dumps whole, and takes
a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPERS, init_default_scope
from mmpretrain.structures import DataSample

from mskd_plugin.launch import use_method
from mskd_plugin.recipes import METHODS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if "_base_" not in p.parts)
NAMES = [str(p.relative_to(ROOT)) for p in CONFIGS]

#: Published parameters with the classifier, pooled width, and classes counted in them.
NETWORKS = {
    "resnet8": (83_892, 64, 100),
    "resnet20": (278_324, 64, 100),
    "resnet32": (472_756, 64, 100),
    "resnet56": (861_620, 64, 100),
    "resnet110": (1_736_564, 64, 100),
    "resnet8x4": (1_233_540, 256, 100),
    "resnet32x4": (7_433_860, 256, 100),
    "ResNet50": (23_705_252, 2048, 100),
    "wrn_16_2": (703_284, 128, 100),
    "wrn_40_1": (569_780, 64, 100),
    "wrn_40_2": (2_255_156, 128, 100),
    "vgg8": (3_965_028, 512, 100),
    "vgg13": (9_462_180, 512, 100),
    "MobileNetV2": (812_836, 1280, 100),
    "ShuffleV1": (949_258, 960, 100),
    "ShuffleV2": (1_355_528, 1024, 100),
    "resnet18": (11_689_512, 512, 1000),
    "resnet34": (21_797_672, 512, 1000),
    "resnet50": (25_557_032, 2048, 1000),
    "mobilenet_v1": (4_231_976, 1024, 1000),
    "mobilenet_v2": (3_504_872, 1280, 1000),
    "swin_t": (28_288_354, 768, 1000),
    "deit_t": (5_717_416, 192, 1000),
    "vit_s": (22_050_664, 384, 1000),
    "mixer_s16": (18_528_264, 512, 1000),
    "mixer_b16": (59_880_472, 768, 1000),
    "convnext_t": (28_589_128, 768, 1000),
}
#: Configs whose trained parameters are counted: other methods have modules of their own, which
#: their own tests and those of the matrix build. Those of timm are in test_timm_networks.py.
COUNTED = [n for n in NAMES if re.match(r"(mskd|kd|student|teacher)_(?!.*timm)", Path(n).name)]
#: Configs that take steps here: one pair a data set.
STEPPED = [n for n in COUNTED if re.search("resnet8|r18", n)]
#: Configs whose dump is read again.
DUMPED = [*STEPPED, "configs/fsp_r34_r18_imagenet.py", "configs/dkd_r34_r18_imagenet.py"]


def trained_parameters(name: str, pair: dict) -> int:
    """Count what a config trains: a network of the pair, and MSKD's linear projector."""
    network = pair["teacher" if "/teacher_" in name else "student"]
    parameters, width, classes = NETWORKS[network]
    parameters -= (classes - pair["num_classes"]) * (width + 1)
    if "mskd_" in Path(name).name:
        out = NETWORKS[pair["teacher"]][1]
        parameters += width * out + out
    return parameters


def read(name: str) -> Config:
    cfg = Config.fromfile(ROOT / name)
    init_default_scope(cfg.default_scope)
    if "teacher_ckpt" in cfg.model:
        cfg.model.teacher_ckpt = None  # tests download nothing
    return cfg


def test_every_pair_has_its_mskd_config():
    pairs = {p.stem for p in (ROOT / "configs" / "_base_" / "pairs").glob("*.py")}
    of_mskd = [p for p in CONFIGS if p.name.startswith("mskd_")]
    used = {re.search(r"pairs/(.+)\.py", p.read_text())[1] for p in of_mskd}
    assert used == pairs


@pytest.mark.parametrize("name", COUNTED)
def test_builds_with_the_published_number_of_parameters(name):
    # mmpretrain's backbones compute drop-path rates with tensors, which the meta device cannot.
    cfg = read(name)
    pair = cfg.pair
    on_cpu = re.search("imagenet|heterogeneous", name) or "ResNet50" in pair.values()
    with torch.device("cpu" if on_cpu else "meta"):
        model = ROOT_MODELS.build(cfg.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == trained_parameters(name, pair)


@pytest.mark.parametrize("name", NAMES)
def test_leaf_states_only_its_own(name):
    code = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
    assert len(code) <= 12


@pytest.mark.parametrize("name", DUMPED)
def test_dumped_config_is_whole_and_equal(name, tmp_path):
    cfg = Config.fromfile(ROOT / name)
    cfg.dump(tmp_path / "dumped.py")
    dumped = Config.fromfile(tmp_path / "dumped.py")
    assert "_base_" not in dumped and "recipes" not in (tmp_path / "dumped.py").read_text()
    assert dumped.to_dict() == cfg.to_dict()


def test_both_reference_pairs_have_every_method():
    for tail in ("cifar100/{}_resnet32x4_resnet8x4.py", "{}_r34_r18_imagenet.py"):
        for method in [*METHODS, "mskd-kd", "mskd-dkd"]:
            name = "configs/" + tail.format(method.replace("_", "-"))
            cfg = Config.fromfile(ROOT / name)
            expected = Config.fromfile(ROOT / "configs" / Path(_pair_of(name)))
            use_method(expected, method.replace("-", "+"))
            assert cfg.model == expected.model, name
            assert cfg.train_cfg == expected.train_cfg, name
            assert cfg.param_scheduler == expected.param_scheduler, name


def _pair_of(name: str) -> str:
    base = "resnet34_resnet18_imagenet" if "r34" in name else "resnet32x4_resnet8x4_cifar100"
    return f"_base_/pairs/{base}.py"


@pytest.mark.parametrize("name", STEPPED)
def test_takes_a_step_that_lowers_the_loss_of_its_batch(name):
    cfg = read(name)
    torch.manual_seed(0)
    model = ROOT_MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    wrapper = OPTIM_WRAPPERS.build(
        {**cfg.optim_wrapper, "optimizer": None}
        | {"optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)}
    )
    side = 224 if "imagenet" in name else 32
    batch = {
        "inputs": torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8),
        "data_samples": [DataSample().set_gt_label(i) for i in range(4)],
    }
    losses = [model.train_step(batch, wrapper)["loss"].item() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_protocols_of_the_benchmark():
    cifar = read("configs/cifar100/mskd_resnet32x4_resnet8x4.py")
    assert cifar.train_cfg.max_epochs == 240
    assert cifar.train_dataloader.batch_size == 64
    assert cifar.optim_wrapper.optimizer == dict(
        type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    assert cifar.param_scheduler.milestones == [150, 180, 210]
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    assert cifar.model.data_preprocessor.mean == pytest.approx([255 * m for m in mean])
    assert cifar.model.data_preprocessor.std == pytest.approx([255 * s for s in std])

    imagenet = Config.fromfile(ROOT / "configs/mskd_r34_r18_imagenet.py")
    assert imagenet.model.teacher_ckpt == "torchvision://resnet34"
    assert imagenet.train_cfg.max_epochs == 100
    assert imagenet.optim_wrapper.optimizer == dict(
        type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4
    )
    assert imagenet.param_scheduler.milestones == [30, 60, 90]

    kd = read("configs/cifar100/kd_resnet32x4_resnet8x4.py").model
    assert kd.architecture.head.loss.loss_weight == 0.1
    loss = kd.distiller.distill_losses.loss_kd
    assert (loss.tau, loss.loss_weight, loss.reduction) == (4.0, 0.9, "batchmean")
