"""Every method in two gloo processes: optimizer steps, and gradients against one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import test_distributed
import token_oracles
import torch
import torch.distributed as dist
import toy
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from test_distributed import own_rows
from tolerances import TOLERANCES
from torch import nn

from mskd_plugin.algorithms import TwoPhaseDistill
from mskd_plugin.launch import use_method
from mskd_plugin.losses import MemoryCRDLoss
from mskd_plugin.networks import by_name
from mskd_plugin.recipes import METHODS

both = test_distributed.both
TINY = {
    "tiny_student": by_name._cifar_resnet(8, toy.WIDTHS["student"]),
    "tiny_teacher": by_name._cifar_resnet(8, toy.WIDTHS["teacher"]),
    # FSP needs the student's channels.
    "tiny_teacher_as_narrow": by_name._cifar_resnet(14, toy.WIDTHS["student"]),
    **token_oracles.TINY,
}
IMAGES, STEPS = 4, 2  # images of both processes together
ON_TOKENS = " on tokens"
CASES = [*METHODS, "mskd+kd", "mskd+dkd", "mskd+ft"]
CASES += [f"{name}{ON_TOKENS}" for name in ("at", "fitnet", "ft", "nst", "ofa", "sp", "vid")]
IN_TWO_PHASES = {"ab", "fsp", "ft", "mskd+ft", f"ft{ON_TOKENS}"}

#: Each image, and with it each process, adds its own share to the loss, which is a mean of them.
MEAN_OF_IMAGES = {
    *("ab", "at", "dkd", "fitnet", "fsp", "ft", "kd", "ls_kd", "nkd", "nst", "ofa", "ofd"),
    *("reviewkd", "sdd_dkd", "sdd_kd", "sdd_nkd", "vid", "wsld"),
    *(f"{name}{ON_TOKENS}" for name in ("at", "fitnet", "ft", "nst", "ofa", "vid")),
}
#: The loss compares images with each other or with a memory, and gathers what all processes have.
GATHERED: dict[str, dict[str, Any]] = {
    # As many negatives as there are images of other classes: all of them, whatever is drawn.
    "crd": {"num_images": IMAGES, "num_negatives": IMAGES - 1},
    "mskd": {"negatives": "all"},
}
#: The loss compares images of its own process with each other, as the published code does: by
#: pairs (CC, PKT, RKD, SP), by a class's probabilities over the batch (DIST), or by both (MLKD).
#: MSKD does so with its default, the negatives of this process.
OF_THIS_PROCESS = {
    *("cc", "dist", "mlkd", "mskd", "mskd+dkd", "mskd+ft", "mskd+kd", "pkt", "rkd", "sp"),
    f"sp{ON_TOKENS}",
}


def build(name: str, seed: int, **settings: Any):
    """Return the model of a method for the tiny pair, and what the runner tells the wrapper."""
    init_default_scope("mmpretrain")
    teacher = "tiny_teacher_as_narrow" if name == "fsp" else "tiny_teacher"
    student, on_tokens = "tiny_student", name.endswith(ON_TOKENS)
    if on_tokens:
        teacher, student, name = "tiny_mixer", "tiny_vit", name.removesuffix(ON_TOKENS)
    cfg = Config(
        dict(
            pair=dict(
                teacher=teacher,
                student=student,
                num_classes=toy.CLASSES,
                image_side=side(on_tokens),
                settings={name: settings} if settings else {},
            ),
            num_train_images=STEPS * IMAGES,
            data_preprocessor=dict(type="ClsDataPreprocessor", mean=[80.0] * 3, std=[80.0] * 3),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            param_scheduler=[],
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        )
    )
    with patch.dict(by_name.NETWORKS, TINY):
        use_method(cfg, name)
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
    return model, cfg.get("find_unused_parameters", False)


def wrap(model, find_unused_parameters: bool):
    """Wrap as mmengine's runner does, before any phase; in one process the model stays bare."""
    if not dist.is_initialized():
        return model
    return MMDistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=find_unused_parameters
    )


def side(on_tokens: bool) -> int:
    return token_oracles.SIDE if on_tokens else 32


def share(step: int, on_tokens: bool = False) -> dict[str, Any]:
    """This process's share of a step's images, their labels and indices."""
    generator = torch.Generator().manual_seed(step)
    size = side(on_tokens)
    images = 255 * torch.rand(IMAGES, 3, size, size, generator=generator)
    samples = [
        DataSample(metainfo=dict(sample_idx=i)).set_gt_label(i % toy.CLASSES)
        for i in range(step * IMAGES, (step + 1) * IMAGES)
    ]
    own = own_rows(torch.arange(IMAGES))
    return dict(inputs=images[own], data_samples=[samples[i] for i in own])


