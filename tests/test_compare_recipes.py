"""Trainings of ``compare.py`` that are reused, and those that are not."""

from __future__ import annotations

import functools

import pytest
import test_compare
from test_compare import PAIR, save_teacher
from tool_runs import TEACHER

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import METHODS

compare = test_compare.compare


def test_trainings_of_two_recipes_are_not_mixed(compare, tmp_path):
    def recipe(text, *options):
        (tmp_path / "pair.py").write_text(f'_base_ = "{PAIR}"\n{text}\n')
        return compare.check(compare.parse_args([str(tmp_path / "pair.py"), *options]))[0]

    folder, student = tmp_path / "runs", ("--methods", "student")

    def keep(recipe):
        compare.check_recipe(folder, recipe)
        compare.note_recipe(folder, recipe)

    first = recipe("", *student)
    keep(first)
    with pytest.raises(SettingError, match="`the settings of the config` to be that of the train"):
        compare.check_recipe(folder, recipe("train_cfg = dict(max_epochs=9)", *student))
    with pytest.raises(SettingError, match="`--fast` to be that of the trainings .*False.*True"):
        compare.check_recipe(folder, recipe("", *student, "--fast"))
    compare.note_recipe(other := tmp_path / "other", {**first, "--old": 3})  # by another version
    with pytest.raises(SettingError, match="`--old` to be that of the trainings .* got none"):
        compare.check_recipe(other, first)
    # The student's trainings know nothing of a teacher, which may come later.
    weights = save_teacher(tmp_path / "teacher.pth", seed=1)
    keep(recipe("", "--teacher", str(weights)))
    keep(recipe("", "--teacher", str(weights)))
    save_teacher(weights, seed=2)
    with pytest.raises(SettingError, match="`the file of --teacher` to be that of the trainings"):
        compare.check_recipe(folder, recipe("", "--teacher", str(weights)))
    with pytest.raises(SettingError, match="`--teacher` to be that of the trainings"):
        compare.check_recipe(folder, first)


def test_trainings_of_a_method_with_other_settings_are_not_reused(compare, tmp_path, monkeypatch):
    weights, folder = save_teacher(tmp_path / "teacher.pth", seed=1), tmp_path / "runs"

    def recipe(*methods):
        arguments = [PAIR, "--teacher", str(weights), "--methods", *methods]
        return compare.check(compare.parse_args(arguments))[0]

    first = recipe("kd", "dist")
    compare.note_recipe(folder, first)
    # As another version of the plugin may have it.
    monkeypatch.setitem(METHODS, "dist", functools.partial(METHODS["dist"], loss_weight=0.5))
    with pytest.raises(SettingError, match="`the settings of dist` to be that of the trainings"):
        compare.check_recipe(folder, recipe("dist", "mskd"))
    compare.check_recipe(folder, recipe("kd", "mskd"))
    compare.note_recipe(folder, recipe("kd", "mskd"))
    with pytest.raises(SettingError, match="`the settings of dist` to be that of the trainings"):
        compare.check_recipe(folder, recipe("dist"))
    monkeypatch.undo()
    compare.check_recipe(folder, recipe("dist"))


def test_a_teacher_that_was_trained_with_other_settings_is_not_reused(compare, tmp_path):
    def recipe(rate):
        base.write_text(f'_base_ = "{TEACHER}"\noptim_wrapper = dict(optimizer=dict(lr={rate}))\n')
        arguments = [PAIR, "--teacher", str(config), "--methods", "kd"]
        return compare.check(compare.parse_args(arguments))[0]

    base, config, folder = tmp_path / "base.py", tmp_path / "teacher.py", tmp_path / "runs"
    config.write_text('_base_ = "base.py"\n')
    compare.note_recipe(folder, recipe(0.1))
    compare.check_recipe(folder, recipe(0.1))
    with pytest.raises(SettingError, match="`the settings of the teacher` to be that of the train"):
        compare.check_recipe(folder, recipe(0.2))
