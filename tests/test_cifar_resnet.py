"""The 6n+2 networks in other forms than the benchmark's, against a second forward."""

from __future__ import annotations

import pytest
import torch
from network_oracles import Weights, forward_residual, randomize
from torch import Tensor

from mskd_plugin.backbones import CIFARResNet
from mskd_plugin.errors import SettingError


@pytest.mark.parametrize("settings", [{"depth": 14}, {"depth": 8, "widths": (5, 6, 7, 9)}])
def test_forward_equals_a_functional_one(settings: dict) -> None:
    model = CIFARResNet(**settings, out_indices=(0, 1, 2)).double().eval()
    randomize(model, seed=0)
    sums: list[Tensor] = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[-1].preact.register_forward_hook(lambda _m, _i, out: sums.append(out))
    images = torch.randn(
        2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    maps = model(images)

    fc = torch.nn.Linear(maps[-1].shape[1], 1, dtype=torch.float64)  # not compared
    weights = {**model.state_dict(), "fc.weight": fc.weight, "fc.bias": fc.bias}
    expected = forward_residual(Weights(weights), images, strides=(1, 2, 2), head="fc")
    torch.testing.assert_close(list(maps), expected.after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, expected.before, rtol=1e-12, atol=1e-12)


def test_both_sides_of_the_last_relu_can_be_recorded() -> None:
    model = CIFARResNet(depth=8)
    records: dict[str, Tensor] = {}
    for name in ("relu", "layer3", "layer3.0.preact"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: records.update({name: out})
        )
    model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert records["layer3.0.preact"].min() < 0
    assert torch.equal(records["layer3"], records["layer3.0.preact"].clamp(min=0))
    assert records["relu"].shape == (4, 16, 32, 32)
    assert records["relu"].min() == 0


@pytest.mark.parametrize("out_indices", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_out_indices_pick_the_maps(out_indices: tuple[int, ...]) -> None:
    model = CIFARResNet(depth=8, out_indices=(0, 1, 2)).eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    every = model(images)
    model.out_indices = out_indices
    assert [tuple(m.shape[1:]) for m in every] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    picked = CIFARResNet(depth=8, out_indices=out_indices).eval()
    picked.load_state_dict(model.state_dict())
    for got, index in zip(picked(images), out_indices, strict=True):
        assert torch.equal(got, every[index])


def test_images_of_other_sizes_and_channels() -> None:
    maps = CIFARResNet(depth=8, in_channels=1, out_indices=(0, 1, 2))(torch.rand(2, 1, 21, 30))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 21, 30), (2, 32, 11, 15), (2, 64, 6, 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 18}, "Expected `depth` to be 6n+2"),
        ({"depth": 2}, "Expected `depth` to be 6n+2"),
        ({"depth": 8, "widths": (16, 32, 64)}, "Expected `widths` to be four positive numbers"),
        ({"depth": 8, "widths": (16, 16, 0, 64)}, "Expected `widths` to be four positive numbers"),
        ({"depth": 8, "out_indices": (3,)}, "Expected `out_indices` to be stages out of"),
        ({"depth": 8, "out_indices": (1, 0)}, "Expected `out_indices` to be stages out of"),
        ({"depth": 8, "out_indices": (1, 1)}, "Expected `out_indices` to be stages out of"),
        ({"depth": 8, "out_indices": ()}, "Expected `out_indices` to be stages out of"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message.replace("+", r"\+")):
        CIFARResNet(**settings)
