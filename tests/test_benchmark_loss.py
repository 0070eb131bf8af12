"""The benchmark of the loss over batch sizes and regions."""

from __future__ import annotations

import itertools
import json

import pytest
import toy

from mskd_plugin.errors import SettingError

benchmark_loss = toy.tool("benchmark_loss")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss") / "new"
    options = ["--batch-sizes", "4", "8", "--max-scale", "3", "--channels", "16", "--side", "4"]
    files = ["--json", str(folder / "rows.json"), "--plot", str(folder / "drawn" / "plot.png")]
    benchmark_loss.main([*options, "--repeats", "3", *files])
    return folder


def test_both_sweeps_are_whole(run):
    sweeps = json.loads((run / "rows.json").read_text())
    assert [row["batch size"] for row in sweeps["batch size"]] == [4, 8]
    assert [row["regions"] for row in sweeps["batch size"]] == [21, 21]
    assert [row["regions"] for row in sweeps["regions"]] == [1, 5, 14]
    assert {row["batch size"] for row in sweeps["regions"]} == {4}
    assert (run / "drawn" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_similarities_are_those_that_the_equations_need(run):
    for row in itertools.chain(*json.loads((run / "rows.json").read_text()).values()):
        count = 0
        for scale in row["scales"]:
            for _ in range(row["batch size"] * scale**2):
                count += row["batch size"]  # the same region of every image
                count += scale**2 if scale > 1 else 0  # the regions of the image
        assert row["similarities"] == count
        assert row["ms per image"] == pytest.approx(row["ms"] / row["batch size"])
        assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
        # The maps' gradient alone: N x 16 x 4 x 4 in float32.
        assert row["peak memory (MiB)"] >= row["batch size"] * 1024 / 2**20


def test_every_pass_is_the_same():
    args = benchmark_loss.parse_args(["--channels", "4"])
    case, gradients = benchmark_loss.Case(2, (1, 2), args), []
    for _ in range(2):
        case.run()
        gradients.append(case.student_map.grad.clone())
    assert gradients[0].any() and gradients[0].equal(gradients[1])


@pytest.mark.parametrize(
    "argv, setting",
    [
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--max-scale", "9"], "--max-scale.*from 1 to the side 8"),
        (["--side", "2"], "--side.*at least 4"),
        (["--repeats", "1"], "--repeats"),
        (["--channels", "0"], "--channels"),
    ],
)
def test_bad_options_are_named(argv, setting):
    with pytest.raises(SettingError, match=setting):
        benchmark_loss.parse_args(argv)
