"""What pip is told agrees with what the import checks, and with the pinned versions."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
from mmengine.config import Config
from packaging.requirements import Requirement
from packaging.version import Version

import mskd_plugin
from mskd_plugin.requirements import NEEDED, _pip_requirement, suits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    """The arguments that setup.py gives to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", given.update)
        runpy.run_path("setup.py")
    return given


@pytest.fixture(scope="module")
def requirements(setup):
    return {r.name: r for r in map(Requirement, setup["install_requires"])}


def test_version_and_packages(setup):
    assert setup["version"] == mskd_plugin.__version__
    packages = {f.parent.relative_to(ROOT) for f in ROOT.glob("mskd_plugin/**/__init__.py")}
    assert set(setup["packages"]) == {".".join(path.parts) for path in packages}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with git's list of files")
def test_a_source_distribution_has_every_file(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    left = tmp_path / "tests" / "__pycache__" / "left.cpython-311.pyc"
    left.parent.mkdir()
    left.touch()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, check=True)
    with tarfile.open(next(tmp_path.glob("dist/*.tar.gz"))) as archive:
        packed = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in packed if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert packed - made == set(listed)


def test_pip_installs_no_mmcv_unasked(setup, requirements):
    assert not any(name.startswith("mmcv") for name in requirements)
    assert setup["extras_require"]["mmcv-lite"] == ["mmcv-lite==2.1.0"]


def test_pip_brings_what_every_training_logs_to(requirements):
    cfg = Config.fromfile(ROOT / "configs" / "_base_" / "default_runtime.py")
    assert [b["type"] for b in cfg.visualizer.vis_backends][1:] == ["TensorboardVisBackend"]
    assert "tensorboard" in requirements


def test_pip_and_the_host_ask_for_the_same_versions(requirements):
    for module, versions in NEEDED.items():
        if module == "mmcv":
            continue
        name = "setuptools" if module == "pkg_resources" else module
        expected = Requirement(_pip_requirement(module, versions, {}))
        assert requirements[name].specifier == expected.specifier, name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_suit_the_requirements(setup, requirements, python):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert re.fullmatch(r"==[^*]+", str(pin.specifier)), line
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            pins[pin.name] = Version(str(pin.specifier)[2:])
    wanted = [*requirements.values()]
    wanted += [Requirement(r) for extra in setup["extras_require"].values() for r in extra]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert suits(str(pins["mmcv-lite"]), NEEDED["mmcv"])
