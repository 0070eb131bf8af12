"""Naive float64 forms of what reads token sequences, and tiny networks of tokens.

Nothing here is shared with the package but the host's networks.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import toy
from torch import Tensor

from mskd_plugin.networks import NETWORKS

#: Side of the tiny networks' images; patches of the side 4 make grids of 14 x 14.
SIDE, PATCH, WIDTH = 56, 4, 16


def _tiny(name: str, width: int, stages: tuple[tuple[str, int], ...], **settings):
    net = NETWORKS[name]
    backbone = {**net.backbone, **settings}
    final = (net.final[0], width)
    return dataclasses.replace(
        net, backbone=backbone, width=width, stages=stages, final=final, num_classes=100
    )


_LAYERS = tuple((f"backbone.layers.{k}", WIDTH) for k in range(4))
_WIDTHS = (8, 8, 12, 16)
_WHOLE = {"img_size": SIDE, "patch_size": PATCH}

#: Transformers, an MLP and convolutional networks of one layer a stage.
TINY = {
    "tiny_vit": _tiny(
        "deit_t", WIDTH, _LAYERS, **_WHOLE,
        arch=dict(embed_dims=WIDTH, num_layers=4, num_heads=2, feedforward_channels=32),
    ),
    "tiny_mixer": _tiny(
        "mixer_b16", WIDTH, _LAYERS, **_WHOLE,
        arch=dict(embed_dims=WIDTH, num_layers=4, tokens_mlp_dims=8, channels_mlp_dims=32),
    ),
    "tiny_swin": _tiny(
        "swin_t", 64, tuple((f"backbone.stages.{k}", 8 * 2**k) for k in range(4)),
        arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[2] * 4),
        img_size=SIDE, patch_size=1, pad_small_map=True,
    ),
    "tiny_convnext": _tiny(
        "convnext_t", 16, tuple((f"backbone.stages.{k}", w) for k, w in enumerate(_WIDTHS)),
        arch=dict(depths=[1] * 4, channels=list(_WIDTHS)), stem_patch_size=1,
    ),
    "tiny_cnn": dataclasses.replace(
        NETWORKS["resnet8"],
        backbone=dict(type="CIFARResNet", depth=8, widths=toy.WIDTHS["student"]),
        width=8,
        stages=tuple((f"backbone.layer{k}", w) for k, w in enumerate((4, 6, 8), start=1)),
        final=("backbone.layer3", 8),
    ),
}  # fmt: skip


def laid_out(tokens: Tensor, class_tokens: int) -> list:
    """Tokens (N, L, C) as a map [N][C][H][W]: position (y, x) is token y W + x behind the class
    tokens."""
    rows = tokens.detach().double().tolist()
    side = math.isqrt(len(rows[0]) - class_tokens)
    return [
        [
            [[image[class_tokens + y * side + x][c] for x in range(side)] for y in range(side)]
            for c in range(len(image[0]))
        ]
        for image in rows
    ]


def _normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _attention(x: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """One image's tokens (L, D); the rows of ``qkv`` are queries, keys, values, head by head."""
    length, width = x.shape
    size = width // heads
    out = torch.empty_like(x)
    for h in range(heads):
        q, k, v = (
            x @ qkv[part * width + h * size : part * width + (h + 1) * size].T for part in range(3)
        )
        for i in range(length):
            scores = torch.exp(k @ q[i] / math.sqrt(size))
            out[i, h * size : (h + 1) * size] = (scores / scores.sum()) @ v
    return out


def ofa_branch(
    state: dict[str, Tensor],
    tokens: Tensor,
    map_size: tuple[int, int],
    class_tokens: int,
    pool: str,
) -> Tensor:
    """The published branch, by its parameters: one image after the other, neighbours by index."""
    mergings = len({name.split(".")[1] for name in state if name.startswith("mergings.")})
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    logits = []
    for image in tokens:
        classes, (height, width) = image[:class_tokens], map_size
        grid = image[class_tokens:].reshape(height, width, -1)
        for m in range(mergings):
            part = {n.removeprefix(f"mergings.{m}."): v for n, v in state.items()}
            merged = []
            for y in range(height // 2):
                for x in range(width // 2):
                    near = [grid[2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)]
                    joined = torch.stack(near, dim=1).flatten()  # channel by channel
                    normed = _normalized(joined, part["norm.weight"], part["norm.bias"])
                    merged.append(part["reduction.weight"] @ normed)
            height, width = height // 2, width // 2
            grid = torch.stack(merged).reshape(height, width, -1)
            if m == 0 or m < mergings - 1:
                grid = _gelu(grid)
        x = grid.reshape(height * width, -1)
        if pool == "class_token":
            x = torch.cat([classes, x])
        for b in range(blocks):
            part = {n.removeprefix(f"blocks.{b}."): v for n, v in state.items()}
            normed = _normalized(x, part["ln1.weight"], part["ln1.bias"])
            attended = _attention(normed, part["attn.qkv.weight"], heads=4)
            x = x + attended @ part["attn.proj.weight"].T + part["attn.proj.bias"]
            normed = _normalized(x, part["ln2.weight"], part["ln2.bias"])
            wide = normed @ part["ffn.layers.0.0.weight"].T + part["ffn.layers.0.0.bias"]
            x = x + _gelu(wide) @ part["ffn.layers.1.weight"].T + part["ffn.layers.1.bias"]
        pooled = x[0] if pool == "class_token" else sum(x) / len(x)
        logits.append(state["fc.weight"] @ pooled + state["fc.bias"])
    return torch.stack(logits)
