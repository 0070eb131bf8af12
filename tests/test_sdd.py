"""Scale-decoupled distillation against naive loops, and OFA's branch against plain torch
operations."""

from __future__ import annotations

import pytest
import torch
from logit_oracles import dkd_of_sample, kd_of_sample, nkd_of_sample, sdd, sdd_regions
from mmrazor.registry import MODELS
from seeded import random
from tolerances import assert_close
from torch.nn import functional as F

from mskd_plugin.connectors import OFABranch
from mskd_plugin.connectors.ofa import HalvingConv
from mskd_plugin.errors import SettingError
from mskd_plugin.losses import ScaleDecoupledKDLoss
from mskd_plugin.losses.sdd import TERMS, regions_of_grid

OF_SAMPLE = {"kd": kd_of_sample, "dkd": dkd_of_sample, "nkd": nkd_of_sample}
SIZE, CLASSES = 4, 3
LABELS = torch.tensor([0, 1, 2, 1])
SIDES = ("student", "teacher")


def case(student=(5, 8, 8), teacher=(6, 8, 8), dtype=torch.float64, size=SIZE):
    """Maps of both sides that feed classifiers of their own."""
    inputs = {"labels": LABELS[:size]}
    for seed, (side, shape) in enumerate(zip(SIDES, (student, teacher), strict=True)):
        inputs[f"{side}_feature"] = random(size, *shape, seed=seed, dtype=dtype)
        inputs[f"{side}_weight"] = 2 * random(CLASSES, shape[0], seed=10 + seed, dtype=dtype)
        inputs[f"{side}_bias"] = 0.1 * random(CLASSES, seed=20 + seed, dtype=dtype)
    return inputs


#: The settings of the published CIFAR-100 runs: KD's, and DKD's, which NKD takes over.
PUBLISHED = {
    "kd": {"temperature": 4.0},
    "dkd": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0},
    "nkd": {"temperature": 4.0, "gamma": 8.0},
}


def naive(inputs, term="kd", scales=(1, 2, 4), loss_weight=1.0, **settings):
    sides = [
        tuple(inputs[f"{side}_{part}"].double().tolist() for part in ("feature", "weight", "bias"))
        for side in SIDES
    ]
    settings = {**PUBLISHED[term], **settings}
    labels = inputs["labels"].tolist()
    return loss_weight * sdd(OF_SAMPLE[term], *sides, labels, scales, **settings)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("sides", [(8, 8), (4, 8), (7, 7), (5, 4)], ids=str)
def test_loss_equals_the_naive_loops(term, scales, sides):
    inputs = case((5, sides[0], sides[0]), (6, sides[1], sides[1] + 1))
    loss = MODELS.build({"type": "ScaleDecoupledKDLoss", "term": term, "scales": scales})
    assert_close(loss(**inputs), naive(inputs, term, scales))


@pytest.mark.parametrize(
    "term, setting",
    [
        ("kd", {"temperature": 1.5}),
        ("kd", {"complementary_weight": 0.5}),
        ("kd", {"complementary_weight": 0.0}),
        ("kd", {"loss_weight": 3.0}),
        ("dkd", {"temperature": 1.5}),
        ("dkd", {"alpha": 2.0}),
        ("dkd", {"beta": 2.0}),
        ("nkd", {"temperature": 1.5}),
        ("nkd", {"gamma": 1.5}),
    ],
    ids=str,
)
def test_each_setting_counts(term, setting):
    inputs = case()
    value = ScaleDecoupledKDLoss(term, **setting)(**inputs)
    assert_close(value, naive(inputs, term, **setting))
    assert abs(value - ScaleDecoupledKDLoss(term)(**inputs)) > 1e-3


def test_maps_of_two_positions_a_side_have_the_scales_1_and_2():
    inputs = case((5, 2, 2), (6, 4, 4))
    assert_close(ScaleDecoupledKDLoss(scales=(1, 2))(**inputs), naive(inputs, scales=(1, 2)))
    with pytest.raises(SettingError, match=r"scales.*\(1, 2, 4\) for a map of \(2, 2\)"):
        ScaleDecoupledKDLoss()(**inputs)
    with pytest.raises(SettingError, match=r"scales.*\(1, 2, 4\) for a map of \(8, 3\)"):
        ScaleDecoupledKDLoss()(**case((5, 8, 3), (6, 8, 8)))


