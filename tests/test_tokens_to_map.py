"""The layout of tokens as a map."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from seeded import random
from token_oracles import laid_out
from tolerances import assert_close

from mskd_plugin.connectors import MultiScaleDecouplingConnector, TokensToMapConnector
from mskd_plugin.errors import SettingError


@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_the_layout_equals_the_naive_loops(class_tokens):
    tokens = random(2, class_tokens + 9, 3)
    connector = MODELS.build({"type": "mmrazor.TokensToMapConnector", "class_tokens": class_tokens})
    expected = laid_out(tokens, class_tokens)
    assert_close(connector(tokens), expected)
    assert_close(connector((tokens, (3, 3))), expected)  # as Swin's stages give it
    assert not list(connector.parameters())


def test_the_size_of_the_grid_counts():
    tokens = random(1, 8, 2)
    wide = TokensToMapConnector(map_size=(2, 4))(tokens)
    assert wide.shape == (1, 2, 2, 4)
    assert_close(wide[0, 1, 1], tokens[0, 4:, 1])
    assert "class_tokens=0, map_size=(2, 4)" in repr(TokensToMapConnector(map_size=[2, 4]))
    with pytest.raises(SettingError, match="class_tokens.*square.*8 tokens"):
        TokensToMapConnector()(tokens)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_the_size_that_a_record_states_goes_before_a_square(class_tokens):
    tokens = random(1, class_tokens + 16, 3)  # 2 x 8 tokens, as of a wide image, or 4 x 4
    record, positions = (tokens, (2, 8)), tokens[:, class_tokens:]
    wide = TokensToMapConnector(class_tokens)(record)
    assert_close(wide, torch.stack([positions[:, :8], positions[:, 8:]], 1).permute(0, 3, 1, 2))
    quarters = MultiScaleDecouplingConnector((2,), class_tokens=class_tokens)(record)[0]
    starts = (0, 4, 8, 12)
    expected = torch.stack([positions[:, start : start + 4].mean(1) for start in starts], 1)
    assert_close(quarters, expected)
    square = TokensToMapConnector(class_tokens)
    assert_close(square((tokens, (7, 7))), square(tokens))  # the size of something else
    stated = TokensToMapConnector(class_tokens, map_size=(8, 2))
    assert_close(stated(record), stated(tokens))


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(class_tokens=-1), "class_tokens.*at least 0.*-1"),
        (dict(class_tokens=True), "class_tokens.*True"),
        (dict(map_size=(2,)), r"map_size.*\(2,\)"),
        (dict(map_size=(2, 0)), r"map_size.*\(2, 0\)"),
        (dict(map_size=7), "map_size.*7"),
    ],
)
def test_the_layout_refuses_settings(settings, match):
    with pytest.raises(SettingError, match=match):
        TokensToMapConnector(**settings)


@pytest.mark.parametrize("record", [torch.zeros(2, 3, 4, 4), (torch.zeros(2, 3),), (), None])
def test_the_layout_refuses_what_is_no_sequence(record):
    with pytest.raises(SettingError, match=r"feature.*tokens \(N, L, C\)"):
        TokensToMapConnector()(record)
