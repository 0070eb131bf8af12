"""The folder of a training: continued from a checkpoint there, left alone if it is another's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from mskd_plugin.checkpoints.newest import newest_checkpoint
from mskd_plugin.checks.settings import RANKS
from mskd_plugin.errors import SettingError, check_file, check_output

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

#: The file of a work folder by which a process holds it.
LOCK = ".lock"


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue a training.

    Args:
        cfg: The config.
        checkpoint: A checkpoint file, or ``"auto"`` for the newest in the work folder; without any
            there, training starts at the beginning, from the config's ``load_from`` if it has one.

    Raises:
        SettingError: If there is no such file.
    """
    cfg.resume = True
    if checkpoint == "auto":
        newest = newest_checkpoint(cfg.work_dir)
        if cfg.get("load_from"):  # which the runner would resume from, whatever is in the folder
            cfg.resume, cfg.load_from = newest is not None, newest or cfg.load_from
        elif newest and newest != find_latest_checkpoint(cfg.work_dir):
            cfg.load_from = newest  # else left to the runner: its config serves other folders, too
        return
    check_file("--resume", checkpoint, "a checkpoint")
    cfg.load_from = checkpoint


def check_work_dir(cfg: Config) -> None:
    """Refuse to train into a folder that holds another run's checkpoints.

    Raises:
        SettingError: If there are checkpoints and the run does not resume from one of them.
    """
    folder, start = Path(cfg.work_dir), cfg.get("load_from")
    own = {folder.resolve()}  # and with CheckpointHook's out_dir that of the newest
    if (note := folder / "last_checkpoint").is_file():
        own.add(Path(note.read_text()).resolve().parent)
    elsewhere = start and Path(start).expanduser().resolve().parent not in own
    if (not cfg.get("resume") or elsewhere) and (folder / "last_checkpoint").exists():
        raise SettingError(
            "--work-dir",
            "a folder without checkpoints, or --resume to continue from its own",
            f"{cfg.work_dir!r}, whose checkpoints would be overwritten",
        )


@contextmanager
def work_dir_held(cfg: Config) -> Iterator[None]:
    """Keep other processes from training into the work folder.

    By a lock of the operating system, which goes with the process, however that ends. Trainings
    that nobody waits for go on, those of a killed ``compare.py`` for one. Of the processes of one
    training the first holds it. Where there are no locks, on Windows and some disks, none is held.

    Raises:
        SettingError: If another process holds it, or the folder cannot be written.
    """
    if fcntl is None or os.environ.get(RANKS.get(cfg.get("launcher", "none"), ""), "0") != "0":
        yield
        return
    folder = Path(cfg.work_dir).absolute()
    check_output("--work-dir", Path(cfg.work_dir), folder=True)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise SettingError(
                "--work-dir",
                "a folder that no other training writes into",
                f"{cfg.work_dir!r}, with that of process {lock.read().strip()}",
            ) from error
        except OSError:
            pass
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)
            for part in made:
                with suppress(OSError):  # not empty, unless the training was refused
                    part.rmdir()
