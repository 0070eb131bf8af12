"""What README and docs say is there: each command, path and option, and the config for one's own
use."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager

from mskd_plugin.algorithms import FrozenTeacherDistill
from mskd_plugin.launch import use_method
from mskd_plugin.networks import classifier

ROOT = toy.ROOT
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: Where a short form of each command is run.
EXECUTED = {
    "make demo": "test_compare.py::test_from_an_interrupted_teacher_to_the_table",
    "make test": "test_readme.py::test_every_command_is_one_that_works",  # running now
    "tools/train.py": "test_tools.py::test_the_options_are_those_of_the_run",
    "tools/test.py": "test_tools.py::test_testing_and_exporting_give_the_logged_accuracy",
    "tools/export_student.py": "test_tools.py::test_testing_and_exporting_give_the_logged_accuracy",
    "tools/convert_teacher.py": "test_convert_teacher.py::test_a_benchmark_checkpoint_round_trips",
    "tools/compare.py": "test_compare.py::test_from_an_interrupted_teacher_to_the_table",
    "tools/dist_train.sh": "test_distributed_tools.py"
    "::test_two_processes_train_to_the_weights_of_one",
    "tools/dist_test.sh": "test_distributed_tools.py::test_two_processes_test_as_one_does",
    "tools/list_configs.py": "test_matrix.py::test_the_list_shows_what_works",
    "tools/benchmark_step.py": "test_benchmark_step.py::rows",
    "torchrun": "test_benchmark_step.py::test_two_processes_share_the_work",
    "tools/benchmark_loss.py": "test_benchmark_loss.py::run",
    "tools/benchmark_data.py": "test_benchmark_data.py::rows",
    "tools/slurm_train.sh": "test_distributed_tools.py::test_the_command_line_for_slurm",
}


def blocks(path, language):
    """Return the fenced blocks of a page in a language."""
    return [text for kind, text in FENCE.findall(path.read_text()) if kind == language]


def inline_code(path):
    """Return the pieces of code in a page's running text."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text()))


COMMANDS = [
    pytest.param(line, id=line)
    for page in PAGES
    if not page.name.startswith("own_")  # tests of these names run them all
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def arguments(tool, words):
    """Parse a command's arguments as the tool does."""
    return toy.tool(tool).parse_args(words)


def check_config(name):
    assert Path(name).parts[0] == "configs" and (ROOT / name).is_file(), name


def check_checkpoint(name):
    """Check that a training of the config in the name writes it at its end."""
    _, stem, file = Path(name).parts
    (config,) = (ROOT / "configs").rglob(f"{stem}.py")
    assert file == f"epoch_{Config.fromfile(config).train_cfg.max_epochs}.pth"


def check_teacher(name):
    """Check that a training writes the weights, or that it is a config to train first."""
    if name.endswith(".py"):
        check_config(name)
    else:
        check_checkpoint(name)


def check_make(words):
    (target,) = words
    ran = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for line in ran.stdout.replace("\\\n", " ").splitlines():
        if "tools/compare.py" in line:
            check_compare(shlex.split(line.partition("tools/compare.py")[2]))


def check_train(words):
    args = arguments("train", words)
    check_config(args.config)
    if args.teacher is not None:
        check_teacher(args.teacher)


def check_compare(words):
    args = arguments("compare", words)
    check_config(args.config)
    check_teacher(args.teacher)
    for method in args.methods:
        use_method(Config.fromfile(ROOT / args.config), method)


def check_test(words):
    args = arguments("test", words)
    check_config(args.config)
    check_checkpoint(args.checkpoint)


def check_export(words):
    args = arguments("export_student", words)
    check_config(str(args.config))
    check_checkpoint(args.checkpoint)


def check_convert(words):
    arguments("convert_teacher", words)


def check_dist_train(words):
    config, processes, *options = words
    assert int(processes) > 1
    check_train([config, *options])


def check_dist_test(words):
    config, checkpoint, processes, *options = words
    assert int(processes) > 1
    check_test([config, checkpoint, *options])


def check_torchrun(words):
    option, processes, tool, *options = words
    assert option == "--nproc_per_node" and int(processes) > 1
    assert tool == "tools/benchmark_step.py"
    arguments("benchmark_step", options)


def check_slurm(words):
    _, _, config, processes, *options = words
    check_dist_train([config, processes, *options])


CHECKS = {
    "make demo": check_make,
    "make test": check_make,
    "tools/train.py": check_train,
    "tools/test.py": check_test,
    "tools/export_student.py": check_export,
    "tools/convert_teacher.py": check_convert,
    "tools/compare.py": check_compare,
    "tools/dist_train.sh": check_dist_train,
    "tools/dist_test.sh": check_dist_test,
    "tools/list_configs.py": lambda words: arguments("list_configs", words),
    "tools/benchmark_step.py": lambda words: arguments("benchmark_step", words),
    "torchrun": check_torchrun,
    "tools/benchmark_loss.py": lambda words: arguments("benchmark_loss", words),
    "tools/benchmark_data.py": lambda words: arguments("benchmark_data", words),
    "tools/slurm_train.sh": check_slurm,
}


def test_commands_are_found():
    assert len(COMMANDS) >= 10
    assert CHECKS.keys() == EXECUTED.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_works(line):
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):  # settings of the environment
        words = words[1:]
    if words[0] == "python":
        words = words[1:]
    name = " ".join(words[:2]) if words[0] == "make" else words[0]
    assert name in CHECKS, f"add the new command {name!r} to CHECKS and EXECUTED"
    CHECKS[name](words[1:])
    if name.startswith("tools/"):
        assert (ROOT / name).is_file()
        assert name.endswith(".py") or (ROOT / name).stat().st_mode & 0o100  # may be run