def test_coarse_regions_come_from_the_4_x_4_grid():
    """On 7 x 7 its windows overlap, which moves the quarters and even the mean."""
    feature = random(2, 3, 7, 7, seed=1)
    regions = torch.cat(regions_of_grid(feature, (1, 2, 4)), dim=1)
    assert regions.shape == (2, 21, 3)
    assert_close(regions, [sdd_regions(image, (1, 2, 4)) for image in feature.tolist()])
    assert (regions[:, 0] - feature.mean((2, 3))).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, SIZE])
def test_one_scale_of_like_sides_is_the_term_on_the_networks_logits(size):
    inputs = case(size=size)
    logits = [
        F.linear(
            inputs[f"{side}_feature"].mean((2, 3)), inputs[f"{side}_weight"], inputs[f"{side}_bias"]
        )
        for side in SIDES
    ]
    of_dkd = MODELS.build({"type": "DecoupledKDLoss"})(*logits, inputs["labels"])
    assert_close(ScaleDecoupledKDLoss("dkd", scales=(1,))(**inputs), of_dkd)


def test_the_case_has_regions_of_both_kinds():
    inputs = case()
    plain = ScaleDecoupledKDLoss(complementary_weight=1.0)(**inputs)
    no_complementary = ScaleDecoupledKDLoss(complementary_weight=0.0)(**inputs)
    assert 0.1 * plain < no_complementary < 0.9 * plain


@pytest.mark.parametrize("term", TERMS)
def test_gradient_reaches_the_student_and_its_classifier_alone(term):
    inputs = case((2, 4, 4), (3, 4, 4), size=2)
    for name, value in inputs.items():
        if name != "labels":
            value.requires_grad_()
    ScaleDecoupledKDLoss(term)(**inputs).backward()
    for part in ("feature", "weight", "bias"):
        assert inputs[f"student_{part}"].grad.abs().max() > 0
    assert inputs["teacher_feature"].grad is None
    assert all(inputs[f"teacher_{part}"].grad is None for part in ("weight", "bias"))

    def of_student(feature, weight, bias):
        return ScaleDecoupledKDLoss(term)(
            **{
                **{name: value.detach() for name, value in inputs.items()},
                "student_feature": feature,
                "student_weight": weight,
                "student_bias": bias,
            }
        )

    student = [inputs[f"student_{part}"].detach() for part in ("feature", "weight", "bias")]
    assert torch.autograd.gradcheck(of_student, [s.requires_grad_() for s in student])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_computed_in_float32(term, dtype):
    inputs = case(dtype=dtype)
    for side in SIDES:  # parameters stay in float32 under autocast
        for part in ("weight", "bias"):
            inputs[f"{side}_{part}"] = inputs[f"{side}_{part}"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = ScaleDecoupledKDLoss(term)(**inputs)
    assert value.dtype == torch.float32
    assert_close(value / naive(inputs, term), 1.0, torch.float32)


def test_batches_of_none_and_one_keep_the_graph():
    for size in (0, 1):
        inputs = case(size=size)
        inputs["student_feature"].requires_grad_()
        value = ScaleDecoupledKDLoss("dkd")(**inputs)
        value.backward()
        assert_close(value, naive(inputs, "dkd") if size else 0.0)


def test_classifiers_may_lack_a_bias():
    inputs = case()
    for side in SIDES:
        inputs[f"{side}_bias"].zero_()
    value = ScaleDecoupledKDLoss()(**inputs)
    del inputs["student_bias"], inputs["teacher_bias"]
    assert_close(ScaleDecoupledKDLoss()(**inputs), value)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(term="fitnet"), "term.*'kd', 'dkd', 'nkd'.*'fitnet'"),
        (dict(beta=8.0), r"settings.*temperature for the term 'kd'.*\['beta'\]"),
        (dict(scales=(2, 4)), r"scales.*1 among them.*\(2, 4\)"),
        (dict(scales=(1, 3)), r"scales.*\(1, 2, 4\).*\(1, 3\)"),
        (dict(complementary_weight=-1), "complementary_weight.*-1"),
        (dict(temperature=0), "temperature.*above 0.*0"),
        (dict(term="dkd", beta=-1), "beta.*-1"),
        (dict(loss_weight=None), "loss_weight.*None"),
    ],
)
def test_loss_refuses_settings(settings, match):
    with pytest.raises(SettingError, match=match):
        ScaleDecoupledKDLoss(**settings)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(student_feature=torch.zeros(4, 5)), r"feature.*\(N, C, H, W\).*\(4, 5\)"),
        (dict(student_weight=torch.zeros(3, 9)), r"student_weight.*\(M, 5\).*\(3, 9\)"),
        (dict(teacher_weight=torch.zeros(3, 9)), r"classifier_weight.*\(M, 6\).*\(3, 9\)"),
        (
            dict(student_weight=torch.zeros(4, 5), student_bias=torch.zeros(4)),
            "teacher_logits.*same classes",
        ),
        (dict(labels=LABELS.double()), "labels.*class indices"),
    ],
)
def test_loss_refuses_inputs(changes, match):
    with pytest.raises(SettingError, match=match):
        ScaleDecoupledKDLoss()(**{**case(), **changes})


