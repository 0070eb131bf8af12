"""AB, FSP, FT, OFD and ReviewKD against naive loops."""

from __future__ import annotations

import copy
import math

import map_oracles as oracles
import pytest
import torch
from mmrazor.registry import MODELS
from seeded import random
from tolerances import assert_close
from torch.autograd import gradcheck

import mskd_plugin
from mskd_plugin.errors import SettingError
from mskd_plugin.losses.overhaul import negative_mean, overhaul_loss

SIZE = 3


def lists(value):
    return value.detach().double().tolist()


def state(module):
    return {name: lists(value) for name, value in module.state_dict().items()}


def shaken(module, seed=3):
    """The module in float64, its parameters away from their initial values."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data += 0.2 * random(*parameter.shape, seed=seed + index).to(parameter.dtype)
    return module.double()


def build(kind, **settings):
    return MODELS.build({"type": kind, **settings})


def fsp_case(dtype=torch.float64, size=SIZE):
    shapes = {
        "student_bottom": (2, 6, 5),
        "student_top": (3, 4, 4),
        "teacher_bottom": (2, 3, 4),
        "teacher_top": (3, 3, 6),
    }
    return {n: random(size, *s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def factor_case(dtype=torch.float64, size=SIZE):
    return {
        "student_feature": random(size, 3, 4, 6, seed=1, dtype=dtype),
        "teacher_feature": random(size, 2, 5, 3, seed=2, dtype=dtype),
    }


def overhaul_case(dtype=torch.float64, size=SIZE):
    # A margin from the formula, and one of three deviations: 4 / 0.5 deviations above zero.
    return {
        "student_feature": random(size, 3, 4, 3, seed=1, dtype=dtype),
        "teacher_feature": 2 * random(size, 3, 8, 5, seed=2, dtype=dtype) - 0.5,
        "norm_weight": torch.tensor([-0.8, 0.5, 1.3], dtype=torch.float64).to(dtype),
        "norm_bias": torch.tensor([0.2, 4.0, -0.7], dtype=torch.float64).to(dtype),
    }


def review_case(dtype=torch.float64, size=SIZE):
    shapes = {
        "student_stage1": (3, 6, 5),
        "student_stage2": (2, 3, 3),
        "teacher_stage1": (2, 9, 8),
        "teacher_stage2": (5, 3, 4),
        "student_pooled": (4,),
        "teacher_pooled": (6,),
    }
    return {n: random(size, *s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def review_oracle(loss, case):
    case = {n: v[:, :, None, None] if v.dim() == 2 else v for n, v in case.items()}
    stages = [f"stage{i}" for i in range(1, 7) if f"student_stage{i}" in case]
    student, teacher = (
        [lists(case[f"{side}_{part}"]) for part in (*stages, "pooled")]
        for side in ("student", "teacher")
    )
    states = [state(fusion) for fusion in loss.chain.fusions]
    return oracles.review(student, teacher, states)


def plain(oracle):
    return lambda loss, case: oracle(*map(lists, case.values()))


REVIEW = dict(in_channels=(3, 2, 4), out_channels=(2, 5, 6))
#: Type -> (case, oracle of loss and case, settings that are needed).
LOSSES = {
    "FSPLoss": (fsp_case, plain(oracles.fsp), {}),
    "FactorTransferLoss": (factor_case, plain(oracles.factor_transfer), {}),
    "OverhaulLoss": (overhaul_case, plain(oracles.overhaul), {}),
    "ReviewKDLoss": (review_case, review_oracle, REVIEW),
}


def ready(kind, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    loss = shaken(build(kind, **{**LOSSES[kind][2], **settings}))
    return loss.to(dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_registry_gives_the_public_class(kind):
    assert type(ready(kind)) is getattr(mskd_plugin.losses, kind)


@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_equals_the_naive_loops(kind, weight):
    case, oracle, _ = LOSSES[kind]
    loss, case = ready(kind, loss_weight=weight), case()
    expected = weight * oracle(loss, case)
    value = loss(**case)
    assert value.dtype == torch.float64
    assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_lower_precision(kind, dtype):
    case, oracle, _ = LOSSES[kind]
    case, loss = case(dtype), ready(kind, dtype)
    expected = oracle(loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(**case)
    assert value.dtype == torch.float32
    # Only ReviewKD computes layers of its own in bfloat16; the terms themselves are float32.
    of_layers = dtype if kind == "ReviewKDLoss" else torch.float32
    assert_close(value, expected, of_layers)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_the_student_alone(kind):
    case, loss = LOSSES[kind][0](), ready(kind)
    for value in case.values():
        value.requires_grad_()
    loss(**case).backward()
    for name, value in case.items():
        if name.startswith("student"):
            assert value.grad.abs().sum() > 0
        else:
            assert value.grad is None
    student = [name for name in case if name.startswith("student")]
    case = LOSSES[kind][0]()
    inputs = [case.pop(name).requires_grad_() for name in student]
    assert gradcheck(lambda *given: loss(**dict(zip(student, given)), **case), inputs)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_input_changes_the_loss(kind):
    case, loss = LOSSES[kind][0](), ready(kind).eval()
    before = loss(**case)
    for index, (name, value) in enumerate(case.items()):
        other = {**case, name: random(*value.shape, seed=50 + index) - 0.2}
        assert (loss(**other) - before).abs() > 1e-6


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("kind", LOSSES)
def test_small_batches_keep_the_graph(kind, size):
    # Of one image the pooled vector has no variance; layers in eval mode have one of their own.
    case, loss = LOSSES[kind][0](size=size), ready(kind).eval()
    for name in case:
        if name.startswith("student"):
            case[name].requires_grad_()
    value = loss(**case)
    if size and kind != "ReviewKDLoss":
        assert_close(value, LOSSES[kind][1](loss, case))
    value.backward()
    assert torch.isfinite(value) and (value == 0) == (size == 0)
    assert all(case[name].grad is not None for name in case if name.startswith("student"))


@pytest.mark.parametrize("settings", [dict(factor_power=3), dict(error_power=2)])
def test_settings_of_factor_transfer(settings):
    case = factor_case()
    value = ready("FactorTransferLoss", **settings)(**case)
    assert_close(value, oracles.factor_transfer(*map(lists, case.values()), **settings))
    assert (value - ready("FactorTransferLoss")(**case)).abs() > 1e-3


def test_the_widths_of_review():
    wide = ready("ReviewKDLoss")
    assert wide.chain.fusions[0].conv1[0].out_channels == 4  # the student's pooled vector
    narrow = ready("ReviewKDLoss", max_mid_channels=2)
    assert narrow.chain.fusions[0].conv1[0].out_channels == 2
    case = review_case()
    assert_close(narrow(**case), review_oracle(narrow, case))
    deepest = wide.chain.fusions[-1]
    assert deepest.attention is None and wide.chain.fusions[0].attention.bias is not None
    # Before a normalisation a bias changes nothing; the published layers have none.
    for fusion in wide.chain.fusions:
        assert fusion.conv1[0].bias is None and fusion.conv2[0].bias is None
    copy.deepcopy(wide)


# --- OFD's margin ------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "bias"), [(0.8, 0.2), (-1.3, -2.0), (0.5, 1.5), (1.0, 0.0)])
def test_the_margin_is_the_mean_below_zero(weight, bias):
    """By Simpson's rule over the density, 12 deviations down."""
    s, steps = abs(weight), 20_000
    low = min(bias - 12 * s, -12 * s)
    width = -low / steps
    moments = [0.0, 0.0]
    for k in range(steps + 1):
        x = low + k * width
        factor = 1 if k in (0, steps) else 4 if k % 2 else 2
        density = factor * math.exp(-(((x - bias) / s) ** 2) / 2)
        moments[0] += density
        moments[1] += x * density
    margin = negative_mean(*(torch.tensor([v], dtype=torch.float64) for v in (weight, bias)))
    assert margin.item() == pytest.approx(moments[1] / moments[0], rel=1e-9)


