"""The switches of the networks' speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mskd_plugin import speed
from mskd_plugin.errors import check_flag
from mskd_plugin.hooks.preflight import PreflightHook
from mskd_plugin.unwrapped import model_of, optim_wrappers_of


@HOOKS.register_module()
class FastNetworksHook(Hook):
    """Lay networks out with the channels last, and compile them and their losses for training.

    It serves every model alike, a student or a teacher alone and any distillation. mmengine's own
    ``compile`` key compiles the whole ``train_step``, data samples, recorders' contexts and the
    optimizer included.

    Args:
        channels_last: Layout of images and maps, and of weights unless there are several processes
            (:func:`mskd_plugin.speed.to_channels_last`), in training and evaluation.
        compile: Whether to compile the backbones
            (:func:`mskd_plugin.speed.compile_backbones`), or a dict of arguments of
            ``torch.compile``, from torch 2.4 on. The first step of each batch size takes longer.
            Checks before training, the teacher's evaluation and validation run as without.
        compile_losses: The same for connectors and distillation losses, where there are any
            (:func:`mskd_plugin.speed.compile_losses`), from torch 2.9 on.

    Raises:
        SettingError: When built, if a setting is malformed or asks too much of this torch; before
            training, if the model cannot be compiled, or does not go with the CUDA graphs that
            ``mode="reduce-overhead"`` asks for.

    Example:
        ``tools/train.py CONFIG --cfg-options default_hooks.networks.compile=True``
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        channels_last: bool = False,
        compile: bool | Mapping[str, Any] = False,
        compile_losses: bool | Mapping[str, Any] = False,
    ) -> None:
        self.channels_last = check_flag("channels_last", channels_last)
        self._compile = speed.check_compile("compile", compile)
        self._compile_losses = speed.check_compile("compile_losses", compile_losses)
        self._compiled: list[speed.CompiledMethods] = []
        self._in_epoch = False

    @property
    def cuda_graphs(self) -> bool:
        """Whether training steps run as CUDA graphs."""
        options = (self._compile, self._compile_losses)
        return any(map(speed.asks_for_cuda_graphs, options)) and torch.cuda.is_available()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the kernels that the config asks for: a resumed optimizer would take over the
        checkpoint's.
        """
        # Of initial weights the optimizer is not read, and may be of another kind.
        wrapper, states = runner.optim_wrapper, runner._resume and checkpoint.get("optimizer")
        if isinstance(wrapper, OptimWrapperDict) and states:  # an OptimWrapper, too
            for name, single in wrapper.items():
                speed.keep_kernels(single.optimizer, states[name])
        elif isinstance(wrapper, OptimWrapper) and states:
            speed.keep_kernels(wrapper.optimizer, states)

    def before_train(self, runner: Runner) -> None:
        """Set the layout, of what a checkpoint brought too, and prepare the compilation.

        Not before: weights of another layout would be drawn in another order.
        """
        wrappers = optim_wrappers_of(runner)
        self._lay_out(runner)
        for single in wrappers:
            speed.place_state(single.optimizer)
        model = model_of(runner)
        if self.cuda_graphs:
            accumulated = max(getattr(single, "_accumulative_counts", 1) for single in wrappers)
            speed.check_cuda_graphs(model, accumulated)
        self._compiled = []
        if self._compile is not None:
            self._compiled.append(speed.compile_backbones(model, self._compile))
        if self._compile_losses is not None:
            # From the first step on where that can be: a training that resumes would else take one
            # step, to rounding, otherwise than a training that was not interrupted.
            ran = any(isinstance(h, PreflightHook) and h.ran_losses for h in runner.hooks)
            after = 0 if ran else 1
            self._compiled.append(speed.compile_losses(model, self._compile_losses, after))
        if names := [name for compiled in self._compiled for name in compiled.names]:
            runner.logger.info(
                f"Compiled for training: {', '.join(names)}. The first steps are slow."
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch to the compiled networks."""
        self._in_epoch = True
        self._switch()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Let CUDA graphs, where ``mode`` asks for them, know that a step begins.

        torch would else take the student's graph, which runs while nothing waits for a backward
        pass, for the next step, and the memory of the teacher's maps for free.
        """
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def after_train_epoch(self, runner: Runner) -> None:
        """Switch back."""
        self._in_epoch = False
        self._switch()

    def before_val(self, runner: Runner) -> None:
        """Evaluate without the compiled networks; an iteration-based loop evaluates inside its
        epoch.
        """
        self._lay_out(runner)
        self._switch(False)

    def after_val(self, runner: Runner) -> None:
        """Go on as before."""
        self._switch()

    def before_test(self, runner: Runner) -> None:
        """Set the layout."""
        self._lay_out(runner)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was, but for the layout."""
        for compiled in self._compiled:
            compiled.remove()
        self._compiled = []

    def _lay_out(self, runner: Runner) -> None:
        if self.channels_last:
            speed.to_channels_last(runner.model)

    def _switch(self, on: bool = True) -> None:
        for compiled in self._compiled:
            compiled.enabled = on and self._in_epoch
