"""Recipes of the logit baselines: what they put into a config, what they refuse, and that they
train."""

from __future__ import annotations

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mskd_plugin import recipes
from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import distill, mskd

#: The losses of each method for a student of three stages, and its warm-up.
METHODS = {
    "kd": (["loss_kd"], None),
    "ls_kd": (["loss_ls_kd"], None),
    "dist": (["loss_dist"], None),
    "wsld": (["loss_wsld"], None),
    "dkd": (["loss_dkd"], 20),
    "nkd": (["loss_nkd"], None),
    "mlkd": (["loss_mlkd"], None),
    "sdd_kd": (["loss_sdd_kd"], None),
    "sdd_dkd": (["loss_sdd_dkd"], 20),
    "sdd_nkd": (["loss_sdd_nkd"], 20),
    "ofa": (["loss_ofa", *(f"loss_ofa_stage{k}" for k in (1, 2, 3))], None),
}


def base(teacher="resnet20", student="resnet8", **settings):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=10, settings=settings),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
    )


def loss_cfg(method, base_cfg, **settings):
    cfgs = getattr(recipes, method)(base_cfg, **settings)["distill_losses"]
    return next(iter(cfgs.values()))


def build(model):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return MODELS.build(model)


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_steps_that_lower_their_loss(method):
    names, warmup = METHODS[method]
    model = build(distill(base(), getattr(recipes, method)(base()), ce_weight=0.1)).train()
    assert list(model.distiller.distill_losses) == names
    assert model.loss_warmup == ({name: warmup for name in names} if warmup else {})
    model.teacher.head.fc.weight.data.mul_(20)  # a teacher that is sure of its answers
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.005)
    teacher = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    values = []
    for _ in range(8):
        losses = model(**toy.batch(8), mode="loss")
        values.append(sum(losses[f"distill.{name}"].item() for name in names))
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert all(p.grad is not None for p in parameters)
    # Some are cross-entropies with the teacher, which the teacher's entropy is most of.
    least = 0.995 if method in ("wsld", "nkd", "sdd_nkd", "ofa") else 0.97
    assert values[-1] < least * values[0]
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, teacher[name])


@pytest.mark.parametrize("method", ["kd", "dist", "wsld"])
def test_mmrazors_losses_get_the_logits_of_both_networks_in_full_precision(method):
    model = build(distill(base(), getattr(recipes, method)(base())))
    (loss,), given = model.distiller.distill_losses.values(), {}
    loss.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(**toy.batch(), mode="loss")
    logits = [value for value in given.values() if value.is_floating_point()]
    assert [value.dtype for value in logits] == [torch.float32] * 2