def test_margins_where_the_formula_has_none():
    weight = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 1.0, 1e-40])
    bias = torch.tensor([1.6, 1.6, 0.3, -0.3, 0.0, 40.0, -0.3])
    # 1.6 / 0.5 = 3.2 deviations: below 0.1 %. A weight of 0: a constant, or nothing below zero.
    expected = [-1.5, -1.5, 0.0, -0.3, 0.0, -3.0, -0.3]
    assert_close(negative_mean(weight, bias), expected, torch.float32)
    assert negative_mean(weight, bias).dtype == torch.float32


def test_ofd_at_the_borders_of_its_cases():
    # Of a teacher at exactly zero, only what lies above it counts.
    student = torch.tensor([-1.0, 2.0, -1.0, -3.0]).double().view(1, 1, 2, 2)
    teacher = torch.tensor([0.0, 0.0, -1.0, -3.0]).double().view(1, 1, 2, 2)
    assert overhaul_loss(student, teacher, torch.tensor([-2.0])) == 2.0**2


# --- MMRazor's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1.0, 0.4])
def test_mmrazors_ab_is_the_published_stage(margin):
    student, teacher = random(SIZE, 3, 4, 5, seed=1), random(SIZE, 3, 4, 5, seed=2)
    student[0, 0, 0, :2], teacher[0, 0, 0, :3] = torch.tensor([-margin, margin]), 0.0
    value = build("ABLoss", loss_weight=0.25, margin=margin)(student, teacher)
    assert_close(value, 0.25 * oracles.activation_boundary(*map(lists, (student, teacher)), margin))


def test_mmrazors_ofd_is_the_term_of_maps_of_one_size():
    case = overhaul_case()
    case["teacher_feature"] = case["teacher_feature"][:, :, :4, :3]
    teacher = build("OFDTeacherConnector")
    teacher.init_margin(negative_mean(case["norm_weight"], case["norm_bias"])[None, :, None, None])
    theirs = build("OFDLoss", mul_factor=1)(
        case["student_feature"], teacher(case["teacher_feature"])
    )
    assert_close(ready("OverhaulLoss")(**case), theirs)
    thousandth = build("OFDLoss")(case["student_feature"], teacher(case["teacher_feature"]))
    assert_close(thousandth, theirs / 1000)  # its default


