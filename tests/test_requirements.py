"""The check of the host packages: every problem is one error, which names the command."""

import sys
from importlib import metadata

import pytest
from fresh_process import ROOT, run_python

from mskd_plugin import requirements
from mskd_plugin.requirements import HostError


@pytest.fixture
def packages(monkeypatch):
    """The versions that are seen as installed; a test changes them."""
    versions = {
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "mmengine": "0.10.7",
        "mmcv-lite": "2.1.0",
        "mmpretrain": "1.2.0",
        "mmrazor": "1.0.0",
        "joblib": "1.6.0",
        "setuptools": "80.9.0",
        "packaging": "26.0",
    }

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def is_missing(module):
        return not set(requirements.DISTRIBUTIONS.get(module, (module,))) & set(versions)

    monkeypatch.setattr(requirements.metadata, "version", version)
    monkeypatch.setattr(requirements, "_is_missing", is_missing)
    return versions


@pytest.mark.parametrize("mmcv", ["mmcv", "mmcv-lite"])
def test_suitable_packages_pass(packages, mmcv):
    del packages["mmcv-lite"]
    packages[mmcv] = "2.1.0"
    for version in ("2.1.0+cu121", "2.6.0a0+df5bbc09d1.nv24.12", "2.12.0.dev20260101+cpu"):
        packages["torch"] = version
        requirements.check_requirements()


@pytest.mark.parametrize(
    "installed, problem, command",
    [
        ({"torch": None}, "torch is missing", "pip install 'torch>=2.1'"),
        ({"torch": "2.0.1"}, "torch >=2.1 is needed, but found torch 2.0.1", "'torch>=2.1'"),
        ({"torchvision": None}, "torchvision is missing", "pip install 'torchvision>=0.16'"),
        ({"mmengine": None}, "mmengine is missing", "pip install 'mmengine>=0.10.4,<1'"),
        ({"mmengine": "0.8.2"}, "but found mmengine 0.8.2", "pip install 'mmengine>=0.10.4,<1'"),
        ({"mmpretrain": None}, "mmpretrain is missing", "pip install 'mmpretrain>=1.2.0,<2'"),
        ({"mmrazor": None}, "mmrazor is missing", "pip install 'mmrazor>=1.0.0,<1.1'"),
        ({"mmrazor": "0.3.1"}, "but found mmrazor 0.3.1", "pip install 'mmrazor>=1.0.0,<1.1'"),
        ({"joblib": None}, "joblib is missing", "pip install joblib"),
        ({"setuptools": None}, "pkg_resources is missing", "pip install 'setuptools<81'"),
        ({"mmcv-lite": None}, "mmcv is missing", "pip install mmcv-lite==2.1.0"),
        ({"mmcv-lite": "2.2.0"}, "but found mmcv-lite 2.2.0", ": pip install mmcv-lite==2.1.0"),
        ({"mmcv-lite": None, "mmcv": "2.2.0"}, "found mmcv 2.2.0", ": pip install mmcv==2.1.0"),
        ({"mmcv-lite": None, "mmcv": "2.0.0rc4"}, "2.0.0rc4", ": pip install mmcv==2.1.0"),
        (
            {"mmcv-lite": None, "mmcv-full": "1.7.2"},
            "found mmcv-full 1.7.2",
            ": pip uninstall -y mmcv-full && pip install mmcv==2.1.0",
        ),
        (
            {"mmcv": "2.2.0"},
            "found mmcv 2.2.0",
            ": pip uninstall -y mmcv mmcv-lite && pip install mmcv==2.1.0",
        ),
    ],
)
def test_each_problem_names_its_command(packages, installed, problem, command):
    for name, version in installed.items():
        if version is None:
            del packages[name]
        else:
            packages[name] = version
    with pytest.raises(HostError) as error:
        requirements.check_requirements()
    assert problem in str(error.value)
    assert command in str(error.value)


def test_all_problems_are_one_error(packages):
    del packages["joblib"], packages["setuptools"]
    packages["mmcv-lite"] = "2.2.0"
    with pytest.raises(HostError) as error:
        requirements.check_requirements()
    assert str(error.value).endswith("pip install mmcv-lite==2.1.0 joblib 'setuptools<81'")


def test_versions_are_not_compared_without_packaging(packages, monkeypatch):
    del packages["packaging"]
    packages["torch"] = "2.0.1"
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    with pytest.raises(HostError, match="environment: packaging is missing. .*packaging$"):
        requirements.check_requirements()


def test_a_folder_of_a_modules_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "some_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert requirements._is_missing("some_folder") and not requirements._is_missing("json")


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError])
def test_torchvision_of_another_build(monkeypatch, error):
    def fail(name):
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr(requirements, "import_module", fail)
    with pytest.raises(HostError, match=r"torchvision .* does not work with torch .*::nms"):
        requirements.check_requirements()


@pytest.mark.parametrize("module", ["joblib", "pkg_resources"])
def test_import_stops_at_a_missing_module(module):
    code = f"import sys; sys.modules[{module!r}] = None; import mskd_plugin"
    done = run_python(code, ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("mskd_plugin.requirements.HostError: ") and f"{module} is missing" in last
    )


def test_import_stops_at_a_newer_mmcv(tmp_path):
    info = tmp_path / "mmcv-2.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmcv\nVersion: 2.2.0\n")
    done = run_python("import mskd_plugin", tmp_path, ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "mmcv >=2.0.0,<=2.1.0 is needed, but found mmcv 2.2.0" in last
    assert last.endswith("&& pip install mmcv==2.1.0")
