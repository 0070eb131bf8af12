"""The loss, built through the registry: L_stage of the method against the naive loops and the
functional core."""

from __future__ import annotations

import itertools

import pytest
import torch
from mmrazor.registry import MODELS
from oracles import contrastive_terms as naive_terms
from oracles import decouple as naive_decouple
from oracles import stage_loss as naive_loss
from seeded import random
from tolerances import assert_close

import mskd_plugin
from mskd_plugin.errors import SettingError
from mskd_plugin.functional import consistent_regions, multi_scale_contrastive_terms

TYPE = "MultiScaleContrastiveLoss"
SIZE, WIDTH, CLASSES = 5, 6, 3


def build(**settings):
    return MODELS.build({"type": TYPE, **settings})


def random_case(counts=(1, 4, 9), dtype=torch.float64):
    """Regions of both sides, labels, and a classifier of the teacher's."""
    teacher = tuple(random(SIZE, r, WIDTH, seed=r, dtype=dtype) + 0.3 for r in counts)
    student = tuple(0.5 * t + random(*t.shape, seed=k, dtype=dtype) for k, t in enumerate(teacher))
    return {
        "student_regions": student,
        "teacher_regions": teacher,
        "labels": torch.tensor([0, 1, 0, 2, 0]),
        "classifier_weight": random(CLASSES, WIDTH, seed=7, dtype=dtype),
        "classifier_bias": random(CLASSES, seed=8, dtype=dtype),
    }


def lists(value):
    if isinstance(value, tuple):
        return [scale.detach().double().tolist() for scale in value]
    return value.double().tolist() if value.is_floating_point() else value.tolist()


def naive(case, **settings):
    return naive_loss(
        *(lists(case[name]) for name in ("student_regions", "teacher_regions", "labels")),
        *(lists(case[name]) for name in ("classifier_weight", "classifier_bias")),
        **settings,
    )


# Each setting away from its default; `complementary_weight` and `keep` meet in a list of their own.
SETTINGS = {
    "loss_weight": 3.0,
    "feature_weight": 0.25,
    "temperature": 0.4,
    "scale_weights": (0.5, 1.0, 2.0),
    "symmetric": True,
    "center": True,
    "exclude_same_class": True,
}
CATEGORIES = [
    {},
    {"complementary_weight": 2.5},
    {"complementary_weight": 0.0},
    {"keep": "consistent"},
    {"keep": "complementary"},
    {"keep": "complementary", "complementary_weight": 2.5},
]
PAIRS = [{}, *({a: SETTINGS[a], b: SETTINGS[b]} for a, b in itertools.combinations(SETTINGS, 2))]
PAIRS.append(SETTINGS)


def test_the_registry_gives_the_public_class():
    assert type(build()) is mskd_plugin.losses.MultiScaleContrastiveLoss


@pytest.mark.parametrize("categories", CATEGORIES, ids=str)
@pytest.mark.parametrize("settings", PAIRS, ids=lambda s: "+".join(s) or "defaults")
def test_loss_equals_the_naive_loops(settings, categories):
    case = random_case()
    settings = {**settings, **categories}
    assert_close(build(**settings)(**case), naive(case, **settings))


