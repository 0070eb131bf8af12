"""OFA's branch of tokens against the naive loops, its initialisation, its size and what it
refuses."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from seeded import random
from token_oracles import ofa_branch
from tolerances import assert_close

from mskd_plugin.connectors import OFATokenBranch
from mskd_plugin.connectors.ofa import count_mergings
from mskd_plugin.errors import SettingError

F64 = torch.float64


def branch(seed=0, **settings):
    torch.manual_seed(seed)
    built = MODELS.build({"type": "mmrazor.OFATokenBranch", **settings}).double()
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


CASES = [
    dict(in_channels=8, hidden_channels=8, map_size=(4, 6)),
    dict(in_channels=8, hidden_channels=8, map_size=(14, 14), num_blocks=3),
    dict(in_channels=3, hidden_channels=8, map_size=(14, 16), num_blocks=2),
    dict(in_channels=3, hidden_channels=8, map_size=(28, 28)),
    dict(in_channels=2, hidden_channels=4, map_size=(56, 56)),
    dict(in_channels=8, hidden_channels=8, map_size=(14, 14), class_tokens=1, num_blocks=2),
    dict(in_channels=8, hidden_channels=8, map_size=(14, 14), class_tokens=2),
    dict(in_channels=8, hidden_channels=8, map_size=(14, 14), class_tokens=1, num_blocks=2,
         pool="class_token"),
    dict(in_channels=8, hidden_channels=8, map_size=(28, 28), class_tokens=1, pool="class_token"),
]  # fmt: skip


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_branch_equals_the_naive_loops(settings):
    built = branch(num_classes=5, **settings)
    height, width = settings["map_size"]
    of_class = settings.get("class_tokens", 0)
    tokens = random(2, of_class + height * width, settings["in_channels"], seed=1)
    expected = ofa_branch(
        built.state_dict(), tokens, (height, width), of_class, settings.get("pool", "average")
    )
    assert built(tokens).shape == (2, 5)
    assert_close(built(tokens), expected)
    assert_close(built((tokens, (height, width))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_branch_in_low_precision(dtype):
    built = branch(num_classes=5, **CASES[1]).float()
    tokens = random(2, 196, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = built(tokens)
    assert logits.dtype == dtype
    assert_close(logits, built.double()(tokens.double()), dtype)


def test_a_class_token_has_no_effect_on_the_average():
    settings = dict(in_channels=8, hidden_channels=8, num_classes=5, map_size=(14, 14))
    average = branch(**settings, class_tokens=1)
    reads = branch(**settings, class_tokens=1, pool="class_token")
    tokens = random(2, 197, 8).requires_grad_()
    other = tokens.detach().clone()
    other[:, 0] += 1
    assert torch.equal(average(tokens), average(other))
    assert torch.equal(average(tokens), branch(**settings)(tokens[:, 1:]))
    assert (reads(tokens) - reads(other)).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(average(tokens).square().sum(), tokens)
    assert not gradient[:, 0].any() and (gradient[:, 1:].abs().amax(2) > 0).all()
    (gradient,) = torch.autograd.grad(reads(tokens).square().sum(), tokens)
    assert (gradient.abs().amax(2) > 0).all()


@pytest.mark.parametrize("pool", ["average", "class_token"])
def test_gradients_reach_every_parameter_of_the_branch(pool):
    built = branch(in_channels=8, hidden_channels=8, num_classes=5, map_size=(28, 28),
                   num_blocks=2, class_tokens=1, pool=pool)  # fmt: skip
    built(random(2, 1 + 28 * 28, 8)).square().sum().backward()
    # A bias of keys would have none; there is no such bias.
    assert all(p.grad.abs().max() > 0 for p in built.parameters())


def test_the_branch_starts_from_the_published_initialisation():
    torch.manual_seed(0)
    built = OFATokenBranch(96, 768, 100, map_size=(56, 56), num_blocks=2)
    for _ in range(2):
        for name, parameter in built.named_parameters():
            if parameter.dim() == 2:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            else:
                norm = name.endswith("weight")
                assert (parameter == (1 if norm else 0)).all(), name
        built.init_weights()


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_the_blocks_have_the_published_number_and_width(num_blocks):
    h = 8
    built = OFATokenBranch(h, h, 5, map_size=(4, 4), num_blocks=num_blocks)
    # Two norms; queries, keys and values without a bias and the output; a layer of 4 h and back.
    block = 4 * h + (3 * h * h + h * h + h) + (4 * h * h + 4 * h + 4 * h * h + h)
    assert len(built.blocks) == num_blocks
    assert len(OFATokenBranch(h, h, 5, map_size=(4, 4)).blocks) == 1
    assert sum(p.numel() for p in built.blocks.parameters()) == num_blocks * block


def test_mergings_are_the_published_number():
    for side in range(1, 120):
        assert count_mergings((side, side)) == max(
            next(k for k in range(-8, 9) if 7 * 2.0**k <= side < 7 * 2.0 ** (k + 1)), 0
        )
    # Of another grid, the side of the square of as many patches counts.
    assert count_mergings((7, 28)) == count_mergings((28, 7)) == 1


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(in_channels=0), "in_channels.*at least 1.*0"),
        (dict(hidden_channels=0), "hidden_channels.*at least 1.*0"),
        (dict(hidden_channels=6, in_channels=6), "hidden_channels.*multiple of 4.*6"),
        (dict(num_classes=True), "num_classes.*True"),
        (dict(num_blocks=0), "num_blocks.*at least 1.*0"),
        (dict(map_size=(14,)), r"map_size.*\(14,\)"),
        (dict(map_size=None), "map_size.*None"),
        (dict(pool="max"), "pool.*'average', 'class_token'.*'max'"),
        (dict(class_tokens=-1), "class_tokens.*-1"),
        (dict(pool="class_token"), "class_tokens.*1 for the pool.*0"),
        (dict(map_size=(13, 13)), r"hidden_channels.*stage's 4.*13 x 13.*8"),
        (dict(pool="class_token", class_tokens=1), "hidden_channels.*4.*class token.*8"),
    ],
)
def test_the_branch_refuses_settings(settings, match):
    good = dict(in_channels=4, hidden_channels=8, num_classes=3, map_size=(14, 14))
    with pytest.raises(SettingError, match=match):
        OFATokenBranch(**{**good, **settings})


def test_the_branch_refuses_inputs():
    built = OFATokenBranch(4, 8, 3, map_size=(14, 14), class_tokens=1)
    for shape in ((2, 196, 4), (2, 197, 5), (2, 14, 14, 4)):
        with pytest.raises(SettingError, match="feature.*tokens"):
            built(torch.zeros(shape))
