"""AT, NST, SP, CC, VID, RKD, PKT and the term of FitNets, against naive loops."""

from __future__ import annotations

import math

import feature_oracles as oracles
import pytest
import torch
from mmrazor.registry import MODELS
from seeded import random
from tolerances import assert_close
from torch.autograd import gradcheck

import mskd_plugin  # noqa: F401  (registers the losses)
from mskd_plugin.errors import SettingError

SIZE = 4
MAPS = {"equal": ((3, 4, 4), (5, 4, 4)), "larger": ((3, 6, 6), (5, 3, 3))}
MAPS |= {"smaller": ((3, 3, 3), (5, 6, 6)), "uneven": ((3, 5, 4), (5, 3, 6))}
VECTORS = {"unequal": ((6,), (9,))}
TOKENS = {"tokens": ((5, 3), (4, 6))}
SAME_WIDTH = {"same width": ((6,), (6,))}
SAME_CHANNELS = {name: ((5, *student[1:]), teacher) for name, (student, teacher) in MAPS.items()}


def rkd_oracle(student, teacher, distance_weight=25.0, angle_weight=50.0):
    return distance_weight * oracles.relational_distance(
        student, teacher
    ) + angle_weight * oracles.relational_angle(student, teacher)


def vid_oracle(student, teacher, init_variance=5.0, eps=1e-5):
    a = math.log(math.exp(init_variance - eps) - 1)
    return oracles.variational_information(student, teacher, [a] * 5, eps)


#: Type -> (oracle, shapes of student's and teacher's features, settings that are needed, settings
#: of the oracle away from the defaults).
LOSSES = {
    "AttentionTransferLoss": (oracles.attention_transfer, MAPS, {}, {"power": 3}),
    "NeuronSelectivityLoss": (oracles.neuron_selectivity, MAPS, {}, {}),
    "SimilarityPreservingLoss": (oracles.similarity_preserving, MAPS | VECTORS | TOKENS, {}, {}),
    "CorrelationCongruenceLoss": (oracles.correlation_congruence, SAME_WIDTH, {}, {}),
    "VariationalInformationLoss": (
        vid_oracle,
        SAME_CHANNELS,
        {"channels": 5},
        {"init_variance": 2.0, "eps": 0.1},
    ),
    "RelationalLoss": (
        rkd_oracle,
        VECTORS,
        {},
        {"distance_weight": 3.0, "angle_weight": 7.0},
    ),
    "ProbabilisticTransferLoss": (oracles.probabilistic_transfer, VECTORS, {}, {}),
}
CASES = [(kind, name) for kind, (_, shapes, _, _) in LOSSES.items() for name in shapes]


def build(kind, **settings):
    loss = MODELS.build({"type": kind, **LOSSES[kind][2], **settings}).double()
    if kind == "VariationalInformationLoss":  # initialised in float32
        variance, eps = settings.get("init_variance", 5.0), settings.get("eps", 1e-5)
        expected = math.log(math.expm1(variance - eps)) if variance < 700 else variance
        assert_close(loss.log_scale, torch.full((5,), expected), torch.float32)
        loss.log_scale.data.fill_(expected)
    return loss


def features(kind, name, size=SIZE):
    student, teacher = LOSSES[kind][1][name]
    return random(size, *student, seed=1), random(size, *teacher, seed=2)


def first_features(kind, size=SIZE):
    return features(kind, next(iter(LOSSES[kind][1])), size)


def lists(*tensors):
    return [tensor.double().tolist() for tensor in tensors]


@pytest.mark.parametrize("size", [2, SIZE])
@pytest.mark.parametrize("kind, name", CASES)
def test_loss_equals_the_naive_loops(kind, name, size):
    pair = features(kind, name, size)
    assert_close(build(kind, loss_weight=2.5)(*pair), 2.5 * LOSSES[kind][0](*lists(*pair)))


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if LOSSES[kind][3]])
def test_settings_reach_the_formula(kind):
    pair, (oracle, _, _, settings) = first_features(kind), LOSSES[kind]
    assert_close(build(kind, **settings)(*pair), oracle(*lists(*pair), **settings))
    for name in settings.keys() - {"eps"}:
        changed = build(kind, **{name: settings[name]})(*pair)
        assert (changed - build(kind)(*pair)).abs() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_computes_in_float32_also_under_autocast(kind, dtype):
    # The features come in bfloat16 from autocast; what is made of them is exact to float32.
    pair = [feature.to(dtype) for feature in first_features(kind)]
    loss = build(kind).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(*pair)
    assert value.dtype == torch.float32
    assert_close(value, LOSSES[kind][0](*lists(*pair)), torch.float32)


