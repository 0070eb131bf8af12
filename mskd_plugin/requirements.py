"""Which packages the plugin needs, and one error where one of them is missing or unsuitable.

Read from metadata, before any of the packages is imported.
"""

from __future__ import annotations

import shlex
from importlib import import_module, metadata
from importlib.util import find_spec

#: Module -> versions that work, in pip's notation. ``mmcv``: mmrazor 1.0.0 asserts <=2.1.0,
#: mmpretrain >=2.0.0.
NEEDED = {
    "torch": ">=2.1",
    "torchvision": ">=0.16",
    "mmengine": ">=0.10.4,<1",
    "mmcv": ">=2.0.0,<=2.1.0",
    "mmpretrain": ">=1.2.0,<2",
    "mmrazor": ">=1.0.0,<1.1",
    "joblib": "",
    "pkg_resources": "",
    "packaging": "",
}
#: What pip calls the module, where that differs. Several distributions own the folder ``mmcv``.
DISTRIBUTIONS = {"mmcv": ("mmcv", "mmcv-full", "mmcv-lite"), "pkg_resources": ("setuptools",)}


class HostError(ImportError):
    """A host package is missing or does not suit the others; the message names the command that
    mends it.
    """


def check_requirements() -> None:
    """Turn a missing or unsuitable package into one error.

    Without it the same faults surface one at a time, deep inside the host: an ``AssertionError`` of
    mmrazor for mmcv 2.2, ``No module named 'pkg_resources'`` of mmengine for setuptools 81 and
    later, ``No module named 'joblib'`` since mmrazor imports it and does not declare it.

    Raises:
        HostError: With what was found, what is needed, and the pip command.
    """
    problems, uninstall, install = [], [], []
    for module, versions in NEEDED.items():
        found = installed(module)
        if _is_missing(module):
            problem = f"{module} is missing"
        elif unsuitable := [f"{name} {v}" for name, v in found.items() if not suits(v, versions)]:
            problem = f"{module} {versions} is needed, but found {' and '.join(unsuitable)}"
        else:
            continue
        problems.append(problem)
        install.append(_pip_requirement(module, versions, found))
        if module == "mmcv" and (len(found) > 1 or "mmcv-full" in found):
            # pip would leave the other distribution's files in the shared folder.
            uninstall = list(found)
    if problems:
        commands = [["pip", "uninstall", "-y", *uninstall]] if uninstall else []
        commands.append(["pip", "install", *install])
        raise HostError(
            f"MMRazor does not work in this environment: {'; '.join(problems)}. "
            f"To mend it: {' && '.join(shlex.join(command) for command in commands)}"
        )
    _check_torchvision()


def _is_missing(module: str) -> bool:
    spec = find_spec(module)
    return spec is None or spec.origin is None  # no origin: a folder of that name, not a package


def installed(module: str) -> dict[str, str]:
    """Distribution -> version of those that are installed and own ``module``."""
    found = {}
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def suits(version: str, versions: str) -> bool:
    """Whether a version is one of those that pip's notation names."""
    if not versions or _is_missing("packaging"):
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version, prereleases=True)


def _pip_requirement(module: str, versions: str, found: dict[str, str]) -> str:
    """What pip has to install; never ``mmcv-lite`` where the full ``mmcv`` is or was."""
    if module == "mmcv":
        return "mmcv-lite==2.1.0" if set(found) <= {"mmcv-lite"} else "mmcv==2.1.0"
    return "setuptools<81" if module == "pkg_resources" else module + versions


def _check_torchvision() -> None:
    """Name the cause where torch and torchvision are of different builds, a CPU and a CUDA one for
    example.
    """
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError) as error:
        torch, torchvision = metadata.version("torch"), metadata.version("torchvision")
        raise HostError(
            f"torchvision {torchvision} does not work with torch {torch} ({error}). Both must be "
            "of one build. To mend it: pip install --force-reinstall torch torchvision"
        ) from error
