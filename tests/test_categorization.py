"""Sample categorization against naive loops and a case set by hand."""

from __future__ import annotations

import pytest
import torch
from oracles import consistent as naive_consistent

from mskd_plugin.errors import SettingError
from mskd_plugin.functional import consistent_regions


def random_case(counts=(1, 4, 9), size=8, width=6, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    regions = [torch.randn(size, r, width, generator=generator, dtype=dtype) for r in counts]
    weight = torch.randn(classes, width, generator=generator, dtype=dtype)
    bias = torch.randn(classes, generator=generator, dtype=dtype)
    # Every second image's label is the class predicted for it, so that both kinds of image occur.
    predicted = (regions[counts.index(1)][:, 0] @ weight.T + bias).argmax(1)
    labels = torch.randint(0, classes, (size,), generator=generator)
    labels[::2] = predicted[::2]
    return regions, labels, weight, bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("counts", [(1,), (1, 4, 9), (4, 1)])
def test_categories_equal_the_naive_loops(counts, with_bias):
    regions, labels, weight, bias = random_case(counts)
    bias = bias if with_bias else None
    got = consistent_regions(regions, labels, weight, bias)
    expected = naive_consistent(
        [scale.tolist() for scale in regions],
        labels.tolist(),
        weight.tolist(),
        None if bias is None else bias.tolist(),
    )
    assert [scale.tolist() for scale in got] == expected
    assert all(scale.dtype == torch.bool for scale in got)


def test_the_random_case_holds_all_four_kinds():
    regions, labels, weight, bias = random_case()
    right = [((scale @ weight.T + bias).argmax(-1) == labels[:, None]) for scale in regions]
    pairs = {
        (bool(image), bool(region))
        for scale in right[1:]
        for image, row in zip(right[0][:, 0], scale, strict=True)
        for region in row
    }
    assert pairs == {(True, True), (True, False), (False, True), (False, False)}


def test_a_case_by_hand():
    # Two classes, told by the larger coordinate. Image 0 is predicted right, image 1 wrong.
    regions = (
        torch.tensor([[[2.0, 1.0]], [[2.0, 1.0]]]),
        torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [0.0, 3.0]]]),
    )
    of_global, of_regions = consistent_regions(regions, torch.tensor([0, 1]), torch.eye(2))
    assert of_global.tolist() == [[True], [True]]
    assert of_regions.tolist() == [[True, False], [True, False]]
    # The bias turns every prediction to class 1: image 0 is wrong everywhere, image 1 right.
    always_1 = torch.tensor([0.0, 9.0])
    of_regions = consistent_regions(regions, torch.tensor([0, 1]), torch.eye(2), always_1)[1]
    assert of_regions.all()


def test_autocast_changes_no_category():
    # The logits 1 and 1.001 are one number in bfloat16, where the first class would win.
    regions = (torch.tensor([[[1.0, 1.001]]]), torch.tensor([[[1.001, 1.0], [1.0, 1.001]]]))
    labels, weight = torch.tensor([1]), torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = consistent_regions(regions, labels, weight)
    assert got[1].tolist() == [[False, True]]


def test_half_precision_regions_meet_the_classifier_in_its_precision():
    regions, labels, weight, bias = random_case(dtype=torch.float32)
    halves = [scale.bfloat16() for scale in regions]
    got = consistent_regions(halves, labels, weight, bias)
    expected = consistent_regions([scale.float() for scale in halves], labels, weight, bias)
    assert [scale.tolist() for scale in got] == [scale.tolist() for scale in expected]


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.zeros(8), r"torch.float32 of shape \(8,\)"),
        (torch.zeros(8, 5), r"torch.float32 of shape \(8, 5\)"),
        (torch.zeros(8, 1, dtype=torch.long), r"torch.int64 of shape \(8, 1\)"),
        (torch.zeros(1, dtype=torch.long), r"torch.int64 of shape \(1,\)"),
        (torch.zeros(7, dtype=torch.long), r"torch.int64 of shape \(7,\)"),
        (torch.zeros(8, dtype=torch.bool), r"torch.bool of shape \(8,\)"),
        (torch.zeros(8, dtype=torch.int32), r"torch.int32 of shape \(8,\)"),
        ([0] * 8, "a list"),
    ],
)
def test_labels_that_are_no_class_indices(labels, got):
    regions, _, weight, bias = random_case()
    with pytest.raises(SettingError, match=rf"`labels` .*class indices of shape \(8,\).* {got}"):
        consistent_regions(regions, labels, weight, bias)


def test_a_classifier_that_does_not_read_this_stage():
    regions, labels, weight, bias = random_case()
    with pytest.raises(SettingError, match=r"`classifier_weight` .*\(M, 6\).* shape \(5, 3\)"):
        consistent_regions(regions, labels, weight[:, :3], bias)
    with pytest.raises(SettingError, match=r"`classifier_weight` .*\(M, 6\).* shape \(30,\)"):
        consistent_regions(regions, labels, weight.flatten(), bias)
    with pytest.raises(SettingError, match=r"`classifier_bias` .*\(5,\).* shape \(4,\)"):
        consistent_regions(regions, labels, weight, bias[:4])


def test_scales_without_the_global_feature():
    regions, labels, weight, bias = random_case()
    with pytest.raises(SettingError, match=r"`scales` .*contain 1.* per scale \(4, 9\)"):
        consistent_regions(regions[1:], labels, weight, bias)