# --- OFA's branch -----------------------------------------------------------------------------


def naive_branch(branch, x):
    """The branch from the published layers, in eval mode, by functions of its parameters."""
    state = branch.state_dict()
    blocks = sorted({name.split(".")[1] for name in state if name.startswith("layers.")})
    for block in blocks:
        weights = {n.removeprefix(f"layers.{block}."): v for n, v in state.items()}
        if f"layers.{block}.weight" in state:
            x = F.conv2d(x, weights["weight"], weights["bias"])
            continue
        for stride, first in ((2, 0), (1, 4)):
            depthwise, pointwise = weights[f"{first}.weight"], weights[f"{first + 1}.weight"]
            x = F.conv2d(x, depthwise, stride=stride, padding=1, groups=x.shape[1])
            x = F.conv2d(x, pointwise)
            norm = [weights[f"{first + 2}.{n}"] for n in ("running_mean", "running_var")]
            x = F.relu(
                F.batch_norm(x, *norm, weights[f"{first + 2}.weight"], weights[f"{first + 2}.bias"])
            )
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("halvings", range(4))
def test_branch_equals_the_published_layers(halvings):
    torch.manual_seed(0)
    branch = MODELS.build(
        dict(type="OFABranch", in_channels=4, hidden_channels=12, num_classes=5, halvings=halvings)
    ).double()
    x = random(3, 4, 9, 8, seed=1)
    branch(x)  # statistics move off their start
    branch.eval()
    assert branch(x).shape == (3, 5)
    assert_close(branch(x), naive_branch(branch, x))
    channels = [layer[5].out_channels for layer in branch.layers if isinstance(layer, HalvingConv)]
    assert channels == {0: [], 1: [12], 2: [8, 12], 3: [8, 16, 12]}[halvings]
    assert branch.layers(x).shape[2:] == {0: (9, 8), 1: (5, 4), 2: (3, 2), 3: (2, 1)}[halvings]


def test_branch_starts_from_the_published_initialisation():
    torch.manual_seed(0)
    branch = OFABranch(64, 256, 100, halvings=1)
    assert branch.fc.bias.abs().max() == 0
    assert branch.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    pointwise = branch.layers[0][5].weight  # Kaiming with fan-out 256: deviation sqrt(2 / 256)
    assert pointwise.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(in_channels=0), "in_channels.*at least 1.*0"),
        (dict(hidden_channels=1.5), "hidden_channels.*1.5"),
        (dict(num_classes=True), "num_classes.*True"),
        (dict(halvings=-1), "halvings.*at least 0.*-1"),
    ],
)
def test_branch_refuses_settings(settings, match):
    good = dict(in_channels=4, hidden_channels=8, num_classes=3, halvings=1)
    with pytest.raises(SettingError, match=match):
        OFABranch(**{**good, **settings})


def test_branch_refuses_inputs():
    branch = OFABranch(4, 8, 3, halvings=0)
    for shape in ((2, 5, 4, 4), (2, 16, 4)):
        with pytest.raises(SettingError, match=r"feature.*\(N, 4, H, W\)"):
            branch(torch.zeros(shape))
