"""The same teacher before and after a resume."""

from __future__ import annotations

import hashlib

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import model_of


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@HOOKS.register_module()
class TeacherIdentityHook(Hook):
    """Note the frozen teacher's digest in each checkpoint, and refuse to resume with another
    teacher.

    Checkpoints leave the teacher out, so its file is read again on resume, and could have been
    replaced.
    """

    def __init__(self) -> None:
        self._digest: str | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write the digest into the checkpoint's ``meta``."""
        digest = self._teacher_digest(runner)
        if digest is not None:
            checkpoint["meta"]["teacher_sha256"] = digest

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare on resume.

        Raises:
            SettingError: If the checkpoint was trained with another teacher.
        """
        noted = checkpoint.get("meta", {}).get("teacher_sha256")
        if noted is None or not runner._resume:
            return
        digest = self._teacher_digest(runner)
        if digest is not None and digest != noted:
            raise SettingError(
                "teacher_ckpt",
                f"the teacher that this run began with (SHA-256 {noted[:12]}...)",
                f"another one ({digest[:12]}...)",
            )

    def _teacher_digest(self, runner: Runner) -> str | None:
        """Compute the digest at its first use, when the weights are in place."""
        model = model_of(runner)
        teacher = getattr(model, "teacher", None)
        if teacher is None or getattr(model, "teacher_trainable", False):
            return None
        if self._digest is None:
            self._digest = weights_digest(teacher)
        return self._digest
