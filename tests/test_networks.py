"""The table of networks: published counts and maps, a second forward from published names,
recorders."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from mmpretrain.registry import MODELS
from network_oracles import count_mega_macs, forward, published_names, randomize
from torch import Tensor, nn

import mskd_plugin  # noqa: F401  (registers backbones)
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import NETWORKS, TokenPooling, classifier, network

# Of the benchmark's own code with 100 classes: parameters, state_dict keys, multiply-adds in
# millions, then channels@side of the stem's and the stages' maps, and the channels of the pooled
# feature.
_PLAIN, _TIMES_4 = "16@32 16@32 32@16 64@8 64", "32@32 64@32 128@16 256@8 256"
_VGG, _WIDE = "64@32 128@16 256@8 512@4 512@4 512", "16@32 32@32 64@16 128@8 128"
CIFAR = {
    "resnet8": (83_892, 56, 12.51, _PLAIN),
    "resnet14": (181_108, 92, 26.66, _PLAIN),
    "resnet20": (278_324, 128, 40.82, _PLAIN),
    "resnet32": (472_756, 200, 69.13, _PLAIN),
    "resnet44": (667_188, 272, 97.44, _PLAIN),
    "resnet56": (861_620, 344, 125.75, _PLAIN),
    "resnet110": (1_736_564, 668, 253.16, _PLAIN),
    "resnet8x4": (1_233_540, 62, 177.07, _TIMES_4),
    "resnet32x4": (7_433_860, 206, 1083.04, _TIMES_4),
    "ResNet50": (23_705_252, 320, 1298.01, "64@32 256@32 512@16 1024@8 2048@4 2048"),
    "ResNet18": (11_220_132, 122, 555.47, "64@32 64@32 128@16 256@8 512@4 512"),
    "wrn_16_1": (180_916, 82, 26.66, _PLAIN),
    "wrn_16_2": (703_284, 83, 101.12, _WIDE),
    "wrn_40_1": (569_780, 226, 83.29, _PLAIN),
    "wrn_40_2": (2_255_156, 227, 327.61, _WIDE),
    "vgg8": (3_965_028, 37, 96.19, _VGG),
    "vgg11": (9_277_284, 58, 209.44, _VGG),
    "vgg13": (9_462_180, 72, 284.94, _VGG),
    "vgg16": (14_774_436, 93, 398.18, _VGG),
    "vgg19": (20_086_692, 114, 511.43, _VGG),
    "MobileNetV2": (812_836, 320, 6.52, "16@16 12@16 16@8 48@4 160@2 1280"),
    "ShuffleV1": (949_258, 296, 38.69, "24@32 240@16 480@8 960@4 960"),
    "ShuffleV2": (1_355_528, 338, 44.50, "24@32 116@16 232@8 464@4 1024"),
}
# Of torchvision with 1000 classes, and of mdistiller.
IMAGENET = {
    "resnet18": (11_689_512, 122, 1814, "64@112 64@56 128@28 256@14 512@7 512"),
    "resnet34": (21_797_672, 218, 3664, "64@112 64@56 128@28 256@14 512@7 512"),
    "resnet50": (25_557_032, 320, 4089, "64@112 256@56 512@28 1024@14 2048@7 2048"),
    "mobilenet_v1": (4_231_976, 164, 569, "32@112 128@56 256@28 512@14 1024@7 1024"),
    "mobilenet_v2": (3_504_872, 314, 301, "32@112 24@56 32@28 96@14 320@7 1280"),
}
COUNTS = CIFAR | IMAGENET
# One of each family, as small as the family goes.
FAMILIES = ["resnet14", "resnet8x4", "ResNet18", "ResNet50", "wrn_16_1", "wrn_16_2", "vgg8",
            "vgg11", "MobileNetV2", "ShuffleV1", "ShuffleV2", "resnet18", "resnet50",
            "mobilenet_v1", "mobilenet_v2"]  # fmt: skip


def build(name: str) -> nn.Module:
    return MODELS.build(classifier(name, NETWORKS[name].num_classes))


def initialized(recorders: dict[str, dict], model: nn.Module) -> Any:
    from mmrazor.models.task_modules import RecorderManager  # after mskd_plugin, which mends it

    manager = RecorderManager(recorders)
    manager.initialize(model)
    return manager


def recorders_of(name: str, model: nn.Module) -> Any:
    net = NETWORKS[name]
    taps = {f"stage{i}": source for i, (source, _) in enumerate(net.stages)}
    taps |= {"stem": net.stem[0], "final": net.final[0]}
    recorders = {k: {"type": "ModuleOutputs", "source": v} for k, v in taps.items()}
    for i, (source, _) in enumerate(net.preact_stages):
        recorders[f"preact{i}"] = {"type": "PreActivation", "source": source}
    recorders["pooled"] = {"type": "ModuleInputs", "source": "head.fc"}
    return initialized(recorders, model)


def record(name: str, model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    manager = recorders_of(name, model)
    with manager:
        logits = model(images)
    records = {k: r.get_record_data() for k, r in manager.recorders.items()}
    records["pooled"] = records["pooled"][0]
    return records, logits


def stages(records: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [value for key, value in records.items() if re.fullmatch(rf"{kind}\d", key)]


def images_for(name: str, count: int = 2, seed: int = 1, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = side if name in CIFAR else 2 * side
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=generator)


def test_the_table_holds_the_benchmarks_networks() -> None:
    of_mmpretrain = {"swin_t", "deit_t", "vit_s", "mixer_s16", "mixer_b16", "convnext_t"}
    assert set(NETWORKS) == set(COUNTS) | of_mmpretrain


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_maps_are_the_published_ones(name: str) -> None:
    parameters, keys, mega_macs, maps = COUNTS[name]
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys

    model.to("meta").eval()
    side = 32 if name in CIFAR else 224
    images = torch.empty(1, 3, side, side, device="meta")
    tolerance = 0.006 if name in CIFAR else 0.5
    assert count_mega_macs(model, images) == pytest.approx(mega_macs, abs=tolerance)

    net, (records, _) = NETWORKS[name], record(name, model, images)
    *sizes, pooled = maps.split()
    expected = [tuple(map(int, size.split("@"))) for size in sizes]

    def sizes_of(*values: Tensor) -> list[tuple[int, int]]:
        assert all(v.shape[0] == 1 and v.shape[2] == v.shape[3] for v in values)
        return [(v.shape[1], v.shape[2]) for v in values]

    assert sizes_of(records["stem"], *stages(records, "stage")) == expected
    assert sizes_of(*stages(records, "preact")) == expected[1:]
    assert [net.stem[1], *(width for _, width in net.stages)] == [width for width, _ in expected]
    assert [width for _, width in net.preact_stages] == [width for width, _ in expected[1:]]
    assert records["pooled"].shape == (1, int(pooled))
    assert model.head.fc.in_features == net.width == net.final[1] == int(pooled)
    assert sizes_of(records["final"]) == [(int(pooled), expected[-1][1])]


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("resnet18", "resnet50", "mobilenet_v2")]
)
def test_forward_equals_a_function_of_the_published_names(name: str) -> None:
    model = build(name).double().eval()
    randomize(model, seed=0)
    images = images_for(name)
    with torch.no_grad():
        records, logits = record(name, model, images)
        expected, unused = forward(name, published_names(name, model.state_dict()), images)
    assert not unused
    close = {"rtol": 1e-11, "atol": 1e-11 * logits.abs().max().item()}
    torch.testing.assert_close(logits, expected.logits, **close)
    torch.testing.assert_close(stages(records, "stage"), expected.after, **close)
    torch.testing.assert_close(stages(records, "preact"), expected.before, **close)
    assert logits.std() > 0.01


def test_mobilenet_v2_of_imagenet_is_torchvisions() -> None:
    model, reference = build("mobilenet_v2"), torchvision.models.mobilenet_v2().double().eval()
    randomize(reference, seed=3)
    # Both define their layers in the order of the forward.
    weights = zip(model.state_dict(), reference.state_dict().values(), strict=True)
    model.double().eval().load_state_dict(dict(weights))
    images = images_for("mobilenet_v2")
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_attributes_of_a_network_say(name: str) -> None:
    net, model = NETWORKS[name], build(name)
    randomize(model, seed=2)
    records, _ = record(name, model.train(), images_for(name).float())
    # The pooled feature is the mean of the map that is said to be the final one.
    torch.testing.assert_close(records["final"].mean((2, 3)), records["pooled"])
    raw = name.startswith("wrn") or name in ("MobileNetV2", "mobilenet_v2")
    for stage, preact in zip(stages(records, "stage"), stages(records, "preact")):
        assert preact.min() < 0
        if raw:
            assert stage.min() < 0
        else:
            assert torch.equal(stage, preact.clamp(min=0))
    if name in ("MobileNetV2", "mobilenet_v2"):
        assert net.stages == net.preact_stages
    if name.startswith("wrn"):
        # In train mode, the sums normalised by the batch, scale and shift are the maps before the
        # ReLU.
        for index, norm in enumerate(net.preact_norms):
            layer, total = model.get_submodule(norm), records[f"stage{index}"]
            normed = nn.functional.batch_norm(total, None, None, layer.weight, layer.bias, True)
            torch.testing.assert_close(records[f"preact{index}"], normed)
    assert records["stem"].min() < 0 if name.startswith("wrn") else records["stem"].min() == 0
    for norm, (_, channels) in zip(net.preact_norms, net.preact_stages):
        assert model.get_submodule(norm).weight.shape == (channels,)
    assert len(net.preact_norms) == (0 if name == "ShuffleV2" else len(net.stages))


@pytest.mark.parametrize("name", ["ResNet18", "resnet50"])
def test_a_map_before_a_relu_in_place_carries_the_gradient(name: str) -> None:
    model = build(name).eval()
    records, _ = record(name, model, images_for(name, count=1, side=16).float())
    last = len(NETWORKS[name].stages) - 1
    records[f"preact{last}"].sum().backward()
    norm = model.get_submodule(NETWORKS[name].preact_norms[last])
    positions = records[f"preact{last}"][0, 0].numel()
    # Each position adds bias to its channel, whatever the ReLU behind it lets through.
    assert torch.equal(norm.bias.grad, torch.full_like(norm.bias, positions))


def test_a_map_before_a_relu_is_kept_while_recording_alone() -> None:
    model = build("ResNet18").eval()
    manager = initialized(
        {"x": {"type": "PreActivation", "source": "backbone.layer4.1.preact"}}, model
    )
    with manager:
        model(images_for("ResNet18", count=1, side=16).float())
    kept = manager.recorders["x"].get_record_data()
    model(images_for("ResNet18", count=1, seed=2, side=16).float())
    assert manager.recorders["x"].get_record_data() is kept


def test_recorders_that_cannot_work() -> None:
    model = build("ResNet18")
    for source in ("backbone.layer4.1.relu.preact", "backbone.layer9", "backbone.layer4.preact"):
        recorder = {"x": {"type": "PreActivation", "source": source}}
        with pytest.raises(SettingError, match=f"`source` to be a module .*{source}"):
            initialized(recorder, model)
    # MMRazor's own recorder does not take the place of this one in silence.
    plain = {"x": {"type": "ModuleOutputs", "source": "backbone.layer4.1.preact"}}
    with pytest.raises(AssertionError, match="is not in the model"):
        initialized(plain, model)


@pytest.mark.parametrize("name", ["resnet32x4", "ResNet18", "wrn_40_2", "vgg13", "MobileNetV2"])
def test_initialisation_is_the_benchmarks(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    model.init_weights()
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.weight.numel() > 10_000:
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                std = (2 / fan_out) ** 0.5
                assert module.weight.std().item() == pytest.approx(std, rel=0.05), path
            assert module.bias is None or (module.bias == 0).all(), path
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), path
    fc = model.head.fc
    if name in ("vgg13", "MobileNetV2"):
        assert fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    else:  # torch's own: uniform within 1 / sqrt(inputs)
        assert fc.weight.abs().max().item() == pytest.approx(fc.in_features**-0.5, rel=0.01)
    assert (fc.bias == 0).all() == (name in ("wrn_40_2", "vgg13", "MobileNetV2"))


def test_classifier_config() -> None:
    config = classifier("resnet20", 10, loss_weight=0.1, cal_acc=True)
    assert config["_scope_"] == "mmpretrain"
    model = MODELS.build(config)
    assert model.head.loss_module.loss_weight == 0.1
    assert model.head.cal_acc and model.head.topk == (1, 5)
    assert MODELS.build(classifier("resnet8", 4)).head.topk == (1,)
    assert MODELS.build(classifier("resnet8", 5)).head.topk == (1, 5)
    # Building uses up a config; the table stays as it is.
    assert NETWORKS["resnet20"].backbone["type"] == "CIFARResNet"
    assert classifier("resnet20", 10)["backbone"] is not NETWORKS["resnet20"].backbone
    assert classifier("resnet20", 10)["neck"] is not NETWORKS["resnet20"].neck
    assert classifier("vgg8", 10)["head"]["init_cfg"] is not NETWORKS["vgg8"].head_init


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet32x3", "'resnet32x4'"), ("ResNet-34", "'resnet34'"),
     ("ResNet-50", "'ResNet50' or 'resnet50'"), ("wrn-40-2", "'wrn_40_2'"),
     ("mobilenetv2", "'MobileNetV2' or 'mobilenet_v2'"), ("mobilenetv1", "'mobilenet_v1'")],
)  # fmt: skip
def test_unknown_names(name: str, near: str) -> None:
    message = rf"one of resnet8, .*but got '{name}'\. Did you mean {near}\?"
    with pytest.raises(SettingError, match=message):
        network(name)


@pytest.mark.parametrize(
    ("name", "own"),
    [("ShuffleNetV1", "ShuffleV1"), ("ShuffleNetV2", "ShuffleV2"), ("MobileNetV1", "mobilenet_v1")],
)
def test_names_of_papers_tables(name: str, own: str) -> None:
    assert network(name) is NETWORKS[own]
    assert classifier(name, 10) == classifier(own, 10)


def test_a_name_that_is_near_to_none() -> None:
    with pytest.raises(SettingError, match=r"convnext_t, but got 'bagnet'\.$"):
        classifier("bagnet", 10)


def test_class_counts_that_cannot_work() -> None:
    for count in (0, -1, 2.0, True, "10"):
        with pytest.raises(
            SettingError, match="Expected `num_classes` to be a whole number of at least 1"
        ):
            classifier("resnet8", count)


@pytest.mark.parametrize("class_tokens", [0, 2])
@pytest.mark.parametrize("average", [True, False])
def test_token_pooling_is_an_average_of_positions_or_the_first_token(
    class_tokens: int, average: bool
) -> None:
    if not average and not class_tokens:
        with pytest.raises(SettingError, match="`class_tokens` to be at least 1"):
            TokenPooling(class_tokens, average)
        return
    tokens = torch.randn(3, 7, 5, dtype=torch.float64)
    (pooled,) = TokenPooling(class_tokens, average)((tokens[:, :1], tokens))
    expected = tokens[:, 0]
    if average:
        expected = sum(tokens[:, i] for i in range(class_tokens, 7)) / (7 - class_tokens)
    torch.testing.assert_close(pooled, expected)


def test_token_pooling_refuses_what_it_cannot_pool() -> None:
    for wrong in (-1, True, "1"):
        with pytest.raises(SettingError, match="`class_tokens` to be a whole number of at least 0"):
            TokenPooling(wrong)
    for wrong in (torch.zeros(2, 4, 3, 3), torch.zeros(2, 1, 4)):
        with pytest.raises(SettingError, match="more than 1 tokens"):
            TokenPooling(1)((wrong,))
