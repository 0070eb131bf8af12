"""The heterogeneous pairs as a set: which directions they have, what each file states, and the
published weights of their teachers."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import mmpretrain
import pytest
import torch
import torchvision
import yaml
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mskd_plugin.checkpoints.weights import fit_weights
from mskd_plugin.networks import NETWORKS, classifier, network
from mskd_plugin.recipes.augmentation import strong_augmentation

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "configs" / "_base_" / "pairs"
FAMILIES = {
    "CNN": {"resnet18", "resnet50", "mobilenet_v2", "convnext_t"},
    "ViT": {"swin_t", "vit_s", "deit_t"},
    "MLP": {"mixer_s16", "mixer_b16"},
}
BUNDLES = {"cifar100": ("cifar100_224_cnn", "cifar100_224_vit"),
           "imagenet": ("imagenet_cnn", "imagenet_vit")}  # fmt: skip


def files(data: str) -> list[Path]:
    """Return the pairs of one data set with mmpretrain's networks."""
    bundles = [f'_base_ = "../{bundle}.py"' for bundle in BUNDLES[data]]
    found = [f for f in PAIRS.glob(f"*_{data}.py") if any(b in f.read_text() for b in bundles)]
    return sorted(f for f in found if "timm" not in f.name)


ALL = [file for data in BUNDLES for file in files(data)]


@functools.cache
def read(file: Path) -> Config:
    return Config.fromfile(file)


def family(name: str) -> str:
    (found,) = [key for key, members in FAMILIES.items() if name in members]
    return found


@pytest.mark.parametrize("data", BUNDLES)
def test_every_direction_between_the_families_has_a_pair(data):
    pairs = [read(file).pair for file in files(data)]
    directions = {(family(pair.teacher), family(pair.student)) for pair in pairs}
    assert directions == {(a, b) for a in FAMILIES for b in FAMILIES if a != b}
    # A token student sees mixed images, a convolutional one plain images.
    for file in files(data):
        mixed = bool(read(file).data_preprocessor.get("batch_augments"))
        assert mixed == NETWORKS[read(file).pair.student].tokens


def test_both_data_sets_have_the_same_pairs():
    names = [{file.stem.removesuffix(f"_{data}") for file in files(data)} for data in BUNDLES]
    assert names[0] == names[1] and len(names[0]) == 9


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_a_pair_states_only_its_own(file):
    code = ast.parse(file.read_text()).body
    stated = {node.targets[0].id: node.value for node in code if isinstance(node, ast.Assign)}
    assert {"_base_", "pair"} <= set(stated) <= {"_base_", "pair", "data_preprocessor"}
    keys = {keyword.arg for keyword in stated["pair"].keywords}
    assert {"teacher", "student"} <= keys <= {"teacher", "student", "teacher_ckpt", "settings"}
    pair = read(file).pair
    assert pair.num_classes == (100 if "cifar100" in file.stem else 1000)
    assert pair.label_smoothing == 0.1
    assert pair.settings.kd == dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)
    names = [name.replace("_", "-") for name in (pair.teacher, pair.student)]
    assert file.stem.startswith("_".join(names))


# --- Mixer-S/16 ----------------------------------------------------------------------


def mixer(num_classes: int = 1000) -> nn.Module:
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return MODELS.build(classifier("mixer_s16", num_classes))


