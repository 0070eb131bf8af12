"""The logit baselines against naive float64 loops: our losses, and MMRazor's as the recipes
configure them."""

from __future__ import annotations

import math

import pytest
import torch
from logit_oracles import (
    dist,
    dkd_of_sample,
    kd_of_sample,
    mlkd,
    nkd_of_sample,
    ofa_of_sample,
    over_batch,
    softmax,
    standardized,
    wsld_of_sample,
)
from mmrazor.registry import MODELS
from tolerances import assert_close

import mskd_plugin
from mskd_plugin import recipes
from mskd_plugin.errors import SettingError

SIZE, CLASSES = 7, 5
LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])
BASE = dict(
    pair=dict(teacher="resnet20", student="resnet8", num_classes=CLASSES),
    data_preprocessor=dict(type="ClsDataPreprocessor"),
)
NAMES = {
    "kd": ("preds_S", "preds_T", None),
    "ls_kd": ("preds_S", "preds_T", None),
    "dist": ("logits_S", "logits_T", None),
    "wsld": ("student", "teacher", "gt_labels"),
    "dkd": ("student_logits", "teacher_logits", "labels"),
    "nkd": ("student_logits", "teacher_logits", "labels"),
    "mlkd": ("student_logits", "teacher_logits", None),
    "ofa": ("student_logits", "teacher_logits", "labels"),
}


