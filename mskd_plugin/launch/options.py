"""The options that the command line tools share."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mmengine.config import DictAction

from mskd_plugin.errors import check_count

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


class _Overrides(DictAction):
    """MMEngine's reader of ``KEY=VALUE``, with a usage error for what is not of that form."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if not re.match(r"[^=\s]+=", value) or not _balanced(value):
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, but got {value!r}")
            if re.search(r"[=\[(,]\s*\{[^}]*:", value):  # on which MMEngine's reader recurses
                told = (
                    f"expected a dict as KEY.SUBKEY=VALUE for each of its keys, but got {value!r}"
                )
                raise argparse.ArgumentError(self, told)
        super().__call__(parser, namespace, values, option_string)


class Count(argparse.Action):
    """A whole number, or with ``nargs`` several, of at least ``least``.

    Raises:
        SettingError: Naming the option.
    """

    def __init__(self, option_strings: list[str], dest: str, least: int = 1, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, type=int, **kwargs)
        self.least = least

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Check and keep what was given."""
        for value in values if isinstance(values, list) else [values]:
            check_count(self.option_strings[0], value, self.least)
        setattr(namespace, self.dest, values)


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in ("()", "[]"))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--method",
        help="with the config of a pair, configs/_base_/pairs/*.py: the method, several joined by "
        "+, or student or teacher alone (tools/list_configs.py lists them)",
    )
    parser.add_argument(
        "--work-dir",
        help="folder for logs and checkpoints (default: work_dirs/<config's name>, with --method "
        "work_dirs/<method>_<config's name>)",
    )
    add_overrides(parser)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="how the processes are started"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Overrides,
        default={},
        metavar="KEY=VALUE",
        help="settings to override, e.g. train_dataloader.batch_size=32 "
        "optim_wrapper.optimizer.lr=0.1",
    )


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the switches of training that change its speed, not its method."""
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision (bfloat16; float16 on GPUs without it)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="every switch of configs/_base_/fast.py: mixed precision, channels_last, compiled "
        "networks, fused optimizer, teacher in inference mode, log without waiting",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="hold the images in memory, on the GPU where there is one, and crop and flip them by "
        "the batch; for small images with RandomCrop and RandomFlip, as CIFAR's",
    )
