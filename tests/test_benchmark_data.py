"""The benchmark of training data: figures that fit together, and batches of the right kind."""

from __future__ import annotations

import json
import resource

import pytest
import torch
import toy
from mmengine.config import Config

from mskd_plugin.errors import SettingError

CONFIG = str(toy.ROOT / "configs" / "cifar100" / "student_resnet8x4.py")
OPTIONS = [CONFIG, "--in-memory", "--images", "60", "--batch-size", "4", "16"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    toy.tool("benchmark_data").main(
        [*OPTIONS, "--turns", "3", "--batches", "2", "--json", str(file)]
    )
    return json.loads(file.read_text())


def test_figures_fit_together(rows):
    names = ["student_resnet8x4", "student_resnet8x4, in memory"]
    assert [(row["config"], row["batch size"]) for row in rows] == [
        (name, size) for size in (4, 16) for name in names
    ]
    for row in rows:
        rate = 1e3 * row["batch size"] / row["CPU ms per batch"]
        assert row["images per second and core"] == pytest.approx(rate)
        low, high = row["quartiles"]
        assert low <= row["CPU ms per batch"] <= high
    assert rows[0]["relative"] == rows[2]["relative"] == 1


def test_figures_are_of_one_batch_and_the_first_turn_warms_up(tmp_path, monkeypatch):
    tool, now, turns, file = toy.tool("benchmark_data"), [0.0], {}, tmp_path / "rows.json"

    def take(subject, count):
        turns[subject.name] = turns.get(subject.name, 0) + 1
        seconds = 1.0 if "in memory" in subject.name else 4.0
        now[0] += count * seconds * (100, 0.5, 1.5)[turns[subject.name] - 1]

    monkeypatch.setattr(tool.Subject, "take", take)
    monkeypatch.setattr(tool.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tool, "cpu_seconds", lambda: now[0] / 2)
    options = [CONFIG, "--in-memory", "--images", "60", "--turns", "2", "--batches", "5"]
    size = ["--cfg-options", "train_dataloader.batch_size=8"]
    tool.main([*options, "--json", str(file), *size])
    first, held = json.loads(file.read_text())
    assert (first["ms per batch"], first["CPU ms per batch"]) == (4e3, 2e3)
    assert (held["ms per batch"], held["CPU ms per batch"]) == (1e3, 5e2)
    assert (first["batch size"], first["images per second and core"]) == (8, 4)
    assert (first["relative"], held["relative"]) == (1, 4)


def test_batches_are_the_configs_own():
    tool = toy.tool("benchmark_data")
    first, held, *_ = tool.subjects_of(tool.parse_args(OPTIONS))
    for subject in (first, held):
        one, other = next(subject.batches), next(subject.batches)
        assert one["inputs"].shape == (4, 3, 32, 32) and one["inputs"].dtype == torch.uint8
        assert not one["inputs"].equal(other["inputs"])
        assert subject.preprocessor(one, True)["inputs"].mean().abs() < 0.5  # normalised
    # As many per-image transforms as in the config, and none but the packing in memory.
    assert len(first.loader.dataset.pipeline.transforms) == 3
    assert type(held.loader.dataset).__name__ == "InMemoryImages"
    assert held.loader.dataset.flip_prob == 0.5


def test_every_batch_is_a_whole_one():
    tool = toy.tool("benchmark_data")
    options = [CONFIG, "--in-memory", "--images", "10", "--batch-size"]
    for subject in tool.subjects_of(tool.parse_args([*options, "4"])):
        assert {len(next(subject.batches)["inputs"]) for _ in range(6)} == {4}
    told = "`train_dataloader` .* one batch, here of 11, but got 10 images, and drop_last=True"
    with pytest.raises(SettingError, match=told):
        tool.main([*options, "10", "11"])


def test_random_images_suit_a_preprocessor_of_the_models_own(tmp_path):
    tool, cfg = toy.tool("benchmark_data"), Config.fromfile(CONFIG)
    cfg.model.data_preprocessor = cfg.pop("data_preprocessor")
    cfg.dump(tmp_path / "own.py")
    options = [str(tmp_path / "own.py"), "--images", "200", "--batch-size", "200"]
    (subject,) = tool.subjects_of(tool.parse_args(options))
    labels = {int(sample.gt_label) for sample in next(subject.batches)["data_samples"]}
    assert labels == {*range(100)}


def test_random_images_are_refused_where_images_are_read_from_files():
    tool = toy.tool("benchmark_data")
    files = str(toy.ROOT / "configs" / "cifar10" / "student_resnet8_cifar10.py")
    with pytest.raises(SettingError, match="`--images` to be left out .*from files, but got 8"):
        tool.main([files, "--images", "8"])


def test_a_loader_with_settings_of_workers_is_read_without_any():
    tool = toy.tool("benchmark_data")
    loader = "train_dataloader."
    settings = [loader + "num_workers=2", loader + "prefetch_factor=4"]
    options = [CONFIG, "--images", "60", "--batch-size", "4", "--cfg-options", *settings]
    (subject,) = tool.subjects_of(tool.parse_args(options))
    assert subject.loader.num_workers == 0 and len(next(subject.batches)["inputs"]) == 4


def test_images_that_are_not_there_are_named():
    tool = toy.tool("benchmark_data")
    imagenet = str(toy.ROOT / "configs" / "student_r18_imagenet.py")
    options = [imagenet, "--cfg-options", "train_dataloader.dataset.data_root=no/such"]
    with pytest.raises(SettingError, match="data_root.*a folder with the images.*no/such"):
        tool.main(options)


def of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_workers_serve_what_is_not_in_memory_and_count():
    tool = toy.tool("benchmark_data")
    first, held, *_ = tool.subjects_of(tool.parse_args([*OPTIONS, "--workers", "1"]))
    assert (first.loader.num_workers, held.loader.num_workers) == (1, 0)
    children, before = of_children(), tool.cpu_seconds()
    first.take(200)  # some clocks count in hundredths of a second
    assert 0 < of_children() - children < tool.cpu_seconds() - before


def test_one_turn_has_no_spread():
    with pytest.raises(SettingError, match="--turns.*at least 2"):
        toy.tool("benchmark_data").main([CONFIG, "--turns", "1"])
