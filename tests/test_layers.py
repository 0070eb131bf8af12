"""Imports between the plugin's packages run one way."""

import ast
import sys
from graphlib import TopologicalSorter
from itertools import pairwise

import toy

PLUGIN = toy.ROOT / "mskd_plugin"
FILES = sorted(PLUGIN.rglob("*.py"))
#: None may import what comes after it.
ORDER = ["functional"], ["connectors", "losses"], ["algorithms"], ["checks"], ["hooks"], ["launch"]


def imported(file):
    """Return the dotted names that a module imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(file):
    """Return the package or the module, right inside the plugin, that a file is of."""
    return file.relative_to(PLUGIN).with_suffix("").parts[0]


def test_no_package_imports_one_after_it_and_none_in_a_circle():
    graph = {room(file): set() for file in FILES}
    for file in FILES:
        names = {name.split(".")[1] for name in imported(file) if name.startswith("mskd_plugin.")}
        graph[room(file)] |= names & graph.keys() - {room(file)}
    for before, after in pairwise(ORDER):
        for name in after:
            graph[name] |= {*before}  # an import the other way is a circle, through others too
    TopologicalSorter(graph).prepare()


def packages(part):
    """Return the packages that a part of the plugin imports, with the plugin's own parts."""
    names = {name for file in FILES if room(file) == part for name in imported(file)}
    own = {name.split(".")[1] for name in names if name.startswith("mskd_plugin.")} - {part}
    return {name.split(".")[0] for name in names} - {"mskd_plugin"}, own


def test_the_functions_need_torch_alone():
    outside, helpers = packages("functional")
    assert outside - {"torch"} <= sys.stdlib_module_names
    for helper in helpers:
        outside, others = packages(helper)
        assert outside <= sys.stdlib_module_names and not others, helper


def test_the_plugin_imports_neither_tools_nor_tests():
    around = {file.stem for part in ("tools", "tests") for file in (toy.ROOT / part).glob("*.py")}
    for file in FILES:
        assert not {name.split(".")[0] for name in imported(file)} & {*around, "tools", "tests"}
