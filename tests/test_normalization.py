"""What a checkpoint says of the images that its weights were trained with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from mmpretrain.models import ClsDataPreprocessor

from mskd_plugin.checkpoints.normalization import (
    check_normalization,
    stated_normalization,
    stated_reversal,
)
from mskd_plugin.checks.networks import _check_reversal
from mskd_plugin.data_preprocessor import BatchDataPreprocessor
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import build_runner

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
STATED = dict(mean=MEAN, std=STD)


def checkpoint(**settings) -> dict:
    """Return what MMEngine's runner saves beside the weights."""
    return {"meta": {"cfg": Config(settings).pretty_text, "epoch": 3}, "state_dict": {}}


def preprocessor(**settings) -> ClsDataPreprocessor:
    return ClsDataPreprocessor(**{**STATED, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data_preprocessor": dict(STATED, to_rgb=True)}, STATED),
        ({"model": dict(data_preprocessor=STATED)}, STATED),
        (
            {"data_preprocessor": dict(mean=[0] * 3, std=[1] * 3),
             "model": dict(type="X", data_preprocessor=dict(STATED, type="Y"))},
            STATED,
        ),
        (
            {"data_preprocessor": STATED, "model": dict(data_preprocessor=dict(type="Y"))},
            STATED,
        ),
        ({"data_preprocessor": dict(mean=127.5, std=64)}, dict(mean=[127.5], std=[64.0])),
        ({"data_preprocessor": dict(mean=MEAN)}, {}),
        ({"data_preprocessor": None, "model": dict(type="X", data_preprocessor=None)}, {}),
        ({"model": dict(type="X")}, {}),
    ],
)  # fmt: skip
def test_the_config_in_a_checkpoint_is_read(settings, expected):
    assert stated_normalization(checkpoint(**settings)) == expected


def test_the_config_in_a_checkpoint_of_mmclassification_is_read():
    text = Config({"model": dict(type="X"), "img_norm_cfg": dict(STATED, to_rgb=True)}).pretty_text
    assert stated_normalization({"meta": {"mmcls_version": "0.19.0", "config": text}}) == STATED


@pytest.mark.parametrize(
    "meta",
    [None, {}, {"cfg": None}, {"cfg": "data_preprocessor = dict(mean="}, {"cfg": "\0"}, [1],
     {"cfg": "data_preprocessor = dict(mean=open('x'), std=[1, 2, 3])"},
     {"cfg": "data_preprocessor = dict(mean=['a'], std=[1.0])"},
     {"cfg": "data_preprocessor = {**base, mean: [1.0], 'std': [1.0]}"},
     {"cfg": "data_preprocessor = dict(mean=[1.0], **base)"}],
)  # fmt: skip
def test_what_says_nothing_is_no_statement(meta):
    assert stated_normalization({"meta": meta}) == {}
    assert stated_normalization({}) == {}
    check_normalization({"meta": meta}, preprocessor(), "file", setting="teacher_ckpt")


def test_a_config_is_not_run(tmp_path):
    text = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    stated_normalization({"meta": {"cfg": text + "data_preprocessor = dict(mean=[1], std=[1])"}})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("share", [0.009, 0.011, -0.009, -0.011])
def test_one_percent_of_the_deviation_separates_roundings_from_other_data(name, share):
    given = {**STATED, name: [v + share * s for v, s in zip(STATED[name], STD)]}
    stated = checkpoint(data_preprocessor=STATED)
    if abs(share) < 0.0099:
        check_normalization(stated, preprocessor(**given), "file", setting="teacher_ckpt")
        return
    with pytest.raises(SettingError, match=rf"teacher_ckpt.*'file', trained with mean .*{STD[2]}"):
        check_normalization(stated, preprocessor(**given), "file", setting="teacher_ckpt")


def test_one_number_stands_for_all_channels():
    grey, three = dict(mean=[127.5], std=[64.0]), dict(mean=[127.5] * 3, std=[64.0] * 3)
    for stated, given in ((grey, three), (three, grey), (grey, grey)):
        check_normalization(
            checkpoint(data_preprocessor=stated), preprocessor(**given), "file", setting="x"
        )
    for other in (dict(three, mean=[127.5, 127.5, 100]), dict(mean=[127.5] * 2, std=[64.0] * 2)):
        with pytest.raises(SettingError, match="trained with mean"):
            check_normalization(
                checkpoint(data_preprocessor=other), preprocessor(**three), "file", setting="x"
            )