@pytest.mark.parametrize("categories", CATEGORIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_equals_the_naive_loops_in_lower_precision(dtype, categories):
    # bfloat16 regions come out of autocast; the classifier's weight stays in float32.
    case = random_case(dtype=dtype)
    for name in ("classifier_weight", "classifier_bias"):
        case[name] = case[name].float()
    settings = {**SETTINGS, **categories}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = build(**settings)(**case)
    assert loss.dtype == torch.float32
    assert_close(loss, naive(case, **settings), torch.float32)


def test_the_feature_wise_term_may_be_left_out():
    case, loss = random_case(), build(feature_weight=0)
    assert_close(loss(**case), naive(case, feature_weight=0.0))
    assert loss.terms["feature_wise"] == 0  # left out, not weighted by zero


@pytest.mark.parametrize("categories", CATEGORIES, ids=str)
def test_loss_equals_the_functional_core(categories):
    case = random_case()
    for scale in case["student_regions"]:
        scale.requires_grad_()
    classifier = (case["classifier_weight"], case["classifier_bias"])
    weight = categories.get("complementary_weight", 1.0)
    kept = categories.get("keep", "all")
    terms = multi_scale_contrastive_terms(
        case["student_regions"],
        case["teacher_regions"],
        temperature=0.4,
        scale_weights=(0.5, 1.0, 2.0),
        symmetric=True,
        center=True,
        excluded_labels=case["labels"],
        region_weights=[
            consistent * (kept != "complementary") + ~consistent * (kept != "consistent") * weight
            for consistent in consistent_regions(
                case["teacher_regions"], case["labels"], *classifier
            )
        ],
    )
    loss = build(**SETTINGS, **categories)
    assert_close(loss(**case), 3 * (terms.sample_wise + 0.25 * terms.feature_wise))
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(
        {name: term.item() for name, term in terms._asdict().items()}, rel=1e-12
    )
    assert not any(term.requires_grad for term in loss.terms.values())


def test_the_case_has_regions_of_both_kinds():
    case = random_case()
    consistent = consistent_regions(
        case["teacher_regions"], case["labels"], case["classifier_weight"], case["classifier_bias"]
    )
    of_scale_4 = consistent[1].double().mean()
    assert 0.1 < of_scale_4 < 0.9


CHANGES = {**SETTINGS, "complementary_weight": 2.0, "keep": "consistent"}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_loss(name):
    case = random_case()
    changed = build(**{name: CHANGES[name]})(**case)
    assert (changed - build()(**case)).abs() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_regions", random_case()["teacher_regions"]),
        ("teacher_regions", random_case()["student_regions"]),
        ("labels", torch.tensor([1, 2, 0, 1, 1])),
        ("classifier_weight", random(CLASSES, WIDTH, seed=20)),
        ("classifier_bias", None),
    ],
)
def test_every_input_changes_the_loss(name, value):
    case = random_case()
    loss = build(complementary_weight=3.0, exclude_same_class=True)
    assert (loss(**{**case, name: value}) - loss(**case)).abs() > 1e-3


def test_defaults_need_neither_labels_nor_a_classifier():
    case = random_case()
    regions = (case["student_regions"], case["teacher_regions"])
    assert_close(build()(*regions), sum(naive_terms(*map(lists, regions))))


def test_only_excluding_a_class_needs_no_classifier():
    case = random_case()
    loss = build(exclude_same_class=True)(
        case["student_regions"], case["teacher_regions"], case["labels"]
    )
    assert_close(loss, naive(case, exclude_same_class=True))


@pytest.mark.parametrize(
    "settings",
    [{}, SETTINGS, {**SETTINGS, "keep": "complementary"}],
    ids=["default", "all", "keep"],
)
def test_gradient_of_the_student_alone(settings):
    case = random_case()
    others = (*case["teacher_regions"], case["classifier_weight"], case["classifier_bias"])
    for tensor in (*case["student_regions"], *others):
        tensor.requires_grad_()
    loss = build(**settings)

    def function(*student):
        return loss(**{**case, "student_regions": student})

    function(*case["student_regions"]).backward()
    assert all(tensor.grad is None for tensor in others)
    reached = [bool(tensor.grad.abs().sum() > 0) for tensor in case["student_regions"]]
    # The global feature is consistent with itself, so it has no part in the complementary regions.
    assert reached == [settings.get("keep") != "complementary", True, True]
    frozen = random_case()
    case.update({name: value for name, value in frozen.items() if name != "student_regions"})
    assert torch.autograd.gradcheck(function, case["student_regions"])


