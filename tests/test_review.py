"""ReviewKD's widths, initialisation and levels; test_map_losses.py has its loss."""

from __future__ import annotations

import math

import map_oracles as oracles
import pytest
from test_map_losses import build, lists, random, review_oracle, shaken
from tolerances import assert_close

from mskd_plugin.errors import SettingError
from mskd_plugin.losses.review import hierarchical_context_loss


@pytest.mark.parametrize(("pooled", "width"), [(500, 500), (600, 512)])
def test_the_fused_maps_of_review_have_512_channels_at_most(pooled, width):
    fusion = build("ReviewKDLoss", in_channels=(3, pooled), out_channels=(2, 5)).chain.fusions[0]
    assert fusion.conv1[0].out_channels == width
    # Kaiming's initialisation with a = 1: uniform up to the root of 3 over the fan-in.
    for convolution, fan_in in ((fusion.conv1[0], 3), (fusion.conv2[0], 9 * width)):
        bound = math.sqrt(3 / fan_in)
        assert 0.99 * bound < convolution.weight.abs().max() <= bound


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (8, 8), (5, 3), (3, 5), (1, 6)], ids=str)
def test_the_levels_of_review_are_those_below_the_maps_height(size):
    student, teacher = random(2, 3, *size, seed=1), random(2, 3, *size, seed=2)
    expected = oracles.hierarchical_context(lists(student), lists(teacher))
    assert_close(hierarchical_context_loss(student, teacher), expected)


def test_six_stages_and_no_more():
    student = {f"student_stage{i}": random(3, 2, 8 - i, 8 - i, seed=i) for i in range(1, 7)}
    teacher = {f"teacher_stage{i}": random(3, 1, 9 - i, 9 - i, seed=9 + i) for i in range(1, 7)}
    pooled = {f"{side}_pooled": random(3, 3, seed=len(side)) for side in ("student", "teacher")}
    settings = dict(in_channels=(*[2] * 6, 3), out_channels=(*[1] * 6, 3))
    loss, case = shaken(build("ReviewKDLoss", **settings)), {**student, **teacher, **pooled}
    assert_close(loss(**case), review_oracle(loss, case))
    with pytest.raises(SettingError, match="`in_channels`.*2 to 7"):
        build("ReviewKDLoss", in_channels=(2,) * 8, out_channels=(1,) * 8)
