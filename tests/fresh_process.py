"""Running code in a fresh Python process, where nothing is imported yet."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The package is here; its ``__init__``, which applies the mends, has not run.
LOAD_HOST_ALONE = f"""
import sys, types
package = types.ModuleType("mskd_plugin")
package.__path__ = [{str(ROOT / "mskd_plugin")!r}]
sys.modules["mskd_plugin"] = package
from mskd_plugin import host
"""


def run_python(code, *paths, check=True):
    """Run ``code`` in a fresh process, with ``paths`` before the installed packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr
    return done
