"""Read checkpoints without running code in them, on every supported torch.

``torch.load(weights_only=True)`` refuses what mmengine writes while training until it is told which
classes to allow (:func:`mskd_plugin.host.allow_checkpoint_classes`), which torch can be told from
2.6 on. For older torch this module is also a pickle module, as ``torch.load(pickle_module=...)``
wants it: it finds what tensors are rebuilt with, gives placeholders for the objects that mmengine
keeps beside the weights, and refuses all else. Nothing that it finds can run code, or change what
other code uses.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from packaging.version import Version

_BUILDERS = (
    torch._utils._rebuild_parameter,
    torch._utils._rebuild_tensor,
    torch._utils._rebuild_tensor_v2,
)
#: Types of C, which a file cannot change.
_TYPES = {
    "builtins.complex": complex,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
}
#: Read as placeholders: bytes, the options that training scripts keep beside the weights, and what
#: mmengine's histories, scores and schedulers consist of.
_LEFT_OUT = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "collections.Counter",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


def load_plain(path: str | Path) -> Any:
    """Load a file that ``torch.save`` wrote onto the CPU, with tensors and plain data only.

    Before torch 2.6 mmengine's histories, NumPy's numbers and the like are placeholders in what is
    returned.

    Raises:
        pickle.UnpicklingError: If the file holds other objects, which could run code, or is
        damaged.
        EOFError, OSError, RuntimeError: As ``torch.load`` raises them for files that it cannot
        read, those that were cut off among them.
    """
    try:
        if Version(torch.__version__) >= Version("2.6.0.dev0"):
            # The options of a training script, which the CRD benchmark's last files hold: a bare
            # object whose attributes are plain data themselves.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        _refuse_archives(str(path))
        return torch.load(path, map_location="cpu", pickle_module=sys.modules[__name__])
    except (
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        OverflowError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        # What unpickling raises for a damaged stream, besides its own error.
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _refuse_archives(path: str) -> None:
    """Refuse what torch 2.6 and later refuse, and older torch reads without looking at the pickle
    module.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(path).get_all_records():
        raise pickle.UnpicklingError("a TorchScript archive, which holds code")
    if tarfile.is_tarfile(path):
        raise pickle.UnpicklingError("a tar archive, which can write files")


class Placeholder:
    """Stands for an object beside the weights; takes whatever the object would, and does
    nothing.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        """Do nothing, in place of taking attributes."""


class Unpickler(pickle.Unpickler):
    """An unpickler that finds the names of this module's tables, and nothing else."""

    def load(self) -> Any:
        """Unpickle one object; of what is stored outside the stream, storages alone."""
        resolve: Any = getattr(self, "persistent_load", None)

        def resolve_storage(saved_id: Any) -> Any:
            # torch writes a file where the source of a saved module differs from the installed one.
            if saved_id[0] != "storage":
                raise pickle.UnpicklingError(f"{saved_id[0]!r} is stored where weights should be.")
            return resolve(saved_id)

        if resolve is not None:
            self.persistent_load = resolve_storage  # type: ignore[method-assign]
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """Return what ``module.name`` stands for.

        Raises:
            pickle.UnpicklingError: If it is in no table.
        """
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name in _TYPES:
            return _TYPES[full_name]
        if full_name in _LEFT_OUT:
            return Placeholder
        if full_name == "builtins.getattr":
            return lambda owner, attribute: _attribute(owner, attribute)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        for builder in _BUILDERS:
            if full_name == f"torch._utils.{builder.__name__}":
                # A new function each time, since a file can set the attributes of what it finds.
                return lambda *args, builder=builder: builder(*args)
        raise pickle.UnpicklingError(f"GLOBAL {full_name} is not among what weights need.")


def load(file: IO[bytes], **kwargs: Any) -> Any:
    """Unpickle one object, as ``pickle.load`` does."""
    return Unpickler(file, **kwargs).load()


def _attribute(owner: object, name: str) -> type[Placeholder]:
    if owner is not Placeholder:
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr asks for {name!r} of {owner!r}.")
    return Placeholder
