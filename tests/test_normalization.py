"""What a checkpoint says of the images that its weights were trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmpretrain.models import ClsDataPreprocessor

from mskd_plugin.checkpoints.normalization import check_normalization, stated_normalization
from mskd_plugin.errors import SettingError

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
     {"cfg": "data_preprocessor = dict(mean=['a'], std=[1.0])"}],
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
