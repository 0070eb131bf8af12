"""How every command line tool ends: an error in a setting is one line and exit status 2, not a
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mskd_plugin.errors import SettingError


def run_tool(main: Callable[[], object]) -> None:
    """Run a tool's ``main``.

    Args:
        main: The tool, reading its arguments from ``sys.argv``.

    Raises:
        SystemExit: With status 2, after ``error: ...`` on stderr, if ``main`` raises a
            :class:`~mskd_plugin.errors.SettingError`.
    """
    try:
        main()
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
