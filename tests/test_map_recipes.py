"""Recipes of AB, FSP, FT, OFD and ReviewKD: what they record, weigh, refuse, and that they
train."""

from __future__ import annotations

import map_oracles as oracles
import pytest
import torch
import toy
from mmengine.registry import MODELS, init_default_scope
from tolerances import assert_close
from torch import nn

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import NETWORKS
from mskd_plugin.recipes import ab, distill, fsp, ft, ofd, reviewkd
from mskd_plugin.recipes.preact import preact_pairs

METHODS = {"ab": ab, "fsp": fsp, "ft": ft, "ofd": ofd, "reviewkd": reviewkd}


def base(teacher="resnet14", student="resnet8", **settings):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=toy.CLASSES, settings=settings),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
    )


def build(base, *methods):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return MODELS.build(distill(base, *methods))


def phases(model):
    return (1, 2) if hasattr(model, "enter_phase") else (None,)


def distillation(model, batch):
    """The distillation losses of all phases, in the order of the phases."""
    model.train()
    found = {}
    for phase in phases(model):
        if phase:
            model.enter_phase(phase)
        found |= {n: v for n, v in model(**batch, mode="loss").items() if "distill.loss" in n}
    return found


def lists(value):
    return value.detach().double().tolist()


#: Pairs with unlike widths, sizes and numbers of stages, and one of ImageNet's networks.
CROSS = [
    ("wrn_40_2", "wrn_16_2"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "vgg8"),
    ("resnet32x4", "ShuffleV1"),
    ("resnet32x4", "ShuffleV2"),
    ("ResNet18", "resnet8"),
    ("resnet8", "ResNet18"),
    ("resnet50", "mobilenet_v1"),
]


@pytest.mark.parametrize("pair", CROSS, ids="->".join)
@pytest.mark.parametrize("name", ["ab", "ft", "ofd", "reviewkd"])
def test_networks_of_unlike_architecture(name, pair):
    given = base(*pair)
    model = build(given, METHODS[name](given))
    losses = distillation(model, toy.batch(2, side=64 if "mobilenet_v1" in pair else 32))
    stages = min(len(NETWORKS[network].stages) for network in pair)
    assert len(losses) == {"ab": stages, "ofd": stages, "ft": 2, "reviewkd": 1}[name]
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


