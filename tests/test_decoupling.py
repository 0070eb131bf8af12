"""Decoupling against naive window loops, adaptive average pooling and hand values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import decouple as naive_decouple
from oracles import windows as naive_windows
from seeded import random
from tolerances import assert_close

from mskd_plugin.errors import SettingError
from mskd_plugin.functional import decouple, tokens_to_map, window_bounds

SIZES = [(4, 4), (7, 7), (8, 8), (7, 5), (6, 9)]


@pytest.mark.parametrize(
    ("size", "scale", "overlap", "expected"),
    [
        (7, 1, 0, [(0, 7)]),
        (7, 1, 0.5, [(0, 7)]),
        (7, 2, 0, [(0, 4), (3, 7)]),
        (7, 4, 0, [(0, 2), (1, 4), (3, 6), (5, 7)]),
        (8, 4, 0, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (8, 2, 0.5, [(0, 4), (2, 6), (4, 8)]),
        (8, 2, 0.3, [(0, 4), (3, 7), (4, 8)]),
        (7, 2, 0.5, [(0, 4), (2, 6), (3, 7)]),
        (7, 4, 0.5, [(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)]),
        (3, 3, 0.9, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_stand_where_the_rule_says(size, scale, overlap, expected):
    assert window_bounds(size, scale, overlap) == expected


@pytest.mark.parametrize("overlap", [0, 0.1, 0.3, 0.5, 0.75, 0.99])
def test_windows_equal_the_naive_rule_and_cover_every_position(overlap):
    for size in range(1, 18):
        for scale in range(1, size + 1):
            bounds = window_bounds(size, scale, overlap)
            assert bounds == naive_windows(size, scale, overlap)
            assert {i for start, stop in bounds for i in range(start, stop)} == set(range(size))
            assert all(0 <= start < stop <= size for start, stop in bounds)
            assert len(set(bounds)) == len(bounds)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_regions_equal_the_naive_means(size, overlap, dtype):
    scales = (1, 2, 4)
    feature_map = random(2, 3, *size, dtype=torch.float64).to(dtype)
    regions = decouple(feature_map, scales, overlap)
    expected = naive_decouple(feature_map.double().tolist(), scales, overlap)
    for scale, of_scale in zip(regions, expected, strict=True):
        assert scale.dtype == dtype
        assert_close(scale, of_scale, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_without_overlap_it_is_adaptive_average_pooling(size, scale):
    feature_map = random(2, 3, *size)
    (regions,) = decouple(feature_map, (scale,))
    assert_close(regions, F.adaptive_avg_pool2d(feature_map, scale).flatten(2).transpose(1, 2))


def test_order_and_choice_of_scales_only_select():
    feature_map = random(2, 3, 7, 7)
    one, two, four = decouple(feature_map, (1, 2, 4), 0.5)
    for scales, expected in (((4, 1), (four, one)), ([2], (two,))):
        got = decouple(feature_map, scales, 0.5)
        for actual, wanted in zip(got, expected, strict=True):
            assert_close(actual, wanted)


def test_defaults_are_scales_1_2_4_without_overlap():
    feature_map = random(2, 3, 7, 7)
    for actual, expected in zip(
        decouple(feature_map), decouple(feature_map, (1, 2, 4), 0.0), strict=True
    ):
        assert_close(actual, expected)
    assert [scale.shape[1] for scale in decouple(feature_map)] == [1, 4, 16]


def test_overlap_changes_the_regions():
    feature_map = random(2, 3, 8, 8)
    assert [scale.shape[1] for scale in decouple(feature_map, (1, 2), 0.5)] == [1, 9]
    # At 0.3 and 0.5 the windows of a scale are equally many and stand elsewhere.
    assert not torch.allclose(
        decouple(feature_map, (2,), 0.3)[0], decouple(feature_map, (2,), 0.5)[0]
    )


def test_maps_of_different_sizes_have_equal_regions_without_overlap():
    counts = [[r.shape[1] for r in decouple(random(1, 2, s, s), (1, 2, 4))] for s in (4, 7, 14)]
    assert counts == [[1, 4, 16]] * 3


def test_pooled_vectors_are_a_map_of_one_position():
    pooled = random(3, 5)
    (regions,) = decouple(pooled, (1,))
    assert_close(regions, pooled[:, None, :])


def test_channels_last_gives_the_same():
    feature_map = random(2, 6, 7, 7)
    last = feature_map.to(memory_format=torch.channels_last)
    assert last.stride() != feature_map.stride()
    for actual, expected in zip(decouple(last), decouple(feature_map), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("overlap", [0, 0.5])
def test_gradient(overlap):
    feature_map = random(2, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decouple(x, (1, 2, 4), overlap), feature_map)


def test_a_pass_under_inference_mode_leaves_training_usable():
    # 13 x 11 is used nowhere else, so that this is the first use of its pooling matrix.
    feature_map = random(2, 3, 13, 11)
    with torch.inference_mode():
        teacher = decouple(feature_map)
    student_map = feature_map.clone().requires_grad_()
    student = decouple(student_map)
    sum((s * t.clone()).sum() for s, t in zip(student, teacher, strict=True)).backward()
    assert student_map.grad.abs().sum() > 0


def test_a_pass_on_the_meta_device_leaves_the_cpu_usable():
    feature_map = random(2, 3, 11, 13)  # a size used nowhere else
    with torch.device("meta"):
        shapes = [regions.shape for regions in decouple(torch.empty(2, 3, 11, 13))]
    regions = decouple(feature_map)
    assert shapes == [r.shape for r in regions]
    assert_close(regions[0][:, 0], feature_map.mean((2, 3)))


def test_tokens_are_laid_out_row_by_row():
    feature_map = random(2, 3, 4, 4)
    tokens = feature_map.flatten(2).transpose(1, 2)
    assert_close(tokens_to_map(tokens), feature_map)
    with_class_tokens = torch.cat([random(2, 2, 3, seed=1), tokens], dim=1)
    assert_close(tokens_to_map(with_class_tokens, class_tokens=2), feature_map)


def test_tokens_of_a_grid_that_is_no_square():
    feature_map = random(2, 3, 2, 8)
    tokens = feature_map.flatten(2).transpose(1, 2)
    assert_close(tokens_to_map(tokens, map_size=(2, 8)), feature_map)
    # 16 tokens fill a square too, so only `map_size` tells the two apart.
    assert tokens_to_map(tokens).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("scales", "got"),
    [
        ((), r"\(\)"),
        (2, "2"),
        ("124", "'124'"),
        ((1, 1), r"\(1, 1\)"),
        ((0, 1), r"\(0, 1\)"),
        ((-1,), r"\(-1,\)"),
        ((1.0, 2), r"\(1.0, 2\)"),
        ((True,), r"\(True,\)"),
    ],
)
def test_malformed_scales(scales, got):
    with pytest.raises(SettingError, match=rf"`scales` .*distinct positive integers.* got {got}"):
        decouple(random(1, 2, 8, 8), scales)


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5, "0.5", None, True, float("nan")])
def test_malformed_overlap(overlap):
    with pytest.raises(SettingError, match=rf"`overlap` .*\[0, 1\).* got {overlap!r}"):
        decouple(random(1, 2, 8, 8), (1,), overlap)


@pytest.mark.parametrize("overlap", [0, 0.5])
@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (1, 2, 8, 3), (1, 2, 3, 8), (1, 2)])
def test_a_scale_larger_than_the_map(shape, overlap):
    side = min(shape[2:], default=1)
    with pytest.raises(SettingError, match=rf"`scales` .* scale 4 for a side of {side}"):
        decouple(random(*shape), (1, 4), overlap)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_a_tensor_that_is_no_map(shape):
    with pytest.raises(SettingError, match=r"`feature_map` .*\(N, C, H, W\) or \(N, C\)") as caught:
        decouple(random(*shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_map_of_whole_numbers(dtype):
    with pytest.raises(SettingError, match=f"`feature_map` .*floating dtype, but got {dtype}"):
        decouple(torch.ones(1, 2, 8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("length", "class_tokens", "map_size", "message"),
    [
        (17, 0, None, r"`class_tokens` .*square.* 0 of 17 tokens"),
        (16, 1, None, r"`class_tokens` .*square.* 1 of 16 tokens"),
        (2, 2, None, r"`class_tokens` .*square.* 2 of 2 tokens"),
        (2, 5, None, r"`class_tokens` .*square.* 5 of 2 tokens"),
        (17, 1, (3, 5), r"`map_size` .*H W = 16 patch tokens, but got \(3, 5\)"),
    ],
)
def test_tokens_that_fill_no_grid(length, class_tokens, map_size, message):
    with pytest.raises(SettingError, match=message):
        tokens_to_map(random(2, length, 3), class_tokens, map_size)