@pytest.mark.parametrize("kind, name", CASES)
def test_gradient_of_the_student(kind, name):
    student, teacher = features(kind, name, size=3)
    loss = build(kind)
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("kind", LOSSES)
def test_only_a_learned_embedding_of_the_teacher_gets_a_gradient(kind):
    student, teacher = (feature.requires_grad_() for feature in first_features(kind))
    build(kind)(student, teacher).backward()
    assert student.grad.abs().max() > 0
    if kind == "CorrelationCongruenceLoss":
        assert_close(teacher.grad, -student.grad)
    else:
        assert teacher.grad is None


def test_the_variance_of_vid_learns():
    loss = build("VariationalInformationLoss", init_variance=2.0)
    pair = first_features("VariationalInformationLoss")
    assert_close(loss.variance, [2.0] * 5)
    assert set(loss.state_dict()) == {"log_scale"}

    def of_scale(log_scale):
        return torch.func.functional_call(loss, {"log_scale": log_scale}, pair)

    scale = random(5, seed=3).requires_grad_()
    assert_close(
        of_scale(scale), oracles.variational_information(*lists(*pair), scale.tolist(), 1e-5)
    )
    assert gradcheck(of_scale, scale)
    # The best variance is the mean squared error of each channel.
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(*pair).backward()
        optimizer.step()
    error = (pair[0] - pair[1]).square().mean((0, 2, 3))
    torch.testing.assert_close(loss.variance, error, rtol=1e-3, atol=0)


def test_eps_is_the_smallest_variance_of_vid():
    loss = build("VariationalInformationLoss", eps=0.1)
    loss.log_scale.data.fill_(-100)
    assert_close(loss.variance, [0.1] * 5)


@pytest.mark.parametrize("value", [1e-3, 40.0, 1000.0])
def test_any_initial_variance_of_vid_is_met(value):
    assert_close(
        build("VariationalInformationLoss", init_variance=value).variance[0], value, torch.float32
    )


@pytest.mark.parametrize(
    "kind",
    [
        "AttentionTransferLoss",
        "NeuronSelectivityLoss",
        "SimilarityPreservingLoss",
        "RelationalLoss",
    ],
)
def test_the_magnitude_of_either_networks_features_does_not_matter(kind):
    # What is divided by is the features' own norm or mean distance, however small that is.
    student, teacher = first_features(kind)
    expected = build(kind)(student, teacher)
    assert_close(build(kind)(1e-4 * student, teacher), expected)
    assert_close(build(kind)(student, 1e-4 * teacher), expected)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("kind", LOSSES)
def test_batches_of_no_and_of_one_image_keep_the_graph(kind, size):
    student, teacher = first_features(kind, size)
    value = build(kind)(student.requires_grad_(), teacher)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    if size == 0 or kind not in (
        "AttentionTransferLoss",
        "NeuronSelectivityLoss",
        "VariationalInformationLoss",
    ):
        assert value == 0  # no relation between images


def test_cc_of_one_image_keeps_the_graph_of_the_teachers_embedding():
    # Processes wait for the gradient of its linear map, of zeros too.
    student, teacher = (feature.requires_grad_() for feature in
                        first_features("CorrelationCongruenceLoss", size=1))  # fmt: skip
    build("CorrelationCongruenceLoss")(student, teacher).backward()
    assert (teacher.grad == 0).all() and (student.grad == 0).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_features_of_zeros_have_a_finite_gradient(kind):
    student, teacher = first_features(kind)
    student = torch.zeros_like(student).requires_grad_()
    value = build(kind)(student, teacher)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", sorted(set(LOSSES) - {"CorrelationCongruenceLoss"}))
def test_the_order_of_the_images_does_not_matter(kind):
    pair = first_features(kind)
    turned = [feature.flip(0) for feature in pair]
    assert_close(build(kind)(*turned), build(kind)(*pair))


def test_terms_of_rkd_are_logged():
    pair = first_features("RelationalLoss")
    loss = build("RelationalLoss")
    loss(pair[0].requires_grad_(), pair[1])
    assert not any(term.requires_grad for term in loss.terms.values())
    assert_close(loss.terms["distance"], oracles.relational_distance(*lists(*pair)))
    assert_close(loss.terms["angle"], oracles.relational_angle(*lists(*pair)))


BAD_SETTINGS = [
    ("AttentionTransferLoss", {"power": 1.5}, "power.*1.5"),
    ("AttentionTransferLoss", {"power": 0}, "power"),
    ("VariationalInformationLoss", {"channels": 0}, "channels"),
    ("VariationalInformationLoss", {"init_variance": 1e-6}, "init_variance.*eps"),
    ("VariationalInformationLoss", {"init_variance": 1e-5}, "init_variance.*eps"),
    ("VariationalInformationLoss", {"init_variance": math.inf}, "init_variance.*inf"),
    ("VariationalInformationLoss", {"eps": 0}, "eps"),
    ("VariationalInformationLoss", {"eps": True}, "eps.*True"),
    ("RelationalLoss", {"distance_weight": -1}, "distance_weight"),
    ("RelationalLoss", {"angle_weight": "1"}, "angle_weight"),
    *((kind, {"loss_weight": math.inf}, "loss_weight.*inf") for kind in LOSSES),
    *((kind, {"loss_weight": True}, "loss_weight.*True") for kind in LOSSES),
]


