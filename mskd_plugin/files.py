"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file to write that takes the place of ``path`` once it is complete.

    Where writing fails, on a full disk for one, what ``path`` held before is still there.

    Args:
        path: The file, whose folders may be new. A link stays, and what it points to is replaced.
            What cannot be, ``/dev/stdout`` or a file in a folder that may not be written, is
            written to itself.

    Yields:
        A new file of the same name, which ``torch.save`` puts into its file, on the same disk.
    """
    path = path.resolve()
    if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def write_json(content: Any, path: Path) -> None:
    """Write ``path`` whole (:func:`written_whole`), as indented JSON."""
    with written_whole(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
