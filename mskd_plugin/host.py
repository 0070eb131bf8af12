"""What keeps MMRazor 1.0.0 from working with mmpretrain 1.2.0 on current torch, and the mends.

One function for each mend, applied by :func:`prepare_host` when :mod:`mskd_plugin` is imported. A
mend is applied only where what it cures is broken, so a host that works stays as it is. Import
:mod:`mskd_plugin` before ``mmrazor.models``.
"""

from __future__ import annotations

import functools
import pickle
import sys
import warnings
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mskd_plugin.files import written_whole
from mskd_plugin.requirements import check_requirements, installed, suits

QUANTIZATION = "mmrazor.structures.quantization"

#: Module of mmpretrain -> (mmcls's name, mmpretrain's name) of what was renamed in it.
RENAMED = {
    "mmpretrain.structures": ("ClsDataSample", "DataSample"),
    "mmpretrain.structures.data_sample": ("ClsDataSample", "DataSample"),
    "mmpretrain.datasets": ("PackClsInputs", "PackInputs"),
    "mmpretrain.datasets.transforms": ("PackClsInputs", "PackInputs"),
    "mmpretrain.datasets.transforms.formatting": ("PackClsInputs", "PackInputs"),
}


@functools.cache
def prepare_host() -> None:
    """Check the host packages and apply every mend that they need. Further calls do nothing.

    Raises:
        HostError: If a package is missing or unsuitable.
    """
    check_requirements()
    silence_mmcv_lite()
    alias_mmcls()
    stand_in_for_quantization()
    keep_unequal_classes()
    allow_checkpoint_classes()
    run_distributed_on_cpu()
    write_test_scores_once()
    keep_hooks_of_batch_norms()
    keep_whole_checkpoints()


def silence_mmcv_lite() -> None:
    """Import mmcv-lite without its advice to install mmcv.

    ``mmcv.cnn.bricks.transformer`` warns at import that one "should install mmcv rather than
    mmcv-lite" for an operator that classification does not use. Who follows it overwrites one
    distribution with the other.
    """
    if set(installed("mmcv")) == {"mmcv-lite"}:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``")
            import_module("mmcv.cnn.bricks.transformer")


def alias_mmcls() -> None:
    """Let ``mmcls`` name mmpretrain, which is the same package under its later name.

    mmrazor 1.0.0 knows mmcls alone: without it ``KDSoftCELoss``, ``PackCRDClsInputs``, config paths
    such as ``mmcls::resnet/resnet18_8xb32_in1k.py`` and types such as ``mmcls.ImageClassifier`` are
    dead. Here ``mmcls.x`` is the very module ``mmpretrain.x``, so classes stay identical; the
    registry scope ``mmcls`` shares mmpretrain's entries; the two renamed classes have both names.
    Not applied where a real mmcls is installed.
    """
    if find_spec("mmcls") is not None:
        return
    sys.meta_path.insert(0, _MmclsFinder())
    for module, (old, new) in RENAMED.items():
        setattr(import_module(module), old, getattr(import_module(module), new))

    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.registry import Registry
    from mmpretrain import registry as registries

    MODULE2PACKAGE["mmcls"] = "mmpretrain"  # config paths and hub models
    registries.TRANSFORMS.register_module(
        name="PackClsInputs", module=registries.TRANSFORMS.get("PackInputs")
    )
    for original in list(vars(registries).values()):
        if isinstance(original, Registry) and original.scope == "mmpretrain":
            alias = Registry(
                original.name,
                build_func=original.build_func,
                parent=original.parent,
                scope="mmcls",
                locations=original._locations,
            )
            alias._module_dict = original._module_dict


