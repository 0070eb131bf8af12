"""The newest checkpoint of a work folder."""

from __future__ import annotations

import os
from pathlib import Path

from mskd_plugin.errors import SettingError


def newest_checkpoint(work_dir: str | Path) -> str | None:
    """Return the newest checkpoint of a work folder, which may have been moved; None without any.

    MMEngine notes its path as it was when it was written. The file of that name in the folder
    itself goes first, for the folder may be a copy.

    Raises:
        SettingError: If the file is neither in the folder nor where it was written.
    """
    note = Path(work_dir) / "last_checkpoint"
    if not note.exists():
        return None
    noted = note.read_text().strip()
    here = os.path.join(os.path.abspath(work_dir), os.path.basename(noted))
    for path in (here, noted) if noted else ():
        if "://" in path or os.path.exists(path):
            return path
    raise SettingError(
        "--resume",
        f"the checkpoint that {note} names",
        f"{noted!r}, which is not there, and no file of that name in {str(work_dir)!r}",
        "One that is left can be named: --resume FILE.",
    )
