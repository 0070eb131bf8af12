"""The contrastive terms against naive loops, closed forms and invariants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import contrastive_terms as naive_terms
from oracles import info_nce as naive_info_nce
from region_pairs import COUNTS, SETTINGS, pair, settings_of
from tolerances import assert_close

from mskd_plugin.errors import SettingError
from mskd_plugin.functional import multi_scale_contrastive_terms


def lists(regions):
    return [scale.detach().double().tolist() for scale in regions]


def naive(student, teacher, **settings):
    if "region_weights" in settings:
        settings["region_weights"] = lists(settings["region_weights"])
    if "excluded_labels" in settings:
        settings["excluded_labels"] = settings["excluded_labels"].tolist()
    return naive_terms(lists(student), lists(teacher), **settings)


NAMES = list(SETTINGS)
COMBINATIONS = [
    [name for bit, name in enumerate(NAMES) if chosen >> bit & 1]
    for chosen in range(1 << len(NAMES))
]


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "defaults")
def test_terms_equal_the_naive_loops(names):
    student, teacher = pair()
    settings = settings_of(names)
    terms = multi_scale_contrastive_terms(student, teacher, **settings)
    sample, feature = naive(student, teacher, **settings)
    assert_close(terms.sample_wise, sample)
    assert_close(terms.feature_wise, feature)


@pytest.mark.parametrize("counts", [(1,), (4,), (4, 1), (16, 9, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_terms_equal_the_naive_loops_for_any_regions(counts, size):
    student, teacher = pair(counts=counts, size=size)
    terms = multi_scale_contrastive_terms(student, teacher)
    for term, expected in zip(terms, naive(student, teacher), strict=True):
        assert_close(term, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [[], ["symmetric", "center", "region_weights"]], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_maths_runs_in_float32_whatever_comes_in(dtype, names, autocast):
    student, teacher = pair(dtype=dtype)
    settings = settings_of(names)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        terms = multi_scale_contrastive_terms(student, teacher, **settings)
    # The oracle starts from the rounded regions: only the arithmetic differs.
    for term, expected in zip(terms, naive(student, teacher, **settings), strict=True):
        assert_close(term, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("names", [[], ["symmetric", "center"]], ids=str)
def test_a_teacher_of_another_precision_meets_the_students(dtype, names):
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[dtype]
    student, teacher = pair()
    student = [scale.to(dtype) for scale in student]
    teacher = [scale.to(other) for scale in teacher]
    terms = multi_scale_contrastive_terms(student, teacher, **settings_of(names))
    for term, expected in zip(terms, naive(student, teacher, **settings_of(names)), strict=True):
        assert term.dtype == dtype
        assert_close(term, expected, torch.float32)


@pytest.mark.parametrize("name", [*NAMES, "feature_wise"])
def test_every_setting_changes_the_terms(name):
    student, teacher = pair()
    default = multi_scale_contrastive_terms(student, teacher)
    settings = {"feature_wise": False} if name == "feature_wise" else settings_of([name])
    changed = multi_scale_contrastive_terms(student, teacher, **settings)
    assert (changed.sample_wise - default.sample_wise).abs() > 1e-3 or name == "feature_wise"
    if name == "excluded_labels":  # it leaves the negatives within an image alone
        assert_close(changed.feature_wise, default.feature_wise)
    else:
        assert (changed.feature_wise - default.feature_wise).abs() > 1e-3


def test_without_the_feature_wise_term_only_it_is_zero():
    student, teacher = pair()
    terms = multi_scale_contrastive_terms(student, teacher, feature_wise=False)
    assert terms.feature_wise == 0
    assert_close(terms.sample_wise, multi_scale_contrastive_terms(student, teacher).sample_wise)


def test_one_scale_of_one_region_is_info_nce_of_pooled_features():
    student, teacher = pair(counts=(1,))
    terms = multi_scale_contrastive_terms(student, teacher, temperature=0.2)
    s, t = student[0][:, 0].tolist(), teacher[0][:, 0].tolist()
    expected = [naive_info_nce(s[n], t[n], t[:n] + t[n + 1 :], 0.2) for n in range(len(s))]
    assert_close(terms.sample_wise, sum(expected) / len(expected))
    assert terms.feature_wise == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [2, 7])
def test_equal_images_give_log_n(size, symmetric):
    image_s, image_t = pair(size=1)
    student = tuple(scale.expand(size, -1, -1) for scale in image_s)
    teacher = tuple(scale.expand(size, -1, -1) for scale in image_t)
    terms = multi_scale_contrastive_terms(student, teacher, symmetric=symmetric)
    assert_close(terms.sample_wise, math.log(size))


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_regions_give_log_r(symmetric):
    student, teacher = pair(counts=(1, 1))
    student = (student[0], student[1].expand(-1, 4, -1))
    teacher = (teacher[0], teacher[1].expand(-1, 4, -1))
    terms = multi_scale_contrastive_terms(student, teacher, symmetric=symmetric)
    # The scale of one region counts in the mean over scales, with a loss of zero.
    assert_close(terms.feature_wise, math.log(4) / 2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_orthogonal_negatives_give_the_closed_form(temperature, symmetric):
    size, count = 6, 4
    axes = torch.eye(size * count, dtype=torch.float64).view(size, count, size * count)
    terms = multi_scale_contrastive_terms(
        (3 * axes,), (axes / 7,), temperature=temperature, symmetric=symmetric
    )
    assert_close(terms.sample_wise, math.log1p((size - 1) * math.exp(-1 / temperature)))
    assert_close(terms.feature_wise, math.log1p((count - 1) * math.exp(-1 / temperature)))


@pytest.mark.parametrize("names", [[], ["symmetric", "center"]], ids=str)
def test_permuting_the_batch_or_the_regions_of_both_sides_changes_nothing(names):
    student, teacher = pair()
    settings = settings_of(names)
    expected = multi_scale_contrastive_terms(student, teacher, **settings)
    generator = torch.Generator().manual_seed(4)
    batch = torch.randperm(5, generator=generator)
    regions = [torch.randperm(count, generator=generator) for count in COUNTS]
    for s, t in (
        ([s[batch] for s in student], [t[batch] for t in teacher]),
        (
            [s[:, order] for s, order in zip(student, regions, strict=True)],
            [t[:, order] for t, order in zip(teacher, regions, strict=True)],
        ),
    ):
        got = multi_scale_contrastive_terms(s, t, **settings)
        assert_close(got.sample_wise, expected.sample_wise)
        assert_close(got.feature_wise, expected.feature_wise)
    # Permuting one side alone does change both.
    alone = multi_scale_contrastive_terms([s[batch] for s in student], teacher, **settings)
    assert (alone.sample_wise - expected.sample_wise).abs() > 1e-3
    assert (alone.feature_wise - expected.feature_wise).abs() > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_positive_scaling_of_any_region_changes_nothing(symmetric):
    student, teacher = pair()
    expected = multi_scale_contrastive_terms(student, teacher, symmetric=symmetric)
    generator = torch.Generator().manual_seed(5)
    scaled = [
        [scale * (0.1 + 9 * torch.rand(*scale.shape[:2], 1, generator=generator)) for scale in side]
        for side in (student, teacher)
    ]
    got = multi_scale_contrastive_terms(*scaled, symmetric=symmetric)
    assert_close(got.sample_wise, expected.sample_wise)
    assert_close(got.feature_wise, expected.feature_wise)


def test_centred_terms_ignore_a_shift_of_a_whole_scale():
    student, teacher = pair()
    expected = multi_scale_contrastive_terms(student, teacher, center=True)
    shifted = [scale + 5 * k + 1 for k, scale in enumerate(student)]
    got = multi_scale_contrastive_terms(shifted, teacher, center=True)
    assert_close(got.sample_wise, expected.sample_wise)
    assert_close(got.feature_wise, expected.feature_wise)


def test_the_mean_over_scales_is_weighted_and_unchanged_by_a_common_factor():
    student, teacher = pair()
    of_scale = [
        multi_scale_contrastive_terms((s,), (t,)) for s, t in zip(student, teacher, strict=True)
    ]
    for weights in ((1, 2, 4), (10, 20, 40)):
        terms = multi_scale_contrastive_terms(student, teacher, scale_weights=weights)
        for index in (0, 1):
            parts = [w * term[index] for w, term in zip(weights, of_scale, strict=True)]
            assert_close(terms[index], sum(parts) / sum(weights))


@pytest.mark.parametrize(
    "names", COMBINATIONS[::7], ids=lambda names: "+".join(names) or "defaults"
)
@pytest.mark.parametrize("term", [0, 1])
def test_gradient_of_the_student(names, term):
    counts, settings = (1, 4), settings_of(names, counts=(1, 4), size=5)
    if "scale_weights" in settings:
        settings["scale_weights"] = (1.0, 2.5)
    student, teacher = pair(counts=counts)
    inputs = tuple(s.requires_grad_() for s in student)

    def function(*regions):
        return multi_scale_contrastive_terms(regions, teacher, **settings)[term]

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("names", [[], ["symmetric", "center"]], ids=str)
def test_no_gradient_reaches_the_teacher(names):
    student, teacher = pair()
    for scale in (*student, *teacher):
        scale.requires_grad_()
    terms = multi_scale_contrastive_terms(student, teacher, **settings_of(names))
    sum(terms).backward()
    assert all(scale.grad.abs().sum() > 0 for scale in student)
    assert all(scale.grad is None for scale in teacher)


@pytest.mark.parametrize("names", [[], ["center"], ["symmetric"], ["center", "symmetric"]], ids=str)
@pytest.mark.parametrize("counts", [(1,), (1, 4)])
def test_a_batch_of_one_has_no_sample_wise_loss_and_keeps_the_graph(names, counts):
    student, teacher = pair(counts=counts, size=1)
    for scale in student:
        scale.requires_grad_()
    terms = multi_scale_contrastive_terms(student, teacher, **settings_of(names))
    assert terms.sample_wise == 0
    grads = torch.autograd.grad(terms.sample_wise, student, retain_graph=True)
    assert all((grad == 0).all() for grad in grads)
    if counts == (1,):
        assert terms.feature_wise == 0
        assert all((g == 0).all() for g in torch.autograd.grad(terms.feature_wise, student))


def test_scales_of_one_region_have_no_feature_wise_loss_and_keep_the_graph():
    student, teacher = pair(counts=(1, 1))
    for scale in student:
        scale.requires_grad_()
    terms = multi_scale_contrastive_terms(student, teacher)
    assert terms.feature_wise == 0
    assert terms.sample_wise > 0
    assert all((g == 0).all() for g in torch.autograd.grad(terms.feature_wise, student))


def test_images_all_of_one_class_leave_no_negatives():
    student, teacher = pair()
    for scale in student:
        scale.requires_grad_()
    same = torch.zeros(5, dtype=torch.long)
    terms = multi_scale_contrastive_terms(student, teacher, excluded_labels=same, symmetric=True)
    assert terms.sample_wise == 0
    assert all((g == 0).all() for g in torch.autograd.grad(terms.sample_wise, student))


def test_a_region_of_zeros_gives_numbers():
    student, teacher = pair(dtype=torch.float32)
    student = tuple(scale.index_fill(0, torch.tensor([1]), 0.0) for scale in student)
    for scale in student:
        scale.requires_grad_()
    sum(multi_scale_contrastive_terms(student, teacher)).backward()
    assert all(scale.grad.isfinite().all() for scale in student)


def test_teacher_regions_of_inference_mode():
    student, teacher = pair()
    expected = multi_scale_contrastive_terms(student, teacher, symmetric=True)
    with torch.inference_mode():
        frozen = tuple(scale.clone() for scale in teacher)
    assert frozen[0].is_inference()
    for counts in ([0, 1, 2], [2]):
        some = [student[k].clone().requires_grad_() for k in counts]
        terms = multi_scale_contrastive_terms(some, [frozen[k] for k in counts], symmetric=True)
        sum(terms).backward()
        assert all(scale.grad.abs().sum() > 0 for scale in some)
        if len(counts) == 3:
            assert_close(terms.sample_wise, expected.sample_wise)


def test_the_smallest_norm_bounds_short_regions():
    # A norm below `eps` counts as `eps`: the cosine of a region half as long is half.
    axis = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    for student, teacher in ((axis / 2, axis), (axis, axis / 2)):
        terms = multi_scale_contrastive_terms((student,), (teacher,), temperature=1.0, eps=1.0)
        assert_close(terms.sample_wise, math.log1p(math.exp(-0.5)))


def test_agrees_with_cross_entropy_on_cosines():
    student, teacher = pair(counts=(1,))
    cosines = F.normalize(student[0][:, 0], dim=1) @ F.normalize(teacher[0][:, 0], dim=1).T
    for temperature in (0.07, 1.0):
        terms = multi_scale_contrastive_terms(student, teacher, temperature=temperature)
        assert_close(terms.sample_wise, F.cross_entropy(cosines / temperature, torch.arange(5)))


def changed(regions, index, shape):
    return [torch.zeros(shape) if k == index else scale for k, scale in enumerate(regions)]


@pytest.mark.parametrize(
    ("index", "shape"),
    [(0, (5, 1, 7)), (1, (5, 9, 6)), (2, (4, 9, 6)), (1, (5, 4)), (0, (1, 1, 6))],
)
def test_regions_that_differ_are_named_with_both_shapes(index, shape):
    student, teacher = pair()
    with pytest.raises(SettingError, match="`student_regions`") as caught:
        multi_scale_contrastive_terms(changed(student, index, shape), teacher)
    assert str(tuple(teacher[index].shape)) in str(caught.value)
    assert str(shape) in str(caught.value)


def test_scales_that_differ_in_number():
    student, teacher = pair()
    with pytest.raises(SettingError, match="`student_regions` .* teacher's 3, but got 2"):
        multi_scale_contrastive_terms(student[:2], teacher)


def test_a_bare_map_or_nothing_in_place_of_regions():
    student, teacher = pair()
    bare = torch.zeros(5, 6, 4, 4)
    with pytest.raises(SettingError, match=r"`student_regions` .*tuple.* shape \(5, 6, 4, 4\)"):
        multi_scale_contrastive_terms(bare, bare)
    with pytest.raises(SettingError, match=r"`teacher_regions` .*tuple.* shape \(5, 6, 4, 4\)"):
        multi_scale_contrastive_terms(student, bare)
    with pytest.raises(SettingError, match=r"`student_regions` .*tuple.* got \(\)"):
        multi_scale_contrastive_terms((), ())
    with pytest.raises(SettingError, match="`student_regions` .*tuple.* got None"):
        multi_scale_contrastive_terms(None, teacher)
    arrays = [scale.detach().numpy() for scale in teacher]
    with pytest.raises(SettingError, match="`teacher_regions` .*tuple.* Tensor, ndarray, nd"):
        multi_scale_contrastive_terms(student, [teacher[0], *arrays[1:]])


@pytest.mark.parametrize("shape", [(4, 4, 6), (5, 4, 7), (5, 0, 6)])
def test_scales_that_do_not_go_together(shape):
    regions = changed(pair()[0], 1, shape)
    with pytest.raises(SettingError, match="`student_regions` .*one N and one D") as caught:
        multi_scale_contrastive_terms(regions, regions)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "`temperature` .*above 0.* got 0"),
        ({"temperature": -1.0}, "`temperature` .*above 0.* got -1.0"),
        ({"temperature": float("inf")}, "`temperature` .*above 0.* got inf"),
        ({"temperature": float("nan")}, "`temperature` .*above 0.* got nan"),
        ({"negatives": "queue"}, r"`negatives` .*'process', 'all'.* got 'queue'"),
        ({"scale_weights": (1, 2)}, r"`scale_weights` .*3 weights, one per scale.* \[1, 2\]"),
        ({"scale_weights": (0, 0, 0)}, r"`scale_weights` .*not all 0.* got \(0, 0, 0\)"),
        ({"scale_weights": (1, -1, 3)}, r"`scale_weights` .*at least 0.* got \(1, -1, 3\)"),
        ({"scale_weights": 1.0}, r"`scale_weights` .*at least 0.* got 1.0"),
        ({"region_weights": (torch.ones(5, 1),)}, r"`region_weights` .*\(5, 9\).* \[\(5, 1\)\]"),
        (
            {"region_weights": [torch.ones(5, 1)] * 3},
            r"`region_weights` .*\[\(5, 1\), \(5, 4\), \(5, 9\)\].* \[\(5, 1\), \(5, 1\), \(5, "
            r"1\)\]",
        ),
        (
            {"excluded_labels": torch.zeros(5, 3)},
            r"`labels` .*class indices of shape \(5,\).* torch.float32 of shape \(5, 3\)",
        ),
        (
            {"excluded_labels": torch.zeros(1, dtype=torch.long)},
            r"`labels` .*class indices of shape \(5,\).* torch.int64 of shape \(1,\)",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(SettingError, match=message):
        multi_scale_contrastive_terms(*pair(), **settings)