def logits(seed, size=SIZE, classes=CLASSES, spread=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return values.to(dtype)


def built(method, **settings):
    """Build the loss, and the connector in front of it, that a recipe names."""
    if method == "ofa":
        settings["stages"] = ()
    parts = getattr(recipes, method)(BASE, **settings)
    (cfg,) = parts["distill_losses"].values()
    loss = MODELS.build(cfg)
    (connector,) = [MODELS.build(c) for c in parts.get("connectors", {}).values()] or [
        torch.nn.Identity()
    ]
    (mapping,) = parts["loss_forward_mappings"].values()
    assert set(mapping) == {name for name in NAMES[method] if name}

    def call(student, teacher, labels=LABELS):
        s_name, t_name, y_name = NAMES[method]
        inputs = {s_name: connector(student), t_name: connector(teacher)}
        return loss(**inputs, **({y_name: labels} if y_name else {}))

    return call


def oracle(method, student, teacher, labels=LABELS, **settings):
    """The published term times its weight, by loops; settings as the recipes name them."""
    s, t, y = student.tolist(), teacher.tolist(), labels.tolist()
    weight = settings.pop("logits_weight" if method == "ofa" else "loss_weight")
    settings.pop("warmup", None)
    if method == "ls_kd":
        s, t = ([standardized(row) for row in side] for side in (s, t))
    if method == "dist":
        return weight * dist(s, t, **settings)
    if method == "mlkd":
        return weight * mlkd((s, t), (s, t), **settings)
    of_sample = {
        "kd": kd_of_sample,
        "ls_kd": kd_of_sample,
        "wsld": wsld_of_sample,
        "dkd": dkd_of_sample,
        "nkd": nkd_of_sample,
        "ofa": ofa_of_sample,
    }[method]
    return weight * over_batch(of_sample, s, t, y, **settings)


#: What each recipe takes by itself.
DEFAULTS = {
    "kd": dict(temperature=4.0, loss_weight=0.9),
    "ls_kd": dict(temperature=2.0, loss_weight=9.0),
    "dist": dict(temperature=4.0, beta=1.0, gamma=1.0, loss_weight=2.0),
    "wsld": dict(temperature=4.0, loss_weight=2.25),
    "dkd": dict(temperature=4.0, alpha=1.0, beta=8.0, loss_weight=1.0),
    "nkd": dict(temperature=3.0, gamma=3.5, loss_weight=1.0),
    "mlkd": dict(temperatures=(4.0, 3.0, 5.0, 2.0, 6.0), loss_weight=0.9),
    "ofa": dict(temperature=1.0, exponent=1.0, logits_weight=1.0),
}
#: Each setting away from its default, alone.
CHANGES = [
    (method, {name: (4.0, 1.5, 3.0, 2.5, 1.0) if name == "temperatures" else 1.75})
    for method, settings in DEFAULTS.items()
    for name in settings
]


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_equal_the_published_term(method):
    student, teacher = logits(1), logits(2)
    value = built(method)(student, teacher)
    assert value.dtype == torch.float64 and value.dim() == 0
    assert_close(value, oracle(method, student, teacher, **DEFAULTS[method]))


@pytest.mark.parametrize("method", ["dkd", "nkd", "mlkd", "ofa"])
def test_defaults_of_the_classes_are_those_of_the_recipes(method):
    student, teacher = logits(1), logits(2)
    names = dict(zip(("student_logits", "teacher_logits"), (student, teacher)))
    if NAMES[method][2]:
        names["labels"] = LABELS
    kind = {"dkd": "DecoupledKDLoss", "nkd": "NormalizedKDLoss", "mlkd": "MultiLevelKDLoss"}
    value = MODELS.build({"type": kind.get(method, "OFALoss")})(**names)
    assert_close(value, oracle(method, student, teacher, **DEFAULTS[method]))


@pytest.mark.parametrize("method, change", CHANGES, ids=str)
def test_each_setting_equals_the_published_term_and_counts(method, change):
    student, teacher = logits(3), logits(4)
    value = built(method, **change)(student, teacher)
    assert_close(value, oracle(method, student, teacher, **{**DEFAULTS[method], **change}))
    assert abs(value - built(method)(student, teacher)) > 1e-3


@pytest.mark.parametrize("method", DEFAULTS)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_any_batch_size(method, size):
    student, teacher = logits(5, size), logits(6, size)
    labels = torch.arange(size) % CLASSES
    student.requires_grad_()
    value = built(method)(student, teacher, labels)
    assert_close(value, oracle(method, student, teacher, labels, **DEFAULTS[method]))
    value.backward()
    assert torch.isfinite(student.grad).all()


OURS = ("dkd", "nkd", "mlkd", "ofa")


@pytest.mark.parametrize("method", OURS)
def test_a_batch_without_images_keeps_the_graph(method):
    student = logits(1, size=0).requires_grad_()
    value = built(method)(student, logits(2, size=0), LABELS[:0])
    value.backward()
    assert value == 0 and student.grad is not None


@pytest.mark.parametrize("method", [name for name in DEFAULTS if name != "wsld"])
def test_gradients(method):
    teacher, call = logits(2, 3), built(method)
    student = logits(1, 3, spread=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: call(s, teacher, LABELS[:3]), student)


def test_wslds_gradient_leaves_its_weight_out():
    student, teacher = logits(1).requires_grad_(), logits(2)
    built("wsld", loss_weight=1.0)(student, teacher).backward()
    for n, label in enumerate(LABELS.tolist()):
        s, t = student[n].tolist(), teacher[n].tolist()
        soft = over_batch(kd_of_sample, [s], [t], temperature=4.0)  # cross-entropy less entropy
        entropy = -sum(p * math.log(p) for p in softmax(t, 4.0))
        weight = wsld_of_sample(s, t, label, 4.0) / (soft + 16 * entropy)
        slope = [p - q for p, q in zip(softmax(s, 4.0), softmax(t, 4.0), strict=True)]
        assert_close(student.grad[n], [4 * weight * d / SIZE for d in slope])


@pytest.mark.parametrize("method", [name for name in DEFAULTS if name != "wsld"])
def test_the_teacher_gets_no_gradient(method):
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    built(method)(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("method", (*OURS, "ls_kd"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_computed_in_float32(method, dtype):
    student, teacher = logits(7, dtype=dtype), logits(8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = built(method)(student, teacher)
    assert value.dtype == torch.float32
    expected = oracle(method, student.double(), teacher.double(), **DEFAULTS[method])
    assert_close(value / expected, 1.0, torch.float32)


@pytest.mark.parametrize("method", ["kd", "ls_kd", "dist", "wsld"])
def test_mmrazors_own_under_autocast(method):
    # A teacher that is sure and a student close to it: small differences of large numbers.
    teacher = logits(8, spread=2.0)
    teacher[range(SIZE), LABELS] += 10
    teacher = teacher.bfloat16()
    student = (teacher.double() + logits(7, spread=0.3)).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = student.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = built(method)(leaf, teacher.to(dtype))
        value.backward()
        results.append((value.detach().double(), leaf.grad.double()))
    (value, gradient), (expected, expected_gradient) = results
    assert_close(expected, oracle(method, student.double(), teacher.double(), **DEFAULTS[method]))
    # WSLD divides cross-entropies near zero.
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    # The gradient itself is rounded to bfloat16.
    error = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max()
    assert error < 2**-8


@pytest.mark.parametrize("method", OURS)
def test_logits_far_apart_stay_finite(method):
    student = torch.zeros(2, CLASSES)
    student[:, 0] = 400.0
    student.requires_grad_()
    teacher = -student.detach()
    value = built(method)(student, teacher, torch.tensor([0, 1]))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


def test_equal_networks_have_nothing_to_learn():
    same = logits(9)
    for method in ("kd", "ls_kd", "dkd", "mlkd"):
        assert built(method)(same, same.clone()).abs() < 1e-12
    # DIST's denominator keeps the correlation of equals a little below 1.
    assert 0 <= built("dist")(same, same.clone()) < 1e-4


def test_standardised_logits_forget_scale_and_offset():
    student, teacher = logits(1), logits(2)
    moved = 5.0 * teacher + torch.arange(SIZE, dtype=torch.float64)[:, None]
    value = built("ls_kd")(student, teacher)
    assert_close(built("ls_kd")(student, moved) / value, 1.0, torch.float32)  # up to its 1e-7


def test_kd_is_dkd_with_the_teachers_weight_on_the_others():
    """KD = TCKD + (1 - p_y) NCKD (DKD's equation 7), for one sample."""
    student, teacher, label = logits(1, 1), logits(2, 1), torch.tensor([3])
    rest = 1 - (teacher / 4).softmax(1)[0, 3].item()
    value = built("dkd", beta=rest)(student, teacher, label)
    assert_close(value, built("kd", loss_weight=1.0)(student, teacher))


def test_ofas_labels_may_be_scores():
    student, teacher = logits(1), logits(2)
    smooth = 0.9 * torch.nn.functional.one_hot(LABELS, CLASSES) + 0.02
    call = built("ofa", exponent=1.4)
    assert_close(call(student, teacher, smooth), call(student, teacher))


def test_mlkd_shows_its_terms():
    loss = MODELS.build({"type": "MultiLevelKDLoss"})
    value = loss(logits(1), logits(2))
    assert_close(value, 0.9 * sum(loss.terms.values()))
    # Of one image the median is its own confidence, a share of 1; of five classes it takes three.
    student, teacher = logits(1, size=1), logits(2, size=1)
    loss = MODELS.build({"type": "MultiLevelKDLoss", "temperatures": (2.0,)})
    loss(student, teacher)
    p, q = ((side / 2).softmax(1)[0] for side in (student, teacher))
    by_class = (torch.outer(q, q) - torch.outer(p, p)).square().sum() / CLASSES
    expected = {
        "instance": 2 * 4 * (q * (q / p).log()).sum(),
        "class": 3 / 5 * by_class,
        "batch": (q.dot(q) - p.dot(p)).square(),
    }
    assert loss.terms.keys() == expected.keys()
    for name, term in loss.terms.items():
        assert_close(term, expected[name])


def test_mlkds_shares_grow_with_ties_of_the_teacher():
    # Three images of which the teacher is sure, three classes of one column: up to the median are
    # all. The images' smallest probabilities, and the logarithms, differ.
    teacher = torch.tensor([[40.0, 0, 0, 0], [50.0, 0, 0, 0], [60.0, 0, 0, 0], [2.0, 0, 0, 0]])
    student, teacher = logits(1, size=4, classes=4), teacher.double()
    expected = oracle("mlkd", student, teacher, **DEFAULTS["mlkd"])
    assert_close(built("mlkd")(student, teacher), expected)
    loss = MODELS.build({"type": "MultiLevelKDLoss", "temperatures": (2.0,)})
    loss(student.requires_grad_(), teacher)
    p, q = ((side / 2).softmax(1) for side in (student, teacher))
    instance = 2 * 4 * (q * (q / p).log()).sum(1).mean()
    assert_close(loss.terms["instance"], instance)
    assert not any(term.requires_grad for term in loss.terms.values())


# --- what MMRazor's losses do otherwise -------------------------------------------------------


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize(
    "reduction, times", [("mean", SIZE), ("sum", SIZE), ("none", SIZE), ("batchmean", 1)]
)
def test_mmrazors_dkd_sums_over_the_batch_unless_its_reduction_is_batchmean(reduction, times):
    student, teacher = logits(1), logits(2)
    theirs = MODELS.build({"type": "DKDLoss", "tau": 4.0, "beta": 8.0, "reduction": reduction})
    assert_close(theirs(student, teacher, LABELS), times * built("dkd")(student, teacher))


@pytest.mark.filterwarnings("ignore:size_average")
def test_mmrazors_dkd_underflows_where_ours_does_not():
    student = torch.tensor([[200.0, 0.0, 0.0]])
    teacher, label = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1])
    theirs = MODELS.build({"type": "DKDLoss", "tau": 1.0})
    assert not torch.isfinite(theirs(student, teacher, label))
    ours = MODELS.build({"type": "DecoupledKDLoss", "temperature": 1.0, "beta": 1.0})
    expected = over_batch(
        dkd_of_sample, student.tolist(), teacher.tolist(), [1], temperature=1, alpha=1, beta=1
    )
    assert_close(ours(student, teacher, label), expected, torch.float32)


def test_mmrazors_kl_divergence_averages_over_classes_by_mean():
    student, teacher = logits(1), logits(2)
    theirs = MODELS.build({"type": "KLDivergence", "tau": 4.0, "reduction": "mean"})
    with pytest.warns(UserWarning, match="reduction: 'mean'"):
        value = theirs(student, teacher)
    assert_close(CLASSES * value, built("kd", loss_weight=1.0)(student, teacher))


def test_mmrazors_wsld_has_1000_classes_by_default_and_leaves_the_teacher_on_the_graph():
    student, teacher = logits(1), logits(2).requires_grad_()
    with pytest.raises(RuntimeError):
        MODELS.build({"type": "WSLD"})(student, teacher, LABELS)
    built("wsld")(student, teacher).backward()
    assert teacher.grad.abs().max() > 0  # harmless: a frozen teacher runs without a graph


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, match",
    [
        (dict(type="DecoupledKDLoss", temperature=0), "temperature.*above 0.*0"),
        (dict(type="DecoupledKDLoss", alpha=-1), "alpha.*at least 0.*-1"),
        (dict(type="DecoupledKDLoss", beta="8"), "beta.*at least 0.*'8'"),
        (dict(type="DecoupledKDLoss", loss_weight=float("nan")), "loss_weight.*nan"),
        (dict(type="NormalizedKDLoss", gamma=-2), "gamma.*-2"),
        (dict(type="NormalizedKDLoss", temperature=True), "temperature.*True"),
        (dict(type="MultiLevelKDLoss", temperatures=()), r"temperatures.*\(\)"),
        (dict(type="MultiLevelKDLoss", temperatures=4), "temperatures.*4"),
        (dict(type="MultiLevelKDLoss", temperatures=(4, 0)), "temperatures.*above 0.*0"),
        (dict(type="OFALoss", exponent=0), "exponent.*above 0.*0"),
        (dict(type="OFALoss", temperature=-1), "temperature.*-1"),
    ],
)
def test_losses_refuse_settings(cfg, match):
    with pytest.raises(SettingError, match=match):
        MODELS.build(cfg)


@pytest.mark.parametrize("method", OURS)
def test_losses_refuse_inputs(method):
    call, good = built(method), logits(1)
    with pytest.raises(SettingError, match=r"teacher_logits.*\(7, 5\).*\(7, 6\).*same classes"):
        call(good, logits(2, classes=6))
    with pytest.raises(SettingError, match=r"student_logits.*two classes.*\(7, 1\)"):
        call(good[:, :1], good[:, :1])
    for shape in ((7,), (7, 5, 2)):
        with pytest.raises(SettingError, match=r"student_logits.*\(N, C\)"):
            call(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(SettingError, match="student_logits.*tuple"):
        call((good,), good)
    with pytest.raises(SettingError, match="teacher_logits.*tuple"):
        call(good, (good,))
    if NAMES[method][2]:
        with pytest.raises(SettingError, match=r"labels.*\(7,\).*\(6,\)"):
            call(good, good, LABELS[:6])
        with pytest.raises(SettingError, match="labels.*float"):
            call(good, good, LABELS.double())


def test_the_connector_takes_two_classes_and_refuses_what_is_no_logits():
    connector = MODELS.build({"type": "LogitStandardizationConnector"})
    root = 0.5**0.5
    assert_close(connector(torch.tensor([[1.0, 5.0]])), [[-root, root]], torch.float32)
    for shape in ((3, 1), (3,), (2, 3, 4)):
        with pytest.raises(SettingError, match="logits.*two classes"):
            connector(torch.zeros(shape))


def test_the_registry_gives_the_public_classes():
    for name in ("DecoupledKDLoss", "NormalizedKDLoss", "MultiLevelKDLoss", "OFALoss"):
        assert MODELS.get(name) is getattr(mskd_plugin.losses, name)