@pytest.mark.parametrize("place", sorted(set(EXECUTED.values())))
def test_every_command_is_executed_in_a_short_form(place):
    file, name = place.split("::")
    assert f"def {name}" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    folders = "docs|configs|tools|tests|mskd_plugin"
    paths = re.findall(rf"(?<![\w./])(?:{folders})/[\w./-]*[\w/]", text)
    paths += [code for code in inline_code(page) if re.fullmatch(r"[\w-]+\.(txt|toml|md)", code)]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_option_exists(capsys):
    known = set()
    for tool in CHECKS:
        if tool.endswith(".py"):
            with pytest.raises(SystemExit):
                arguments(Path(tool).stem, ["--help"])
            known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = {
        option
        for page in PAGES
        for code in inline_code(page)
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", code)
    }
    assert named and named <= known


def test_the_compatibility_table_agrees_with_the_constraints():
    text = (ROOT / "README.md").read_text()
    versions = re.search(r"`constraints.txt` pins ([\d.]+\d) and ([\d.]+\d)", text).groups()
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert versions == (pins["torch"], pins["torchvision"])
    table = dict(re.findall(r"^\| (\w[\w ,-]*?) +\| ([\d.]+[^|]*?) +\|", text, re.MULTILINE))
    for name in ("mmengine", "mmpretrain", "mmrazor"):
        assert table[name].endswith(pins[name]), name


def test_the_recorders_of_both_maps_record_them():
    (text,) = blocks(ROOT / "docs" / "baselines.md", "python")
    names = {}
    exec(text, names)
    init_default_scope("mmrazor")
    model = MODELS.build(classifier("resnet8x4", toy.CLASSES)).eval()
    recorders = RecorderManager(names["student_recorders"])
    recorders.initialize(model)
    with torch.no_grad(), recorders:
        model.backbone(toy.batch()["inputs"])
    before, after = (recorders.get_recorder(name).get_record_data() for name in ("before", "after"))
    assert before.min() < 0 and torch.equal(before.relu(), after)


@pytest.mark.parametrize("kind", [SingleTeacherDistill, FrozenTeacherDistill])
def test_the_config_for_ones_own_use_trains(tmp_path, monkeypatch, kind):
    (text,) = blocks(ROOT / "README.md", "python")
    assert text.count("SingleTeacherDistill") == 1
    config = tmp_path / "own.py"
    config.write_text(text.replace("SingleTeacherDistill", kind.__name__))
    cfg = Config.fromfile(config)
    init_default_scope("mmengine")
    torch.manual_seed(1)
    weights = MODELS.build(cfg.model.teacher).state_dict()
    torch.save(weights, tmp_path / cfg.model.teacher_ckpt)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert type(model) is kind and type(model.distiller) is ConfigurableDistiller
    model.init_weights()
    model.train()
    teacher = [p.detach().clone() for p in model.teacher.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(trained, lr=1e-3))
    # Four windows to the side need a last stage of 4 x 4, 32 pixels each.
    batch = dict(
        inputs=torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8),
        data_samples=[DataSample().set_gt_label(label) for label in (3, 999)],
    )
    seen = model.data_preprocessor(batch, True)["inputs"]
    assert seen.mean().abs() < 0.5 and (seen.std() - 1).abs() < 0.5
    steps = [model.train_step(batch, wrapper) for _ in range(3)]
    for name in ("student.loss", "distill.loss_mskd_stage4"):
        values = [step[name].item() for step in steps]
        assert values[-1] < values[0] < float("inf"), name
    for before, after in zip(teacher, model.teacher.parameters(), strict=True):
        assert torch.equal(before, after)
