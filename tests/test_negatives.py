"""Drawing negatives: which rows, how often, and how many."""

from __future__ import annotations

import pytest
import torch

from mskd_plugin.errors import SettingError
from mskd_plugin.functional.negatives import _uniform, draw_negatives

ROWS = torch.tensor([2, 0, 1, 2, -1, 0, 2, 1, -1, 3, 2, 2])
LABELS = torch.tensor([2, 0, 4, 2])


def others(label):
    return [row for row, of_row in enumerate(ROWS.tolist()) if of_row != label]


@pytest.mark.parametrize("count", range(1, 8))
def test_rows_are_different_and_of_other_classes(count):
    torch.manual_seed(count)
    for _ in range(50):
        rows = draw_negatives(ROWS, LABELS, count)
        assert rows.shape == (4, count)
        for drawn, label in zip(rows.tolist(), LABELS.tolist(), strict=True):
            assert len(set(drawn)) == count and set(drawn) <= set(others(label))


def test_all_rows_of_other_classes_where_there_are_no_more():
    rows = draw_negatives(ROWS, torch.tensor([2, 2]), 7)
    assert rows.sort().values.tolist() == [others(2)] * 2


def test_rows_repeat_only_where_there_are_too_few():
    torch.manual_seed(0)
    rows = draw_negatives(ROWS, LABELS, 10)
    for drawn, label in zip(rows.tolist(), LABELS.tolist(), strict=True):
        assert set(drawn) <= set(others(label))
        assert (len(set(drawn)) == 10) == (len(others(label)) >= 10)
    assert {len(others(label)) >= 10 for label in LABELS.tolist()} == {True, False}


@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_row_is_as_likely(count):
    torch.manual_seed(0)
    trials = 20_000
    rows = draw_negatives(ROWS, torch.tensor([2]).expand(trials), count)
    drawn = rows.flatten().bincount(minlength=len(ROWS)).double()
    share = count / len(others(2))
    expected = torch.zeros(len(ROWS), dtype=torch.float64)
    expected[others(2)] = trials * share
    # Four standard deviations; without replacement a row's count is binomial or narrower.
    assert ((drawn - expected).abs() <= 4 * (trials * max(share, 0.2)) ** 0.5).all()


def test_every_set_of_rows_is_as_likely():
    torch.manual_seed(0)
    trials = 21_000
    rows = draw_negatives(ROWS, torch.tensor([2]).expand(trials), 2).sort().values
    sets, counts = rows.unique(dim=0, return_counts=True)
    assert len(sets) == 21  # pairs of seven rows
    assert ((counts - 1000).abs() <= 4 * 1000**0.5).all()


def test_images_draw_apart_from_each_other():
    torch.manual_seed(0)
    rows = draw_negatives(torch.arange(1000), torch.tensor([7, 7]), 100)
    assert len(set(rows[0].tolist()) & set(rows[1].tolist())) < 30  # 10 in the mean


def test_the_benchmarks_numbers_need_no_second_draw(monkeypatch):
    torch.manual_seed(0)
    calls = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: calls.append(a) or rand(*a, **k))
    labels = torch.arange(50_000) % 100
    rows = draw_negatives(labels, labels[:64], 16384)
    assert len(calls) == 1 and calls[0][1] < 22_000
    assert (labels[rows] != labels[:64, None]).all()
    assert all(len(row.unique()) == 16384 for row in rows)


def test_no_images_draw_nothing():
    assert draw_negatives(ROWS, LABELS[:0], 3).shape == (0, 3)


def test_images_of_one_class_are_refused():
    with pytest.raises(SettingError, match="labels.*at least two classes"):
        draw_negatives(torch.zeros(5, dtype=torch.int64), torch.tensor([0]), 2)


def test_of_many_millions_of_rows_none_is_passed_over():
    torch.manual_seed(0)
    draws = _uniform(torch.tensor([2**26]), 1000)  # float32 would step by four rows
    assert 400 < (draws % 2).sum() < 600
