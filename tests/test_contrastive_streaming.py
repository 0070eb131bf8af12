"""The contrastive terms in blocks and compiled: same numbers, and what they hold at once."""

from __future__ import annotations

import needs
import pytest
import torch
from region_pairs import SETTINGS, pair, settings_of
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mskd_plugin.functional import contrastive, multi_scale_contrastive_terms


class LargestTensor(TorchDispatchMode):
    """Note the size of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().size() // 8)
        return result


def terms_and_gradients(settings):
    student, teacher = pair()
    leaves = [scale.requires_grad_() for scale in student]
    with LargestTensor() as largest:
        terms = multi_scale_contrastive_terms(leaves, teacher, **settings)
        sum(terms).backward()
    return [*terms, *(leaf.grad for leaf in leaves)], largest.numbers


@pytest.mark.parametrize("limit", [1, 7, 23, 60])
@pytest.mark.parametrize(
    "names", [(), ("symmetric",), ("excluded_labels", "center"), tuple(SETTINGS)]
)
def test_streaming_changes_neither_value_nor_gradient(monkeypatch, names, limit):
    whole, _ = terms_and_gradients(settings_of(names))
    monkeypatch.setattr(contrastive, "MAX_SIMILARITIES", limit)
    streamed, _ = terms_and_gradients(settings_of(names))
    for got, expected in zip(streamed, whole, strict=True):
        assert_close(got, expected, torch.float64)


@needs.torch_2_4
@pytest.mark.parametrize("limit", [10**6, 23])
def test_compiled_it_is_the_same(monkeypatch, limit):
    monkeypatch.setattr(contrastive, "MAX_SIMILARITIES", limit)
    settings = settings_of(tuple(SETTINGS))
    expected, _ = terms_and_gradients(settings)
    compiled = torch.compile(
        multi_scale_contrastive_terms, backend="aot_eager", fullgraph=True, dynamic=False
    )
    student, teacher = pair()
    leaves = [scale.requires_grad_() for scale in student]
    terms = compiled(leaves, teacher, **settings)
    sum(terms).backward()
    for got, value in zip([*terms, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert_close(got, value, torch.float64)


def test_no_tensor_is_larger_than_the_similarities_and_large_cases_stream(monkeypatch):
    # N = 64 images, 14 regions of width 6: 64 * 64 * 14 similarities; every region against every
    # region of the batch would be 14 times as many.
    counts, size = (1, 4, 9), 64
    similarities = size * size * sum(counts)

    def largest(limit):
        monkeypatch.setattr(contrastive, "MAX_SIMILARITIES", limit)
        student, teacher = pair(counts=counts, size=size)
        leaves = [scale.requires_grad_() for scale in student]
        with LargestTensor() as seen:
            sum(multi_scale_contrastive_terms(leaves, teacher)).backward()
        return seen.numbers

    assert largest(2**24) == similarities
    monkeypatch.setattr(contrastive, "BLOCK_SIMILARITIES", 1000)
    assert largest(2**24) == similarities  # small cases do not stream, whatever a block is
    assert largest(similarities - 1) < similarities / 10
    monkeypatch.setattr(contrastive, "BLOCK_SIMILARITIES", 10**9)
    regions = size * sum(counts) * 6
    assert largest(1000) == regions < similarities / 10
