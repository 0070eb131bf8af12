"""List the pairs and methods, and which methods work for which pair.

python tools/list_configs.py
"""

from __future__ import annotations

import argparse
import itertools
import string
from collections.abc import Iterator
from pathlib import Path

from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import read_config
from mskd_plugin.recipes import METHODS

PAIRS = Path(__file__).resolve().parent.parent / "configs" / "_base_" / "pairs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="List the pairs and methods, and which methods work for which pair. Each cell "
        "runs by tools/train.py configs/_base_/pairs/PAIR.py --method METHOD.",
        epilog="example: python tools/list_configs.py --pair wrn-40-2",
    )
    parser.add_argument("--pair", default="", help="only pairs whose name contains this")
    return parser.parse_args(argv)


def matrix(contains: str = "") -> tuple[list[str], dict[str, dict[str, str]]]:
    """Return the pairs' names, and for each method and pair "" or why it does not work."""
    files = sorted(file for file in PAIRS.glob("*.py") if contains in file.stem)
    bases = {file.stem: read_config(file) for file in files}
    refusals: dict[str, dict[str, str]] = {}
    for name, method in sorted(METHODS.items()):
        refusals[name] = {}
        for pair, base in bases.items():
            try:
                method(base)
                refusals[name][pair] = ""
            except SettingError as error:
                refusals[name][pair] = str(error)
    return list(bases), refusals


def main(argv: list[str] | None = None) -> None:
    """Print the matrix."""
    args = parse_args(argv)
    pairs, refusals = matrix(args.pair)
    if not pairs:
        raise SettingError("--pair", f"part of a name in {PAIRS}", repr(args.pair))
    # One letter for each expectation, and behind it what the pairs have instead.
    reasons: dict[str, dict[str, list[int]]] = {}
    for row in refusals.values():
        for number, pair in enumerate(pairs, start=1):
            if row[pair]:
                expected, _, got = row[pair].partition(", but got ")
                reasons.setdefault(expected, {}).setdefault(got, []).append(number)
    letters = dict(zip(sorted(reasons), _letters()))
    print("Pairs:")
    for number, pair in enumerate(pairs, start=1):
        print(f"  {number:>2}  {pair}")
    print("\n| method | " + " | ".join(str(n) for n in range(1, len(pairs) + 1)) + " |")
    print("| --- " * (len(pairs) + 1) + "|")
    for name, row in refusals.items():
        cells = [letters[row[p].partition(", but got ")[0]] if row[p] else "x" for p in pairs]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nx: works.")
    for expected, letter in letters.items():
        print(f"{letter}: {expected}, but got")
        for got, numbers in reasons[expected].items():
            distinct = ", ".join(str(number) for number in sorted(set(numbers)))
            print(f"     {distinct}: {got}")


def _letters() -> Iterator[str]:
    """Yield a, b, ..., z, aa, ab, ... without x."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            if letters != ("x",):
                yield "".join(letters)


if __name__ == "__main__":
    run_tool(main)
