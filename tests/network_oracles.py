"""The benchmark's networks once more, as plain functions of weights under their published names.

Each ``forward_*`` takes weights and images and returns the maps before and after the last ReLU of
each stage, and the logits. ``published_names`` says which of this project's names those are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Start of the name of a network -> what its published file calls the classifier.
CLASSIFIERS = {
    "resnet": "fc",
    "ResNet": "linear",
    "wrn": "fc",
    "vgg": "classifier",
    "MobileNetV2": "classifier.0",
    "Shuffle": "linear",
    "mobilenet_v1": "fc",
}


def published_names(net: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a classifier's weights as the published checkpoint of ``net`` does."""
    fc = next(name for start, name in CLASSIFIERS.items() if net.startswith(start))
    named = {}
    for key, value in state_dict.items():
        key = key.replace("backbone.", "").replace("head.fc", fc)
        if net.startswith("ResNet"):
            key = key.replace("downsample", "shortcut")
        named[key] = value
    return named


@dataclass
class Maps:
    """What a forward returns."""

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None

    def end_stage(self, before: Tensor, after: Tensor) -> None:
        self.before.append(before)
        self.after.append(after)


class Weights:
    """Weights by name, which remembers what was asked for."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values, self.used = values, set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.values[name]

    def unused(self) -> list[str]:
        return [k for k in self.values if k not in self.used and "num_batches" not in k]

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self[f"{name}.weight"]
        bias = self[f"{name}.bias"] if f"{name}.bias" in self else None
        return functional.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def depthwise(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return self.conv(x, name, stride, groups=x.shape[1])

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = self[f"{name}.weight"] / torch.sqrt(self[f"{name}.running_var"] + 1e-5)
        shift = self[f"{name}.bias"] - self[f"{name}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x.mean((2, 3)) @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def blocks(self, stage: str, probe: str = "conv1.weight") -> Iterator[tuple[int, str]]:
        index = 0
        while f"{stage}.{index}.{probe}" in self:
            yield index, f"{stage}.{index}"
            index += 1


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def shuffle(x: Tensor, groups: int) -> Tensor:
    count = x.shape[1] // groups
    return x[:, [g * count + i for i in range(count) for g in range(groups)]]


def forward_residual(w: Weights, images: Tensor, strides: tuple[int, ...], head: str) -> Maps:
    x, maps = relu(w.norm(w.conv(images, "conv1"), "bn1")), Maps()
    for stage, stage_stride in enumerate(strides, start=1):
        for index, name in w.blocks(f"layer{stage}"):
            stride = stage_stride if index == 0 else 1
            if f"{name}.conv3.weight" in w:
                y = relu(w.norm(w.conv(x, f"{name}.conv1"), f"{name}.bn1"))
                y = relu(w.norm(w.conv(y, f"{name}.conv2", stride), f"{name}.bn2"))
                y = w.norm(w.conv(y, f"{name}.conv3"), f"{name}.bn3")
            else:
                y = relu(w.norm(w.conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
                y = w.norm(w.conv(y, f"{name}.conv2"), f"{name}.bn2")
            for shortcut in (f"{name}.downsample", f"{name}.shortcut"):
                if f"{shortcut}.0.weight" in w:
                    x = w.norm(w.conv(x[..., ::stride, ::stride], f"{shortcut}.0"), f"{shortcut}.1")
            total = x + y
            x = relu(total)
        maps.end_stage(total, x)
    maps.logits = w.linear(x, head)
    return maps


def forward_wide(w: Weights, images: Tensor) -> Maps:
    """Return the raw sums as the maps after, the normalised ones as those before the ReLU."""
    x, maps = w.conv(images, "conv1"), Maps()
    for stage in (1, 2, 3):
        for index, name in w.blocks(f"block{stage}.layer"):
            stride = 2 if stage > 1 and index == 0 else 1
            active = relu(w.norm(x, f"{name}.bn1"))
            y = relu(w.norm(w.conv(active, f"{name}.conv1", stride), f"{name}.bn2"))
            y = w.conv(y, f"{name}.conv2")
            if f"{name}.convShortcut.weight" in w:
                x = w.conv(active, f"{name}.convShortcut", stride)
            x = x + y
        following = "bn1" if stage == 3 else f"block{stage + 1}.layer.0.bn1"
        maps.end_stage(w.norm(x, following), x)
    maps.logits = w.linear(relu(maps.before[-1]), "fc")
    return maps


def forward_vgg(w: Weights, images: Tensor) -> Maps:
    x, maps = images, Maps()
    for block in range(5):
        layer = 0
        while f"block{block}.{layer}.weight" in w:
            before = w.norm(w.conv(x, f"block{block}.{layer}"), f"block{block}.{layer + 1}")
            x = relu(before)
            layer += 3
        if block > 0:
            maps.end_stage(before, x)
        if block < 3:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    maps.logits = w.linear(x, "classifier")
    return maps


def forward_mobilenet_v2(w: Weights, images: Tensor) -> Maps:
    x, maps = relu(w.norm(w.conv(images, "conv1.0", 2), "conv1.1")), Maps()
    for stage, stage_stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        for index, block in w.blocks(f"blocks.{stage}", "conv.0.weight"):
            name, stride = f"{block}.conv", stage_stride if index == 0 else 1
            y = relu(w.norm(w.conv(x, f"{name}.0"), f"{name}.1"))
            y = relu(w.norm(w.depthwise(y, f"{name}.3", stride), f"{name}.4"))
            y = w.norm(w.conv(y, f"{name}.6"), f"{name}.7")
            x = x + y if stride == 1 and x.shape == y.shape else y
        if stage in (1, 2, 4, 6):
            maps.end_stage(x, x)
    maps.logits = w.linear(relu(w.norm(w.conv(x, "conv2.0"), "conv2.1")), "classifier.0")
    return maps


def forward_shuffle_v1(w: Weights, images: Tensor) -> Maps:
    x, maps = relu(w.norm(w.conv(images, "conv1"), "bn1")), Maps()
    for stage in (1, 2, 3):
        for index, name in w.blocks(f"layer{stage}"):
            groups = 1 if stage == 1 and index == 0 else 3
            y = relu(w.norm(w.conv(x, f"{name}.conv1", groups=groups), f"{name}.bn1"))
            y = w.depthwise(shuffle(y, groups), f"{name}.conv2", 2 if index == 0 else 1)
            y = w.conv(relu(w.norm(y, f"{name}.bn2")), f"{name}.conv3", groups=3)
            y = w.norm(y, f"{name}.bn3")
            # The mean over nine positions, those outside the image counted as zeros.
            box = torch.full((x.shape[1], 1, 3, 3), 1 / 9, dtype=x.dtype)
            pooled = functional.conv2d(x, box, stride=2, padding=1, groups=x.shape[1])
            total = torch.cat([y, pooled], 1) if index == 0 else x + y
            x = relu(total)
        maps.end_stage(total, x)
    maps.logits = w.linear(x, "linear")
    return maps


def forward_shuffle_v2(w: Weights, images: Tensor) -> Maps:
    x, maps = relu(w.norm(w.conv(images, "conv1"), "bn1")), Maps()
    for stage in (1, 2, 3):
        for index, name in w.blocks(f"layer{stage}"):
            if index == 0:
                left = w.norm(w.depthwise(x, f"{name}.conv1", 2), f"{name}.bn1")
                left = relu(w.norm(w.conv(left, f"{name}.conv2"), f"{name}.bn2"))
                y = relu(w.norm(w.conv(x, f"{name}.conv3"), f"{name}.bn3"))
                y = w.norm(w.depthwise(y, f"{name}.conv4", 2), f"{name}.bn4")
                right = w.norm(w.conv(y, f"{name}.conv5"), f"{name}.bn5")
            else:
                half = x.shape[1] // 2
                left, y = x[:, :half], x[:, half:]
                y = relu(w.norm(w.conv(y, f"{name}.conv1"), f"{name}.bn1"))
                y = w.norm(w.depthwise(y, f"{name}.conv2"), f"{name}.bn2")
                right = w.norm(w.conv(y, f"{name}.conv3"), f"{name}.bn3")
            before = shuffle(torch.cat([left, right], 1), 2)
            x = shuffle(torch.cat([left, relu(right)], 1), 2)
        maps.end_stage(before, x)
    maps.logits = w.linear(relu(w.norm(w.conv(x, "conv2"), "bn2")), "linear")
    return maps


def forward_mobilenet_v1(w: Weights, images: Tensor) -> Maps:
    x, maps = relu(w.norm(w.conv(images, "model.0.0", 2), "model.0.1")), Maps()
    for pair in range(1, 14):
        y = w.depthwise(x, f"model.{pair}.0", 2 if pair in (2, 4, 6, 12) else 1)
        y = relu(w.norm(y, f"model.{pair}.1"))
        before = w.norm(w.conv(y, f"model.{pair}.3"), f"model.{pair}.4")
        x = relu(before)
        if pair in (3, 5, 11, 13):
            maps.end_stage(before, x)
    maps.logits = w.linear(x, "fc")
    return maps


#: Pattern of a network's name -> its forward.
FORWARDS: dict[str, Callable[[Weights, Tensor], Maps]] = {
    r"resnet\d+(x4)?": lambda w, x: forward_residual(w, x, (1, 2, 2), "fc"),
    r"ResNet\d+": lambda w, x: forward_residual(w, x, (1, 2, 2, 2), "linear"),
    r"wrn_.*": forward_wide,
    r"vgg.*": forward_vgg,
    r"MobileNetV2": forward_mobilenet_v2,
    r"ShuffleV1": forward_shuffle_v1,
    r"ShuffleV2": forward_shuffle_v2,
    r"mobilenet_v1": forward_mobilenet_v1,
}


def forward(net: str, weights: Mapping[str, Tensor], images: Tensor) -> tuple[Maps, list[str]]:
    """Return the maps of a network, and the weights that they do not depend on."""
    compute = next(f for pattern, f in FORWARDS.items() if re.fullmatch(pattern, net))
    named = Weights(weights)
    return compute(named, images), named.unused()


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights and statistics so that activations keep their order of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        elif value.ndim > 1:
            drawn *= (2 / value[0].numel()) ** 0.5
        else:
            drawn = 0.3 * drawn + name.endswith("weight")
        value.copy_(drawn)


def count_mega_macs(model: nn.Module, images: Tensor) -> float:
    """Count multiply-adds of convolutions and linear layers for one image, in millions."""
    total = 0

    def count(module: nn.Module, _: tuple, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel_height, kernel_width = module.kernel_size
            per_output = module.in_channels // module.groups * kernel_height * kernel_width
        else:
            per_output = module.in_features
        total += output[0].numel() * per_output

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    return total / 1e6