@pytest.mark.parametrize("keep", ["all", "consistent"])
def test_a_batch_of_one_image_and_one_region_gives_zero_and_a_gradient_of_zero(keep):
    case = random_case(counts=(1,))
    case = {
        name: tuple(scale[:1] for scale in value) if isinstance(value, tuple) else value
        for name, value in case.items()
    }
    case["labels"] = case["labels"][:1]
    (student,) = case["student_regions"]
    student.requires_grad_()
    loss = build(keep=keep)(**case)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_maps_through_connectors_and_loss(overlap, memory_format, autocast):
    """The chain of a training step, teacher under inference mode, against the chain of naive
    loops."""
    dtype = torch.float64 if autocast is None else torch.float32
    settings = {"scales": (1, 2, 4), "overlap": overlap}
    connectors = [
        MODELS.build({"type": "MultiScaleDecouplingConnector", **settings}) for _ in range(2)
    ]
    teacher_map = random(3, WIDTH, 7, 7, seed=1, dtype=dtype)
    student_map = 0.5 * teacher_map + random(3, WIDTH, 7, 7, seed=2, dtype=dtype)
    expected = sum(
        naive_terms(
            *(
                naive_decouple(m.double().tolist(), (1, 2, 4), overlap)
                for m in (student_map, teacher_map)
            )
        )
    )
    student_map = student_map.to(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        with torch.inference_mode():
            teacher_regions = connectors[1](teacher_map.to(memory_format=memory_format))
        loss = build()(connectors[0](student_map), teacher_regions)
    loss.backward()
    assert_close(loss, expected, autocast or dtype)
    assert student_map.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: value}, rf"`{name}` .*at least 0.* got {value!r}")
            for name in ("loss_weight", "feature_weight", "complementary_weight")
            for value in (-0.5, float("nan"), float("inf"), "1", True)
        ),
        *(
            ({"temperature": value}, rf"`temperature` .*above 0.* got {value!r}")
            for value in (0, -0.1, float("nan"), float("inf"), "0.1", None, True)
        ),
        *(
            ({name: value}, rf"`{name}` .*True or False, but got {value!r}")
            for name in ("symmetric", "center", "exclude_same_class")
            for value in ("no", 1, None)
        ),
        ({"scale_weights": (0, 0)}, r"`scale_weights` .*not all 0.* got \(0, 0\)"),
        ({"scale_weights": (1, -1)}, r"`scale_weights` .*at least 0.* got \(1, -1\)"),
        ({"scale_weights": (1, float("inf"))}, r"`scale_weights` .*at least 0.* got \(1, inf\)"),
        ({"scale_weights": ()}, r"`scale_weights` .*not all 0.* got \(\)"),
        ({"scale_weights": 2}, "`scale_weights` .*at least 0.* got 2"),
        ({"scale_weights": "12"}, "`scale_weights` .*at least 0.* got '12'"),
        ({"negatives": "queue"}, r"`negatives` .*'process', 'all'.* got 'queue'"),
        ({"keep": "right"}, r"`keep` .*'all', 'consistent', 'complementary'.* got 'right'"),
        (
            {"keep": "consistent", "complementary_weight": 2},
            "`complementary_weight` .*1 when `keep` is 'consistent'.* got 2",
        ),
    ],
)
def test_malformed_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        mskd_plugin.losses.MultiScaleContrastiveLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "left_out", "message"),
    [
        ({"keep": "consistent"}, "labels", "`labels` .*loss_forward_mappings.* got None"),
        ({"complementary_weight": 2}, "labels", "`labels` .*loss_forward_mappings.* got None"),
        ({"exclude_same_class": True}, "labels", "`labels` .*loss_forward_mappings.* got None"),
        (
            {"keep": "complementary"},
            "classifier_weight",
            "`classifier_weight` .*Parameter recorder of the teacher.* got None",
        ),
    ],
)
def test_what_a_setting_needs_was_not_mapped(settings, left_out, message):
    case = random_case()
    del case[left_out]
    with pytest.raises(SettingError, match=message):
        build(**settings)(**case)


def replaced(scale, shape):
    regions = list(random_case()["student_regions"])
    regions[scale] = torch.zeros(shape, dtype=torch.float64)
    return tuple(regions)


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, {"student_regions": replaced(0, (5, 1, 8))}, r"`student_.*\(5, 1, 6\).* \(5, 1, 8\)"),
        ({}, {"student_regions": replaced(1, (5, 9, 6))}, r"`student_.*\(5, 4, 6\).* \(5, 9, 6\)"),
        ({"scale_weights": (1, 2)}, {}, r"`scale_weights` .*3 weights.* got \[1, 2\]"),
        (
            {"exclude_same_class": True},
            {"labels": torch.rand(5, 3)},
            r"`labels` .*class indices of shape \(5,\).* torch.float32 of shape \(5, 3\)",
        ),
        (
            {"keep": "consistent"},
            {"classifier_weight": torch.rand(3, 8)},
            r"`classifier_weight` .*\(M, 6\).* shape \(3, 8\)",
        ),
    ],
)
def test_inputs_that_do_not_fit(settings, inputs, message):
    with pytest.raises(SettingError, match=message):
        build(**settings)(**{**random_case(), **inputs})