@pytest.mark.parametrize("kind, settings, match", BAD_SETTINGS)
def test_settings_are_checked(kind, settings, match):
    with pytest.raises(SettingError, match=match):
        build(kind, **settings)


@pytest.mark.parametrize("kind", LOSSES)
def test_features_are_checked(kind):
    student, teacher = first_features(kind)
    with pytest.raises(SettingError, match="teacher_feature.*4 images.*3 images"):
        build(kind)(student, teacher[1:])
    with pytest.raises(SettingError, match=r"student_feature.*dimensions.*\(4,\)"):
        build(kind)(student.flatten(1)[:, 0], teacher)
    with pytest.raises(SettingError, match="teacher_feature.*dimensions.*tuple"):
        build(kind)(student, (teacher,))  # what a backbone's recorder holds


def test_channels_of_vid_and_widths_of_cc_are_checked():
    with pytest.raises(SettingError, match="student_feature.*`channels` = 5.*3, 4, 4"):
        build("VariationalInformationLoss")(random(4, 3, 4, 4, seed=0), random(4, 5, 4, 4, seed=0))
    with pytest.raises(SettingError, match="teacher_feature.*`channels` = 5.*1, 4, 4"):
        build("VariationalInformationLoss")(random(4, 5, 4, 4, seed=0), random(4, 1, 4, 4, seed=0))
    with pytest.raises(SettingError, match=r"teacher_feature.*\(4, 6\).*\(4, 7\)"):
        build("CorrelationCongruenceLoss")(random(4, 6, seed=0), random(4, 7, seed=0))


# --- MMRazor's losses --------------------------------------------------------------------------


def fitnet_pair():
    return random(SIZE, 3, 4, 4, seed=1), random(SIZE, 3, 4, 4, seed=2)


def test_l2_loss_as_configured_is_the_term_of_fitnets():
    loss = MODELS.build(dict(type="L2Loss", normalize=False, div_element=True, loss_weight=100.0))
    pair = fitnet_pair()
    assert_close(loss(*pair), 100 * oracles.mean_squared(*lists(*pair)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*(feature.bfloat16() for feature in pair))
    assert_close(value, 100 * oracles.mean_squared(*lists(*pair)), torch.bfloat16)


@pytest.mark.parametrize("settings", [dict(), dict(normalize=False), dict(div_element=True)])
def test_l2_loss_as_it_comes_is_not(settings):
    pair = [3 * feature for feature in fitnet_pair()]
    value = MODELS.build(dict(type="L2Loss", **settings))(*pair)
    expected = oracles.mean_squared(*lists(*pair))
    assert not math.isclose(value, expected, rel_tol=0.1)


def test_where_mmrazors_attention_transfer_agrees_and_where_it_fails():
    theirs = MODELS.build(dict(type="ATLoss"))
    pair = features("AttentionTransferLoss", "equal")
    assert_close(theirs(*pair), oracles.attention_transfer(*lists(*pair)))
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(*features("AttentionTransferLoss", "larger"))


def mmrazor_rkd(student, teacher, **settings):
    return sum(
        MODELS.build(dict(type=kind, **settings))(student, teacher)
        for kind in ("DistanceWiseRKD", "AngleWiseRKD")
    )


def test_where_mmrazors_rkd_agrees_and_where_it_fails():
    pair = first_features("RelationalLoss")
    expected = rkd_oracle(*lists(*pair))
    assert_close(mmrazor_rkd(*pair, with_l2_norm=False), expected)
    assert not math.isclose(mmrazor_rkd(*pair), expected, rel_tol=0.05)  # as it comes
    assert mmrazor_rkd(pair[0][:1], pair[1][:1], with_l2_norm=False).isnan()


def test_rkd_stays_exact_under_autocast_where_mmrazors_does_not():
    # Pooled features behind a ReLU: close together, far from the origin.
    student, teacher = (1 + 0.3 * random(16, 64, seed=seed).bfloat16() for seed in (1, 2))
    expected = oracles.relational_distance(*lists(student, teacher))
    loss = build("RelationalLoss", distance_weight=1.0, angle_weight=0.0).float()
    theirs = MODELS.build(dict(type="DistanceWiseRKD", with_l2_norm=False, loss_weight=1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(loss(student, teacher), expected, torch.float32)
        assert not math.isclose(theirs(student, teacher), expected, rel_tol=0.05)