def test_mmrazors_ft_is_another_loss():
    # It takes no view of maps that are not contiguous.
    case = {name: value[:, :2, :4, :3].contiguous() for name, value in factor_case().items()}
    theirs = build("FTLoss")(*case.values())
    assert (ready("FactorTransferLoss")(**case) - theirs).abs() > 1e-3


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        *((kind, dict(loss_weight=-1), "`loss_weight`.*at least 0.*-1") for kind in LOSSES),
        ("FactorTransferLoss", dict(factor_power=0), "`factor_power`"),
        ("FactorTransferLoss", dict(factor_power=1.5), "`factor_power`.*whole.*1.5"),
        ("FactorTransferLoss", dict(error_power=0.5), "`error_power`.*at least 1.*0.5"),
        ("FactorTransferLoss", dict(error_power=True), "`error_power`.*True"),
        ("ReviewKDLoss", dict(in_channels=(3,)), "`in_channels`.*2 to 7"),
        ("ReviewKDLoss", dict(in_channels=(3, 0, 4)), "`in_channels`.*positive"),
        ("ReviewKDLoss", dict(in_channels=(3, True, 4)), "`in_channels`.*whole.*True"),
        ("ReviewKDLoss", dict(in_channels=3), "`in_channels`.*got 3"),
        ("ReviewKDLoss", dict(out_channels=()), r"`out_channels`.*got \(\)"),
        ("ReviewKDLoss", dict(out_channels=(3, 4)), "`out_channels`.*3 numbers"),
        ("ReviewKDLoss", dict(max_mid_channels=0), "`max_mid_channels`"),
        ("ReviewKDLoss", dict(max_mid_channels=True), "`max_mid_channels`.*True"),
    ],
)
def test_malformed_settings(kind, settings, match):
    with pytest.raises(SettingError, match=match):
        ready(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("FSPLoss", dict(student_top=(3, 5, 4, 4)), "`student_top`.*teacher's 3.*got 5"),
        ("FSPLoss", dict(student_bottom=(3, 2)), "`student_bottom`.*N, C, H, W"),
        ("FSPLoss", dict(student_top=(3, 3)), "`student_top`.*N, C, H, W"),
        ("FSPLoss", dict(teacher_bottom=(3, 2)), "`teacher_bottom`.*N, C, H, W"),
        ("FSPLoss", dict(teacher_bottom=(3, 2, 12)), "`teacher_bottom`.*N, C, H, W"),
        ("FSPLoss", dict(teacher_top=(2, 3, 3, 6)), "same images"),
        ("FactorTransferLoss", dict(teacher_feature=(3, 4)), "`teacher_feature`"),
        ("OverhaulLoss", dict(student_feature=(3, 2, 4, 4)), "`student_feature`.*3 channels.*2"),
        ("OverhaulLoss", dict(student_feature=(3, 3)), "`student_feature`.*N, C, H, W"),
        ("OverhaulLoss", dict(teacher_feature=(3, 3, 4)), "`teacher_feature`.*N, C, H, W"),
        ("OverhaulLoss", dict(teacher_feature=(1, 3, 8, 5)), "same images"),
        ("OverhaulLoss", dict(norm_bias=(4,)), r"`norm_bias`.*\(3,\).*\(4,\)"),
        ("ReviewKDLoss", dict(student_stage2=(3, 5, 3, 3)), "`student_stage2`.*2 channels.*5"),
        ("ReviewKDLoss", dict(teacher_stage2=None), "`teacher_stage<i>`.*1 to 2.*teacher_stage1"),
        ("ReviewKDLoss", dict(teacher_pooled=(3, 6, 1, 1)), r"`teacher_pooled`.*\(N, C\)"),
        ("ReviewKDLoss", dict(student_stage3=(3, 5, 3, 3)), "`student_stage<i>`.*1 to 2"),
        (
            "ReviewKDLoss",
            dict(teacher_stage1=(2, 2, 9, 8), teacher_stage2=(2, 5, 3, 4), teacher_pooled=(2, 6)),
            "same images.*'student_pooled': 3, 'teacher_pooled': 2",
        ),
    ],
)
def test_inputs_that_do_not_fit(kind, changes, match):
    case = LOSSES[kind][0]()
    for name, shape in changes.items():
        case[name] = None if shape is None else torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(SettingError, match=match):
        ready(kind)(**case)


@pytest.mark.parametrize("given", [(torch.zeros(3, 3, 4, 6),), None])
def test_a_record_that_is_no_tensor_is_refused(given):
    case = {**fsp_case(), "student_top": given}
    with pytest.raises(SettingError, match="`student_top`.*(tuple|NoneType)"):
        ready("FSPLoss")(**case)
