"""A training goes on in a work folder that was moved, from the newest checkpoint there."""

from __future__ import annotations

import pytest
import toy
from tool_runs import forget_runs, scalars

from mskd_plugin import launch
from mskd_plugin.errors import SettingError


def moved(tmp_path, **settings):
    """Train an epoch, move the work folder, and return it and a config file for the next."""
    first = toy.runner_config(tmp_path / "here", **{"train_cfg.max_epochs": 1})
    launch.build_runner(first).train()
    cfg = toy.runner_config(tmp_path / "here", **settings)
    cfg.model.teacher_ckpt = str(toy.teacher_file(tmp_path))
    for key in ("work_dir", "experiment_name", "launcher"):
        cfg.pop(key)
    cfg.dump(tmp_path / "toy.py")
    return (tmp_path / "here").rename(tmp_path / "there"), str(tmp_path / "toy.py")


@pytest.mark.parametrize("settings, options", [({}, ["--resume"]), (dict(resume=True), [])])
def test_a_moved_work_folder_resumes(tmp_path, settings, options):
    folder, file = moved(tmp_path, **settings)
    forget_runs()
    toy.tool("train").main([file, "--work-dir", str(folder), *options])
    epochs = [entry["epoch"] for entry in scalars(folder) if "loss" in entry]
    assert sorted({*epochs}) == [1, 2]
    assert (folder / "last_checkpoint").read_text() == str(folder / "epoch_2.pth")


def test_a_config_may_name_what_it_resumes_from(tmp_path):
    named = str(tmp_path / "there" / "epoch_1.pth")
    _, file = moved(tmp_path, resume=True, load_from=named)
    forget_runs()
    toy.tool("train").main([file, "--work-dir", str(tmp_path / "new")])
    assert {entry["epoch"] for entry in scalars(tmp_path / "new") if "loss" in entry} == {2}


def test_the_newest_checkpoint(tmp_path, monkeypatch):
    folder, other = tmp_path / "run", tmp_path / "other"
    assert launch.newest_checkpoint(folder) is None
    for path in (folder, other):
        path.mkdir()
    (folder / "last_checkpoint").write_text(f"{other / 'epoch_3.pth'}\n")
    with pytest.raises(SettingError, match="`--resume` .*other/epoch_3.pth', which is not there"):
        launch.newest_checkpoint(folder)
    (other / "epoch_3.pth").touch()  # where a checkpoint hook with an out_dir writes
    assert launch.newest_checkpoint(folder) == str(other / "epoch_3.pth")
    (folder / "epoch_3.pth").touch()  # a copy of the folder
    assert launch.newest_checkpoint(str(folder)) == str(folder / "epoch_3.pth")
    monkeypatch.chdir(tmp_path)
    assert launch.newest_checkpoint("run") == str(folder / "epoch_3.pth")
    (folder / "epoch_5.pth").mkdir()  # as DeepSpeed writes
    (folder / "last_checkpoint").write_text(str(folder / "epoch_5.pth"))
    assert launch.newest_checkpoint(folder) == str(folder / "epoch_5.pth")
    for text, found in (("", None), ("s3://bucket/epoch_4.pth", "s3://bucket/epoch_4.pth")):
        (folder / "last_checkpoint").write_text(text)
        if found:
            assert launch.newest_checkpoint(folder) == found
            continue
        with pytest.raises(SettingError, match="`--resume` to be the checkpoint that .*last_ch"):
            launch.newest_checkpoint(folder)