@pytest.mark.parametrize("teacher", ["resnet14", "ResNet18"])
@pytest.mark.parametrize("name", ["ofd", "reviewkd"])
def test_steps_lower_the_loss_of_their_batch(name, teacher):
    given = base(teacher)
    model = build(given, METHODS[name](given))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, logged = model.parse_losses(model(**toy.batch(), mode="loss"))
        loss.backward()
        optimizer.step()
        values.append(sum(v for n, v in logged.items() if n.startswith("distill")))
    assert values[-1] < values[0]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(n.startswith("distiller") for n in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- each method's loss from the images, against the loops --------------------------------------


def recorded(model, sources, batch):
    """What modules give, by the test's own hooks, in float64."""
    found, handles = {}, []
    for name, source in sources.items():
        module = model.get_submodule(source)
        note = lambda _, __, out, name=name: found.__setitem__(name, out)  # noqa: E731
        handles.append(module.register_forward_hook(note))
    model(**batch, mode="tensor")
    for handle in handles:
        handle.remove()
    return {name: lists(value) for name, value in found.items()}


def set_up(name, **settings):
    """A small model in float64, and its networks' maps before and after the last ReLU."""
    given = base("resnet8", "resnet8")
    for role in ("teacher", "student"):
        given["pair"][role] = "resnet8"
    model = build(given, METHODS[name](given, **settings)).double()
    for parameter in model.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = toy.batch(2, side=8)
    batch["inputs"] = batch["inputs"].double()
    preacts = {f"preact{i}": f"backbone.layer{i}.0.preact" for i in (1, 2, 3)}
    maps = {"stem": "backbone.relu", **{f"stage{i}": f"backbone.layer{i}" for i in (1, 2, 3)}}
    model.train()
    student = recorded(model.student, preacts | maps, batch)
    teacher = recorded(model.teacher, preacts | maps, batch)
    return model, batch, student, teacher


def test_ab_weighs_its_stages():
    model, batch, student, teacher = set_up("ab", loss_weight=2.0)
    losses = distillation(model, batch)
    for i, factor in ((1, 0.25), (2, 0.5), (3, 1.0)):
        term = oracles.activation_boundary(student[f"preact{i}"], teacher[f"preact{i}"])
        assert_close(losses[f"distill.loss_ab_stage{i}"], 2 * factor * term)
    assert not model.distiller.connectors  # equal channels and sizes


def test_fsp_begins_at_the_stem():
    model, batch, student, teacher = set_up("fsp")
    losses = distillation(model, batch)
    names = ["stem", "stage1", "stage2", "stage3"]
    for bottom, top in zip(names, names[1:]):
        term = oracles.fsp(student[bottom], student[top], teacher[bottom], teacher[top])
        assert_close(losses[f"distill.loss_fsp_{top}"], term)
    assert len(losses) == 3


def test_ofd_weighs_its_stages_and_reads_the_teachers_norms():
    model, batch, student, teacher = set_up("ofd")
    losses = distillation(model, batch)
    for i, factor in ((1, 0.25), (2, 0.5), (3, 1.0)):
        connector = model.distiller.connectors[f"ofd_stage{i}_student"].conv_module
        maps = oracles.convolved(student[f"preact{i}"], lists(connector.conv.weight))
        maps = oracles.batch_normalized(maps, lists(connector.bn.weight), lists(connector.bn.bias))
        norm = model.teacher.get_submodule(f"backbone.layer{i}.0.bn2")
        term = oracles.overhaul(maps, teacher[f"preact{i}"], lists(norm.weight), lists(norm.bias))
        assert_close(losses[f"distill.loss_ofd_stage{i}"], 1e-3 * factor * term)


@pytest.mark.parametrize("student_preact", [False, True])
def test_reviewkd_takes_the_teachers_maps_before_the_relu(student_preact):
    settings = dict(student_preact=student_preact, max_mid_channels=4, loss_weight=0.5)
    model, batch, student, teacher = set_up("reviewkd", **settings)
    taken = []
    for maps, kind in ((student, "preact" if student_preact else "stage"), (teacher, "preact")):
        pooled = oracles.pooled(maps["stage3"], 1, 1)
        taken.append([maps[f"{kind}{i}"] for i in (1, 2, 3)] + [pooled])
    loss = model.distiller.distill_losses["loss_reviewkd"]
    states = [{n: lists(v) for n, v in f.state_dict().items()} for f in loss.chain.fusions]
    losses = distillation(model, batch)
    assert_close(losses["distill.loss_reviewkd"], 0.5 * oracles.review(*taken, states))


def test_ft_of_both_phases():
    model, batch, student, teacher = set_up("ft", factor_ratio=0.05)
    encoders = {
        name: {n.removeprefix("encoder."): lists(v) for n, v in module.state_dict().items()}
        for name, module in model.distiller.connectors.items()
    }
    factor = oracles.encoder(teacher["stage3"], encoders["ft_paraphraser"], normalized=False)
    decoder = model.distiller.distill_losses["loss_ft_paraphraser"].decoder
    rebuilt = oracles.decoder(factor, {n: lists(v) for n, v in decoder.state_dict().items()})
    translated = oracles.encoder(student["stage3"], encoders["ft_translator"], normalized=True)
    losses = distillation(model, batch)
    assert_close(
        losses["distill.loss_ft_paraphraser"], oracles.mean_squared(rebuilt, teacher["stage3"])
    )
    assert_close(losses["distill.loss_ft"], 200 * oracles.factor_transfer(translated, factor))


# --- settings ----------------------------------------------------------------------------------


def test_the_published_settings():
    given = base("resnet32x4", "resnet8x4")
    review = reviewkd(given)
    assert review["loss_warmup"] == {"loss_reviewkd": 20}
    assert "loss_warmup" not in reviewkd(given, warmup=0)
    cfg = review["distill_losses"]["loss_reviewkd"]
    assert (cfg["loss_weight"], cfg["in_channels"]) == (5.0, (64, 128, 256, 256))
    assert [c["loss_weight"] for c in ofd(given)["distill_losses"].values()] == [
        0.25e-3,
        0.5e-3,
        1e-3,
    ]
    assert ft(given)["distill_losses"]["loss_ft"]["loss_weight"] == 200
    assert ft(given)["connectors"]["ft_paraphraser"]["out_channel"] == 128
    assert ft(given)["init_lr"] == 0.01
    for method in (ab, fsp, ft):
        assert method(given)["phases"]["init_epochs"] == 30
    review = reviewkd(base("ResNet50", "MobileNetV2"))["distill_losses"]["loss_reviewkd"]
    assert review["in_channels"] == (12, 16, 48, 160, 1280)
    assert review["out_channels"] == (256, 512, 1024, 2048, 2048)


def test_a_pair_may_state_its_own_settings():
    own = dict(ft=dict(init_lr=0.05), reviewkd=dict(loss_weight=8.0, warmup=1))
    given = base("resnet32x4", "ShuffleV2", **own)
    assert ft(given)["init_lr"] == 0.05
    cfg = distill(given, reviewkd(given, loss_weight=7.0))
    assert cfg["loss_warmup"] == {"loss_reviewkd": 1}
    assert "loss_warmup" not in distill(given, reviewkd(given, warmup=0))
    assert cfg["distiller"]["distill_losses"]["loss_reviewkd"]["loss_weight"] == 7.0


@pytest.mark.parametrize(
    ("teacher", "student", "connectors"),
    [
        ("resnet32x4", "ShuffleV1", ["double"] * 3),
        ("vgg13", "MobileNetV2", ["none", "none", "none", "double"]),
        ("ResNet50", "vgg8", ["double"] * 3 + ["none"]),
        ("vgg13", "vgg8", []),
        ("wrn_40_2", "wrn_40_1", ["none"] * 3),
    ],
)
def test_abs_connectors_follow_from_the_maps(teacher, student, connectors):
    found = ab(base(teacher, student))["connectors"].values()
    assert [connector["resize"] for connector in found] == connectors


def test_the_preact_taps_feed_the_relu():
    """What is recorded before the ReLU is, through a ReLU, what is recorded after it."""
    given = base("resnet34", "resnet18")
    model = build(given, reviewkd(given, student_preact=True)).eval()
    distiller = model.distiller
    batch = toy.batch(2, side=64)
    with torch.no_grad(), distiller.student_recorders, distiller.teacher_recorders:
        maps = model.student.backbone(batch["inputs"])
        model.teacher(**batch, mode="tensor")
    recorder = distiller.student_recorders.get_recorder("stage4_preact")
    assert_close(nn.functional.relu(recorder.get_record_data()), maps[-1], torch.float32)
    assert len(preact_pairs(given, "ReviewKD")) == 4


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pair", "settings", "match"),
    [
        (
            "fsp",
            ("wrn_40_2", "wrn_40_1"),
            {},
            r"\[16, 16, 32, 64\] in wrn_40_1 and \[16, 32, 64, 128\] in wrn_40_2",
        ),
        ("fsp", ("ResNet18", "resnet8"), {}, "equal channels.*resnet8 and .* in ResNet18"),
        (
            "ofd",
            ("ShuffleV2", "resnet8"),
            {},
            "`pair.teacher`.*margins.*'ShuffleV2' in ShuffleV2 to resnet8",
        ),
        ("ft", ("resnet14", "resnet8"), dict(factor_ratio=0.001), "`factor_ratio`.*64 channels"),
        ("ab", ("resnet8", "resnet18"), {}, "one whose maps a regressor brings together"),
        ("ofd", ("resnet14", "resnet8"), dict(weight=1), r"`ofd\(weight=.* 'loss_weight'"),
    ],
)
def test_pairs_and_settings_that_cannot_work(name, pair, settings, match):
    with pytest.raises(SettingError, match=match):
        METHODS[name](base(*pair), **settings)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_networks_without_known_maps(role, monkeypatch):
    import dataclasses

    blank = dataclasses.replace(NETWORKS["resnet8"], preact_stages=())
    monkeypatch.setitem(NETWORKS, "blank", blank)
    for name in ("ab", "ofd", "reviewkd"):
        with pytest.raises(SettingError, match=f"`pair.{role}`.*before the ReLU.*'blank'"):
            METHODS[name](base(**{role: "blank"}))
