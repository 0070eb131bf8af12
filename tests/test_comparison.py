"""What is read from trainings' logs, and the table and the plot made of it."""

from __future__ import annotations

import pytest
from comparison_logs import step, write_scalars
from matplotlib.figure import Figure

from mskd_plugin.comparison import (
    Result,
    check_recipe,
    digest_of_file,
    note_recipe,
    plot,
    read_result,
    table,
)
from mskd_plugin.errors import SettingError


def test_logs_of_interrupted_trainings(tmp_path):
    write_scalars(
        *[tmp_path, "20260101_000000", {"teacher/accuracy/top1": 99.0, "step": 0}],
        *[step(1, 9.0), {"accuracy/top1": 30.0, "step": 2}, step(2, 1.0), step(3, 2.0)],
        {"accuracy/top1": 40.0, "step": 4},
    )
    write_scalars(
        *[tmp_path, "20260101_010000", step(3, 4.0), {"accuracy/top1": 50.0, "step": 4}],
        *[step(5, 8.0), {"accuracy/top1": 60.5, "step": 6}],
    )
    result = read_result(tmp_path)
    assert result.curve == [(2, 30.0), (4, 50.0), (6, 60.5)]
    assert result.top1 == 60.5 and result.teacher_top1 == 99.0
    assert result.seconds_per_step == 3.0  # of 1, 2, 4, 8; the first epoch is left out


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    write_scalars(tmp_path, "1", {"accuracy/top1": 30.0, "step": 1}, step(2, 5.0))
    scalars = tmp_path / "1" / "vis_data" / "scalars.json"
    scalars.write_text(scalars.read_text() + '{"accuracy/top1": 4')
    write_scalars(tmp_path, "2", {"accuracy/top1": 40.0, "step": 2})
    assert read_result(tmp_path).curve == [(1, 30.0), (2, 40.0)]


def test_a_training_of_one_epoch(tmp_path):
    write_scalars(tmp_path, "run", step(1, 9.0), {"accuracy/top1": 30.0, "step": 1})
    result = read_result(tmp_path)
    assert result.seconds_per_step == 9.0 and result.teacher_top1 is None


def test_a_training_that_logs_no_accuracy(tmp_path):
    write_scalars(tmp_path, "run", step(1, 9.0), {"single-label/f1-score": 30.0, "step": 1})
    with pytest.raises(SettingError, match="`val_evaluator` to be one that logs accuracy/top1"):
        read_result(tmp_path)


def test_an_empty_folder_will_do_and_a_fresh_start_may_have_other_settings(tmp_path):
    check_recipe(tmp_path, {"--amp": True})
    note_recipe(tmp_path, {"--amp": True})
    with pytest.raises(SettingError, match="`--amp` to be that of the trainings"):
        check_recipe(tmp_path, {"--amp": False})
    check_recipe(tmp_path, {"--amp": False}, fresh=True)


def test_a_file_in_the_home_folder_is_told_from_another(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    digests = set()
    for content in (b"one", b"another"):
        (tmp_path / "teacher.pth").write_bytes(content)
        digests.add(digest_of_file("~/teacher.pth"))
    assert len(digests - {None}) == 2
    assert digest_of_file("~/no.pth") is digest_of_file("torchvision://resnet34") is None


def test_table_and_plot(tmp_path):
    def runs(*values, teacher=97.5):
        return [Result([(2, 1.0), (4, top1)], time, teacher) for top1, time in values]

    results = {
        "student": runs((90.0, 0.1), (94.0, 0.3), (92.0, 0.2), teacher=None),
        "kd": runs((95.0, 0.4), (95.0, 0.4), (95.0, 0.4)),
        "mskd+kd": runs((96.0, 0.5), (92.0, 0.7), (94.0, 1.5)),
    }
    lines = table(results).splitlines()
    assert lines[2:6] == [
        "| teacher | 97.50 | | |",
        "| student | 92.00 ± 2.00 | 90.00, 94.00, 92.00 | 0.200 |",  # sqrt((4 + 4 + 0) / 2)
        "| kd | 95.00 ± 0.00 | 95.00, 95.00, 95.00 | 0.400 |",
        "| mskd+kd | 94.00 ± 2.00 | 96.00, 92.00, 94.00 | 0.700 |",
    ]
    assert lines[-1].startswith("Seeds 0 to 2, epoch 4, images of")
    single = {name: list_[:1] for name, list_ in results.items()}
    assert "| mskd+kd | 96.00 | 96.00 | 0.500 |" in table(single)
    assert "teacher" not in table({"student": results["student"]})
    results["kd"][2].curve[:] = [(2, 95.0)]  # of another logic, which ends early
    assert table(results).splitlines()[-1].startswith("Seeds 0 to 2, epochs 2, 4, images of")
    many = {f"{name} {i}": list_ for name, list_ in results.items() for i in range(9)}
    for number, shown in enumerate((results, many, {"student": results["student"]})):
        path = tmp_path / f"{number}.png"
        plot(shown, "a pair", path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_means_ranges_and_every_seed(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    runs = [Result([(2, first), (4, top1)], 0.1, 99.0) for first, top1 in zip((1, 2, 6), (5, 9, 4))]
    plot({"student": [Result([(4, 3.0)], 0.1)] * 3, "kd": runs}, "a pair", tmp_path / "a.png")
    curves, last = figures[0].axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in curves.lines}
    assert shown["student"] == [[4, 3]] and shown["kd"] == [[2, 3], [4, 6]]
    assert {y for _, y in shown["teacher"]} == {99}
    band = {tuple(point) for point in curves.collections[1].get_paths()[0].vertices.tolist()}
    assert band == {(2, 1), (2, 6), (4, 4), (4, 9)}
    points, mean = last.collections[2:]
    assert points.get_offsets().tolist() == [[1, 5], [1, 9], [1, 4]]
    assert mean.get_segments()[0].tolist() == [[0.75, 6], [1.25, 6]]