def mixer_parameters(width: int, depth: int, of_tokens: int, of_channels: int) -> int:
    """Count by the paper's table: two perceptrons and two norms a layer, patches of 16."""
    tokens = (224 // 16) ** 2
    layer = 2 * (2 * width)
    for inside, hidden in ((tokens, of_tokens), (width, of_channels)):
        layer += inside * hidden + hidden + hidden * inside + inside
    patches = 16 * 16 * 3 * width + width
    return patches + depth * layer + 2 * width + (width * 1000 + 1000)


def test_mixer_s16_has_the_papers_size():
    count = sum(p.numel() for p in mixer().parameters())
    assert count == mixer_parameters(512, 8, 256, 2048) == 18_528_264
    assert mixer_parameters(768, 12, 384, 3072) == 59_880_472  # Mixer-B/16's known count


@pytest.mark.parametrize("name", sorted({read(file).pair.student for file in ALL}))
def test_students_train_without_dropout_and_stochastic_depth(name):
    # As OFA-KD's recipe has it (drop 0, drop_path 0).
    init_default_scope("mmpretrain")
    model = MODELS.build(classifier(name, 10))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    rates += [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert set(rates) <= {0.0}


def test_mixer_s16s_taps_are_its_quarters_and_what_it_classifies():
    net, model = NETWORKS["mixer_s16"], mixer(10).eval()
    assert [tap for tap, _ in net.stages] == [f"backbone.layers.{layer}" for layer in (1, 3, 5, 7)]
    seen: dict[str, Tensor] = {}
    for name, width in (*net.stages, net.stem, net.final):

        def note(module, args, output, name=name, width=width):
            seen[name] = output if isinstance(output, Tensor) else output[0]
            assert seen[name].shape == (2, 14 * 14, width)

        model.get_submodule(name).register_forward_hook(note)
    model.head.fc.register_forward_pre_hook(lambda m, args: seen.__setitem__("pooled", args[0]))
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
    assert len(seen) == 7
    mean = sum(seen[net.final[0]][:, position] for position in range(196)) / 196
    torch.testing.assert_close(seen["pooled"], mean, rtol=1e-5, atol=1e-5)
    assert net.final_is_pooled and net.width == 512 and not net.class_tokens


# --- Published teachers --------------------------------------------------------------


@functools.cache
def published(address: str) -> dict:
    """Return mmpretrain's own record of a checkpoint."""
    folder = Path(mmpretrain.__file__).parent / ".mim" / "configs"
    records = [
        record
        for file in folder.glob("*/metafile.yml")
        for record in yaml.safe_load(file.read_text()).get("Models", [])
        if record.get("Weights") == address
    ]
    (record,) = records
    return record


IMAGENET = files("imagenet")


@pytest.mark.parametrize("file", IMAGENET, ids=lambda file: file.stem)
def test_the_teachers_weights_are_published_and_want_these_images(file):
    cfg = read(file)
    address, mean, std = cfg.pair.teacher_ckpt, *(cfg.data_preprocessor[k] for k in ("mean", "std"))
    assert cfg.data_preprocessor.to_rgb
    if address.startswith("torchvision://"):
        weights = torchvision.models.get_model_weights(address.partition("://")[2]).IMAGENET1K_V1
        wanted = weights.transforms()
        assert mean == pytest.approx([255 * m for m in wanted.mean], abs=0.01)
        assert std == pytest.approx([255 * s for s in wanted.std], abs=0.01)
        return
    record = published(address)
    (result,) = record["Results"]
    assert result["Dataset"] == "ImageNet-1k" and result["Metrics"]["Top 1 Accuracy"] > 75
    wanted = get_config(f"mmpretrain::{record['Config'].removeprefix('configs/')}")
    assert (mean, std) == (wanted.data_preprocessor.mean, wanted.data_preprocessor.std)
    assert wanted.data_preprocessor.to_rgb


@pytest.mark.parametrize("name", sorted({read(f).pair.teacher for f in IMAGENET} - {"resnet50"}))
def test_the_published_layout_is_the_teachers(name):
    init_default_scope("mmpretrain")
    address = read(IMAGENET[0]).teacher_weights[name]
    settings = get_config(f"mmpretrain::{published(address)['Config'].removeprefix('configs/')}")
    settings.model.pop("train_cfg", None)
    with torch.no_grad():
        weights = MODELS.build(settings.model).state_dict()
        layout, fitted = fit_weights(
            MODELS.build(classifier(name, 1000)), weights, name, setting=""
        )
    assert layout.startswith("mmpretrain")
    assert torch.equal(fitted["head.fc.weight"], list(weights.values())[-2])
    assert fitted["head.fc.weight"].shape == (1000, network(name).width)


def test_the_accuracies_that_the_list_of_teachers_states():
    text = (ROOT / "configs" / "_base_" / "imagenet_teachers.py").read_text()
    for name, address in read(IMAGENET[0]).teacher_weights.items():
        if name == "resnet50":
            continue
        before = text[: text.index(f"    {name}=")].splitlines()[-1]
        accuracy = published(address)["Results"][0]["Metrics"]["Top 1 Accuracy"]
        assert f"# {accuracy:.2f}" in before


# --- Augmentation --------------------------------------------------------------------


def test_the_augmentation_is_said_once_and_filled_with_each_data_sets_mean():
    for data, bundle in (("cifar100", "cifar100_224_vit"), ("imagenet", "imagenet_vit")):
        cfg = Config.fromfile(ROOT / "configs" / "_base_" / f"{bundle}.py")
        preprocessor = cfg.data_preprocessor
        order = slice(None, None, -1 if preprocessor.to_rgb else 1)  # of the images' channels
        mean, std = preprocessor.mean[order], preprocessor.std[order]
        steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        assert ("LoadImageFromFile" in steps) == (data == "imagenet")
        assert steps["RandAugment"].hparams.pad_val == [round(m) for m in mean]
        assert steps["RandomErasing"].fill_color == mean and steps["RandomErasing"].fill_std == std
        interpolations = {
            steps["RandomResizedCrop"].interpolation,
            steps["RandAugment"].hparams.interpolation,
        }
        assert interpolations == {"bilinear" if data == "cifar100" else "bicubic"}
        # rand-m9-mstd0.5-inc1, erasing 0.25, mixup 0.8, cutmix 1.0
        rand = steps["RandAugment"]
        assert (rand.magnitude_level, rand.magnitude_std, rand.policies) == (
            9,
            0.5,
            "timm_increasing",
        )
        assert (rand.num_policies, rand.total_level) == (2, 10)
        erasing = steps["RandomErasing"]
        assert (erasing.erase_prob, erasing.mode) == (0.25, "rand")
        assert (erasing.min_area_ratio, erasing.max_area_ratio) == (0.02, 1 / 3)
        alphas = [augment.alpha for augment in preprocessor.batch_augments.augments]
        assert alphas == [0.8, 1.0]


def test_what_the_augmentation_is_given_changes_it():
    given = {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "interpolation": "bilinear"}
    plain = strong_augmentation(**given)
    for name, other in (("mean", [9.0] * 3), ("std", [9.0] * 3), ("interpolation", "bicubic")):
        assert strong_augmentation(**{**given, name: other}) != plain
    assert strong_augmentation(**given) == plain