class _MmclsFinder(MetaPathFinder, Loader):
    """Imports ``mmcls.x`` as the module object ``mmpretrain.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, dot, rest = fullname.partition(".")
        original = find_spec(f"mmpretrain{dot}{rest}") if package == "mmcls" else None
        if original is None:
            return None
        spec = ModuleSpec(fullname, self, origin=original.origin, loader_state=original.name)
        spec.submodule_search_locations = original.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias's spec in the place of the module's own.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def stand_in_for_quantization() -> None:
    """Register a stand-in for mmrazor's quantization where it does not import.

    ``mmrazor.models`` imports it, and it needs names of ``torch.ao.quantization`` that torch 2 does
    not have (``reverse2``, ``_set_overwrite_output_fake_quantize`` and more), so nothing of
    mmrazor's models would import. Distillation uses none of it. The stand-in has the two names that
    mmrazor's models import; using either says what is missing.
    """
    try:
        import_module(QUANTIZATION)
        return
    except (ImportError, AttributeError) as error:
        cause = error
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{QUANTIZATION}.")]:
        del sys.modules[name]

    import torch

    missing = _Missing(
        f"{QUANTIZATION} does not import with torch {torch.__version__}, which lacks names that "
        f"it uses ({cause})."
    )
    stand_in = ModuleType(
        QUANTIZATION, "Stand-in by mskd_plugin: this part of mmrazor needs an older torch."
    )
    backends = ("academic", "native", "openvino", "tensorrt")
    vars(stand_in).update(
        __all__=["BackendConfigs", "QConfigHandler"],
        BackendConfigs=dict.fromkeys(backends, missing),
        QConfigHandler=missing,
    )
    sys.modules[QUANTIZATION] = stand_in
    vars(import_module("mmrazor.structures"))["quantization"] = stand_in


class _Missing:
    """Raises an ``ImportError`` when it is called or an attribute is read."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(self._message)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by Python itself, to copy or inspect
            raise AttributeError(name)
        raise ImportError(self._message)


def keep_unequal_classes() -> None:
    """Let ``CRDDataset`` take classes with unequal numbers of images.

    It turns its lists of each class's images into one array, which NumPy refuses from 1.24 on where
    they differ in length. They are only indexed by class afterwards, which the lists, complete by
    then, serve as well.
    """
    import numpy as np

    if not suits(np.__version__, ">=1.24"):
        return
    from mmrazor.datasets.crd_dataset_wrapper import CRDDataset

    parse = CRDDataset._parse_fullset_contrast_info

    @functools.wraps(parse)
    def parse_fullset_contrast_info(self: Any) -> None:
        try:
            parse(self)
        except ValueError as error:
            if "inhomogeneous" not in str(error):
                raise

    CRDDataset._parse_fullset_contrast_info = parse_fullset_contrast_info


def allow_checkpoint_classes() -> None:
    """Let ``torch.load`` read what mmengine writes, with its ``weights_only`` check left on.

    The check is the default from torch 2.6 on. mmengine's checkpoints hold histories of logged
    values as NumPy arrays, NumPy scalars (the best score, the remaining time), and references to
    the methods of ``HistoryBuffer`` and to the curves of ``OneCycleLR``, so that resuming fails
    (mmengine issue 1655). Allowed are these classes and nothing else: plain numbers of NumPy, under
    the module names of NumPy 1 and 2, and in the place of ``getattr`` one that returns those
    functions only.
    """
    import torch
    from torch import serialization

    if not suits(torch.__version__, ">=2.6.0.dev0"):
        return
    import numpy as np
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    rebuild_array, (rebuild_scalar, _) = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()
    functions: list[tuple[Any, str]] = [(_checkpoint_function, "builtins.getattr")]
    for package in ("numpy.core", "numpy._core"):
        functions.append((rebuild_array, f"{package}.multiarray._reconstruct"))
        functions.append((rebuild_scalar, f"{package}.multiarray.scalar"))
    numbers = ("bool", "int32", "int64", "float32", "float64")
    dtypes = [type(np.dtype(name)) for name in numbers]
    classes = [HistoryBuffer, OneCycleParamScheduler, np.ndarray, np.dtype, *dtypes]
    serialization.add_safe_globals([*classes, *functions])


def _checkpoint_function(owner: object, name: str) -> Any:
    """Stand in for ``getattr`` in checkpoints."""
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    allowed = {
        HistoryBuffer: ("current", "max", "mean", "min"),
        OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
    }
    if isinstance(owner, type) and name in allowed.get(owner, ()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        "Expected a reference to a statistic of HistoryBuffer or a curve of OneCycleLR, "
        f"but got {name!r} of {owner!r}."
    )