def test_a_preprocessor_that_leaves_the_images_alone_is_not_compared():
    plain = ClsDataPreprocessor()
    check_normalization(checkpoint(data_preprocessor=STATED), plain, "file", setting="x")


def write_teacher(folder: Path, **settings) -> str:
    path = toy.teacher_file(folder)
    weights = torch.load(path, weights_only=True)
    torch.save({**weights, **{"meta": checkpoint(**settings)["meta"]}}, path)
    return str(path)


def test_a_distillation_refuses_a_teacher_of_other_images(tmp_path):
    own = {key: toy.PREPROCESSOR[key] for key in ("mean", "std")}
    same = write_teacher(tmp_path / "same", data_preprocessor=own)
    assert toy.build(teacher_ckpt=same).teacher_source == same
    other = write_teacher(tmp_path / "other", data_preprocessor=dict(own, mean=[127.5] * 3))
    with pytest.raises(SettingError, match=r"mean \[80.0, 80.0, 80.0\].*mean \[127.5, 127.5"):
        toy.build(teacher_ckpt=other)


RAW = dict(type="mmpretrain.ClsDataPreprocessor")
NOBODY = "states no mean and std: images reach the networks as they are, 0 to 255"


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
@pytest.mark.parametrize("hooks", [[dict(type="PreflightHook")], []], ids=["hook", "none"])
@pytest.mark.parametrize("given", [RAW, None], ids=["neither", "no preprocessor"])
def test_raw_images_for_a_teacher_that_knows_normalised_ones(tmp_path, kind, hooks, given):
    teacher = write_teacher(tmp_path, data_preprocessor=STATED)
    model = toy.algorithm(kind, teacher_ckpt=teacher, data_preprocessor=given)
    cfg = toy.runner_config(tmp_path, model, custom_hooks=hooks)
    cfg.data_preprocessor = given
    told = r"`data_preprocessor` to be .*mean \[123.675.*std \[58.395.*but got none with mean"
    with pytest.raises(SettingError, match=told):
        build_runner(cfg).train()


@pytest.mark.parametrize("own", [STATED, dict(mean=[0.0] * 3, std=[255.0] * 3)], ids=str)
def test_raw_images_for_a_teacher_whose_own_preprocessor_normalises(tmp_path, own):
    teacher = dict(toy.classifier("teacher"), data_preprocessor=dict(own))
    model = toy.algorithm(
        teacher=teacher, teacher_ckpt=str(toy.teacher_file(tmp_path)), data_preprocessor=RAW
    )
    told = rf"`data_preprocessor` .*mean \[{own['mean'][0]}, .*std \[{own['std'][0]}, "
    toy.fails(toy.runner_config(tmp_path, model), told)


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
def test_other_images_in_a_config_of_mmrazors_own(tmp_path, kind):
    model = toy.algorithm(kind, teacher_ckpt=write_teacher(tmp_path, data_preprocessor=STATED))
    with pytest.raises(SettingError, match=r"teacher_ckpt.*trained with mean \[123.675"):
        build_runner(toy.runner_config(tmp_path, model, custom_hooks=[]))


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("stated", [{}, dict(mean=[0] * 3, std=[1] * 3)], ids=["none", "as is"])
def test_raw_images_that_nobody_speaks_of_are_one_warning(tmp_path, capsys, stated, normalizes):
    teacher = write_teacher(tmp_path, data_preprocessor=stated)
    model = toy.algorithm(teacher_ckpt=teacher, data_preprocessor=RAW)
    cfg = toy.runner_config(tmp_path, model, **{"train_cfg.max_epochs": 1})
    cfg.data_preprocessor = RAW
    if normalizes:
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            transform = dict(type="Normalize", mean=[80.0] * 3, std=[80.0] * 3, to_rgb=False)
            loader.dataset.pipeline.insert(-1, transform)
    toy.train(cfg)
    assert "".join(capsys.readouterr()).count(NOBODY) == (not normalizes)


def test_images_that_a_transform_normalises_are_taken(tmp_path, capsys):
    teacher = write_teacher(tmp_path, data_preprocessor=STATED)
    model = toy.algorithm(teacher_ckpt=teacher, data_preprocessor=RAW)
    cfg = toy.runner_config(tmp_path, model, **{"train_cfg.max_epochs": 1})
    cfg.data_preprocessor = RAW
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pipeline.insert(-1, dict(type="Normalize", **STATED, to_rgb=False))
    assert toy.train(cfg)[1].count == 3
    assert NOBODY not in "".join(capsys.readouterr())