def phases(model) -> tuple:
    return (1, 2) if isinstance(model, TwoPhaseDistill) else (None,)


def values(tensors) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors}


def without_gradient(model) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def _train(name: str) -> list[dict]:
    """Two steps in each phase: what is logged, and what is equal in all processes afterwards."""
    # Each process draws its own weights, which those of rank 0 replace.
    model, find_unused_parameters = build(name, seed=dist.get_rank())
    wrapped = wrap(model, find_unused_parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optim_wrapper = OptimWrapper(optimizer)
    unused: set[str] = set()
    optimizer.register_step_pre_hook(lambda *_: unused.update(without_gradient(model)))
    reports = []
    for phase in phases(model):
        if phase:
            model.enter_phase(phase)
            optimizer.state.clear()  # as PhaseHook does
        wrapped.train()
        before = values(model.student.named_parameters())
        batches = [share(step, name.endswith(ON_TOKENS)) for step in range(STEPS)]
        logged = [wrapped.train_step(batch, optim_wrapper) for batch in batches]
        losses = model.distiller.distill_losses.values()
        reports.append(
            dict(
                logged=[{key: value.item() for key, value in log.items()} for log in logged],
                unused=sorted(unused),
                parameters=values(model.named_parameters()),
                memories=[
                    values(loss.named_buffers()) for loss in losses if type(loss) is MemoryCRDLoss
                ],
                student_moved=any(
                    not np.array_equal(old, new.detach().numpy())
                    for old, new in zip(before.values(), model.student.parameters(), strict=True)
                ),
            )
        )
    return reports


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_steps_alike(both, name):
    first, second = both(_train, name)
    assert len(first) == (2 if name in IN_TWO_PHASES else 1)
    for phase, reports in enumerate(zip(first, second, strict=True), start=1):
        for report in reports:
            assert all(np.isfinite(list(log.values())).all() for log in report["logged"])
            assert not report["unused"]
            # The paraphraser of FT learns before the student does.
            of_ft = name.removesuffix(ON_TOKENS).endswith("ft")
            assert report["student_moved"] == (not of_ft or phase == 2)
        own, other = reports
        np.testing.assert_equal(own["parameters"], other["parameters"])
        np.testing.assert_equal(own["memories"], other["memories"])
        assert bool(own["memories"]) == (name == "crd")
        assert own["logged"] != other["logged"]  # of different images


def _gradients(name: str, settings: dict) -> list[tuple[float, np.ndarray]]:
    """Each phase's loss and its gradient, in float64 and without statistics of the batch."""
    reports = []
    model, find_unused_parameters = build(
        name, seed=dist.get_rank() if dist.is_initialized() else 0, **settings
    )
    model.double()
    wrapped = wrap(model, find_unused_parameters)
    for phase in phases(model):
        if phase:
            model.enter_phase(phase)
        wrapped.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        data = share(0, name.endswith(ON_TOKENS))
        data["inputs"] = (data["inputs"].double() - 127) / 80
        loss, _ = model.parse_losses(wrapped(**data, mode="loss"))
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        reports.append((loss.item(), torch.cat(grads).numpy()))
    return reports


def differences(both, name: str, **settings: Any) -> list[float]:
    """The largest difference of two processes from one, for each phase's loss and gradient, as a
    share of the largest number."""
    results, expected = both(_gradients, name, settings), _gradients(name, settings)
    found = []
    for phase, (value, gradient) in enumerate(expected):
        mean = np.mean([own[phase][0] for own in results])
        assert np.abs(gradient).max() > 0
        found.append(abs(mean - value) / abs(value))
        for own in results:  # each of which holds the mean over both
            found.append(np.abs(own[phase][1] - gradient).max() / np.abs(gradient).max())
    return found


def test_each_case_is_of_one_kind():
    kinds = [MEAN_OF_IMAGES, set(GATHERED) - {"mskd"}, OF_THIS_PROCESS]
    assert sorted(CASES) == sorted(name for kind in kinds for name in kind)


@pytest.mark.parametrize("name", sorted({*MEAN_OF_IMAGES, *GATHERED}))
def test_the_gradient_is_that_of_one_process_with_all_images(both, name):
    assert max(differences(both, name, **GATHERED.get(name, {}))) < TOLERANCES[torch.float64][0]


@pytest.mark.parametrize("name", sorted(OF_THIS_PROCESS))
def test_the_gradient_depends_on_the_images_of_each_process(both, name):
    assert max(differences(both, name)) > 1e-3