def run_distributed_on_cpu() -> None:
    """Let mmengine's ``pytorch`` launcher run where there is no accelerator, with gloo.

    mmengine (0.10.7 too) calls ``torch.cuda.set_device`` whatever the backend, and gives
    ``DistributedDataParallel`` the device ids of GPUs that are not there. Both functions ask at
    each call whether there is an accelerator, and where there is one do what they always did.
    """
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    initialise, wrap = utils._init_dist_pytorch, MMDistributedDataParallel.__init__

    @functools.wraps(initialise)
    def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        if init_backend == "torch" and _on_cpu():
            from torch import distributed

            distributed.init_process_group("gloo" if backend == "nccl" else backend, **kwargs)
        else:
            initialise(backend, init_backend=init_backend, **kwargs)

    @functools.wraps(wrap)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _on_cpu():
            kwargs.update(device_ids=None, output_device=None)
        wrap(self, *args, **kwargs)

    utils._init_dist_pytorch = init_dist_pytorch
    MMDistributedDataParallel.__init__ = init


def write_test_scores_once() -> None:
    """Let the main process alone write the scores of a test.

    mmengine's ``LoggerHook`` (0.10.7 too) writes them in every process to the same file; where two
    write at once, the file may end with a piece of the longer text.
    """
    from mmengine.dist import master_only
    from mmengine.hooks import logger_hook

    logger_hook.dump = master_only(logger_hook.dump)


def keep_hooks_of_batch_norms() -> None:
    """Let recorders on a BatchNorm record with ``sync_bn``, too.

    mmengine's runner replaces BatchNorms after MMRazor has put its recorders on them as hooks, and
    the new modules have none.
    """
    from mmengine.runner import runner

    convert = runner.convert_sync_batchnorm
    kinds = ("_forward_pre_hooks", "_forward_hooks")

    @functools.wraps(convert)
    def convert_with_hooks(module: Any, implementation: str = "torch") -> Any:
        # A BatchNorm that has two places in the model becomes two modules.
        replaced = dict(module.named_modules(remove_duplicate=False))
        converted = convert(module, implementation)
        for name, new in converted.named_modules():
            for kind in kinds:
                getattr(new, kind).update(getattr(replaced[name], kind))
        return converted

    runner.convert_sync_batchnorm = convert_with_hooks


def keep_whole_checkpoints() -> None:
    """Let a training that ends while it writes a checkpoint leave one to resume from.

    mmengine (0.10.7 too) removes the checkpoint that ``max_keep_ckpts`` has no room for before it
    writes the next one, and writes into the file itself, with ``save_best`` over the newest.
    """
    from mmengine.dist import is_main_process
    from mmengine.hooks import CheckpointHook
    from mmengine.runner import runner

    write, save = runner.save_checkpoint, CheckpointHook._save_checkpoint_with_step

    @functools.wraps(write)
    def write_whole(checkpoint: dict, filename: str, *args: Any, **kwargs: Any) -> None:
        if "://" in filename or any(args) or any(kwargs.values()):  # a backend of its own
            write(checkpoint, filename, *args, **kwargs)
            return
        with written_whole(Path(filename)) as file:
            write(checkpoint, str(file), *args, **kwargs)

    @functools.wraps(save)
    def save_before_removing(self: Any, runner: Any, step: int, meta: dict) -> None:
        room = self.max_keep_ckpts
        if room <= 0:
            save(self, runner, step, meta)
            return
        self.max_keep_ckpts, self.keep_ckpt_ids = room + 1, deque(self.keep_ckpt_ids, room + 1)
        try:
            save(self, runner, step, meta)
        finally:
            self.max_keep_ckpts = room
        while len(self.keep_ckpt_ids) > room:
            name = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            if is_main_process():
                old = self.file_backend.join_path(self.out_dir, name)
                if self.file_backend.isfile(old):
                    self.file_backend.remove(old)
                elif self.file_backend.isdir(old):  # deepspeed's are folders
                    self.file_backend.rmtree(old)
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    runner.save_checkpoint = write_whole
    CheckpointHook._save_checkpoint_with_step = save_before_removing


def _on_cpu() -> bool:
    from mmengine import device

    return bool(device.get_device() == "cpu")