FILES = dict(type="CustomDataset", pipeline=[dict(type="LoadImageFromFile"), dict(type="Pack")])
ARRAYS = dict(type="mmpretrain.CIFAR100", pipeline=[dict(type="PackInputs")])
WRAPPED = dict(type="RepeatDataset", times=2, dataset=FILES)
OWN_ORDER = dict(FILES, pipeline=[*FILES["pipeline"], dict(type="NumpyToPIL", to_rgb=True)])
CHANNELS = dict(STATED, to_rgb=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=FILES)),
         (True, "LoadImageFromFile")),
        (dict(data_preprocessor=dict(STATED, to_rgb=False), train_dataloader=dict(dataset=ARRAYS)),
         (False, "CIFAR100")),
        (dict(data_preprocessor=dict(STATED, bgr_to_rgb=True, rgb_to_bgr=False),
              train_dataloader=dict(dataset=WRAPPED)), (True, "LoadImageFromFile")),
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(
            dataset=dict(type="ClassBalancedDataset", oversample_thr=0.1, dataset=WRAPPED))),
         (True, "LoadImageFromFile")),
        (dict(data_preprocessor=dict(STATED, bgr_to_rgb=False, rgb_to_bgr=True),
              train_dataloader=dict(dataset=ARRAYS)), (True, "CIFAR100")),
        (dict(img_norm_cfg=CHANNELS, data=dict(train=dict(type="ImageNet", pipeline=[
            dict(type="LoadImageFromFile"), dict(type="Normalize", **CHANNELS)]))),
         (True, "LoadImageFromFile")),
        (dict(data_preprocessor=STATED, train_dataloader=dict(dataset=FILES)), None),
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=OWN_ORDER)), None),
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=dict(FILES, pipeline=[
            *FILES["pipeline"], dict(type="PILToNumpy", to_bgr=True)]))), None),
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=dict(FILES, pipeline=[
            *FILES["pipeline"], "a name that is not read"]))), None),
        (dict(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=dict(type="X"))), None),
        (dict(data_preprocessor=CHANNELS), None),
        (dict(train_dataloader=dict(dataset=FILES)), None),
    ],
)  # fmt: skip
def test_the_order_of_channels_in_a_checkpoint_is_read(settings, expected):
    assert stated_reversal(checkpoint(**settings)) == expected


@pytest.mark.parametrize(
    ("given", "dataset", "fails"),
    [
        (preprocessor(), FILES, True),
        (preprocessor(to_rgb=True), FILES, False),
        (preprocessor(), ARRAYS, False),  # which are RGB as they are
        (preprocessor(), OWN_ORDER, False),
        (preprocessor(), None, False),
        (ImgDataPreprocessor(**STATED, bgr_to_rgb=True), WRAPPED, False),
        (ImgDataPreprocessor(**STATED), WRAPPED, True),
        (BatchDataPreprocessor(**STATED, to_rgb=True), FILES, False),
        (BatchDataPreprocessor(**STATED), FILES, True),
    ],
)
def test_another_order_of_channels_is_refused_where_it_matters(given, dataset, fails):
    stated = checkpoint(data_preprocessor=CHANNELS, train_dataloader=dict(dataset=FILES))
    runner = SimpleNamespace(cfg=Config(dict(train_dataloader=dict(dataset=dataset))))
    if not fails:
        return _check_reversal(runner, given, stated, "t.pth")
    told = "`data_preprocessor.to_rgb` to be True, as in the training of 't.pth', but got False"
    with pytest.raises(SettingError, match=told):
        _check_reversal(runner, given, stated, "t.pth")


def test_a_distillation_refuses_a_teacher_of_another_order_of_channels(tmp_path):
    own = {key: toy.PREPROCESSOR[key] for key in ("mean", "std")}
    for to_rgb in (True, False):
        cfg = toy.runner_config(tmp_path / str(to_rgb))
        dataset = cfg.train_dataloader.dataset.to_dict()
        cfg.model.teacher_ckpt = write_teacher(
            tmp_path / str(to_rgb),
            data_preprocessor=dict(own, to_rgb=to_rgb),
            train_dataloader=dict(dataset=dataset),
        )
        if to_rgb:
            toy.fails(cfg, "`data_preprocessor.to_rgb` to be True")
        else:
            assert toy.train(cfg)[1].count == 6