@pytest.mark.parametrize("method", METHODS)
def test_methods_join_with_each_other_and_with_mskd(method):
    other = "dkd" if method == "sdd_kd" else "sdd_kd"
    both = getattr(recipes, method)(base()), getattr(recipes, other)(base())
    model = build(distill(base(), *both, mskd(base())))
    losses = model(**toy.batch(), mode="loss")
    alone = build(distill(base(), both[0]))
    expected = alone(**toy.batch(), mode="loss")
    for name in METHODS[method][0]:
        if method != "ofa":  # its branches are drawn anew
            torch.testing.assert_close(losses[f"distill.{name}"], expected[f"distill.{name}"])
    assert {f"distill.{name}" for name in METHODS[method][0]} <= set(losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_states_what_differs_and_the_call_has_the_last_word(method):
    setting = "loss_weight" if method != "ofa" else "logits_weight"
    changed = base(**{method: {setting: 0.5}})
    assert loss_cfg(method, changed)["loss_weight"] == 0.5
    assert loss_cfg(method, changed, **{setting: 0.25})["loss_weight"] == 0.25
    with pytest.raises(SettingError, match=rf"`{method}\(wieght=...\)` .*{setting}.* got 1.0"):
        loss_cfg(method, base(), wieght=1.0)


def test_sdd_inherits_what_the_pair_states_for_kd_and_dkd():
    pair = base(
        kd=dict(temperature=1.0, loss_weight=0.5),
        dkd=dict(temperature=1.0, beta=2.0, warmup=1),
        sdd_dkd=dict(beta=3.0),
    )
    of_kd, of_dkd = loss_cfg("sdd_kd", pair), loss_cfg("sdd_dkd", pair)
    assert (of_kd["temperature"], of_kd["loss_weight"]) == (1.0, 0.5)
    assert (of_dkd["temperature"], of_dkd["beta"], of_dkd["alpha"]) == (1.0, 3.0, 1.0)
    assert recipes.sdd_dkd(pair)["loss_warmup"] == {"loss_sdd_dkd": 1}
    assert "loss_warmup" not in recipes.sdd_dkd(pair, warmup=0)
    of_nkd = loss_cfg("sdd_nkd", pair)  # of DKD's settings those of its name, of SD-DKD's none
    assert (of_nkd["temperature"], of_nkd["gamma"]) == (1.0, 2.0)
    assert recipes.sdd_nkd(pair)["loss_warmup"] == {"loss_sdd_nkd": 1}
    given = recipes.sdd_nkd(pair, temperature=2.0, gamma=3.0, loss_weight=0.5, warmup=0)
    assert "loss_warmup" not in given
    loss = given["distill_losses"]["loss_sdd_nkd"]
    assert (loss["temperature"], loss["gamma"], loss["loss_weight"]) == (2.0, 3.0, 0.5)


def test_sdd_takes_the_scales_that_both_last_maps_have():
    assert loss_cfg("sdd_kd", base())["scales"] == (1, 2, 4)
    small = base("vgg13", "MobileNetV2")  # 4 x 4 and 2 x 2
    assert loss_cfg("sdd_kd", small)["scales"] == (1, 2)
    with pytest.raises(
        SettingError, match=r"at most 2.*\(2, 2\) of MobileNetV2.*\(4, 4\) of vgg13"
    ):
        recipes.sdd_kd(small, scales=(1, 2, 4))


@pytest.mark.parametrize("student", ["MobileNetV2", "ShuffleV2", "wrn_16_2"])
def test_sdds_global_region_is_what_the_classifier_reads(student):
    """With one scale SD-KD is KD, whatever layers stand between the last stage and the pooling."""
    one = dict(scales=(1,), loss_weight=0.9)
    pair = base("resnet20", student)
    model = build(distill(pair, recipes.kd(pair), recipes.sdd_kd(pair, **one))).eval()
    losses = model(**toy.batch(), mode="loss")
    torch.testing.assert_close(losses["distill.loss_sdd_kd"], losses["distill.loss_kd"])


def test_the_weight_of_the_cross_entropy_comes_with_the_method():
    asked = {"kd": 0.1, "ls_kd": 0.1, "mlkd": 0.2, "sdd_kd": 0.1}
    for method in METHODS:
        head = distill(base(), getattr(recipes, method)(base()))["architecture"]["head"]
        assert head["loss"]["loss_weight"] == asked.get(method, 1.0)
    imagenet = base(kd=dict(ce_weight=0.5))
    assert recipes.sdd_kd(imagenet)["ce_weight"] == 0.5
    assert recipes.sdd_kd(imagenet, ce_weight=0.25)["ce_weight"] == 0.25


def test_wsld_is_told_the_number_of_classes():
    assert loss_cfg("wsld", base())["num_classes"] == 10


def test_ofas_branches_halve_the_map_to_the_last_stages_size():
    parts = recipes.ofa(base("resnet32x4"), exponent=(1.1, 1.2, 1.3, 1.4))
    connectors = parts["connectors"]
    assert [c["halvings"] for c in connectors.values()] == [2, 1, 0]
    assert {c["hidden_channels"] for c in connectors.values()} == {256}
    assert [c["in_channels"] for c in connectors.values()] == [16, 32, 64]
    exponents = {name: cfg["exponent"] for name, cfg in parts["distill_losses"].items()}
    assert exponents == {
        "loss_ofa": 1.4,
        "loss_ofa_stage1": 1.1,
        "loss_ofa_stage2": 1.2,
        "loss_ofa_stage3": 1.3,
    }
    chosen = recipes.ofa(base(), stages=(-1,), loss_weight=0.5)["distill_losses"]
    assert {name: cfg["loss_weight"] for name, cfg in chosen.items()} == {
        "loss_ofa": 1.0,
        "loss_ofa_stage3": 0.5,
    }


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(stages=(-4,)), "stages.*-3 to -1 for resnet8.*-4"),
        (dict(exponent=(1.0, 2.0)), r"exponent.*4: one per stage.*\(1.0, 2.0\)"),
    ],
)
def test_ofa_refuses(settings, match):
    with pytest.raises(SettingError, match=match):
        recipes.ofa(base(), **settings)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_puts_into_a_config_can_be_written(method, tmp_path):
    cfg = Config(dict(model=distill(base(), getattr(recipes, method)(base()))))
    cfg.dump(tmp_path / "config.py")
    assert Config.fromfile(tmp_path / "config.py").model == cfg.model
