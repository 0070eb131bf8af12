"""How every command line tool ends: an error in a setting is one line and exit status 2, not a
traceback.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from io import TextIOWrapper

from torch import distributed as dist

from mskd_plugin.errors import SettingError


def run_tool(main: Callable[[], object]) -> None:
    """Run a tool's ``main``; what the terminal cannot show, ± or a file's name, does not end it.

    Args:
        main: The tool, reading its arguments from ``sys.argv``.

    Raises:
        SystemExit: With status 2, after ``error: ...`` on stderr, if ``main`` raises a
            :class:`~mskd_plugin.errors.SettingError`.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
    status = 0
    try:
        main()
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        status = 2
    _leave_process_group(failed=status > 0)  # not above, where the error's frames hold the models
    if status:
        raise SystemExit(status)


def _leave_process_group(failed: bool) -> None:
    """End communication while Python still runs.

    A thread of gloo that is late to release a tensor would else abort the process as it exits. The
    threads end with the last reference to the process group, which models hold, too. NCCL would
    wait for the other processes, which after an error of this one alone wait for it.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    if not failed or dist.get_backend() == "gloo":
        gc.collect()
        dist.destroy_process_group()
