"""Training in two phases: what trains when, by which losses, and in several processes."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import pytest
import torch
import toy
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from torch import distributed

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import ab, distill, fsp, ft, kd, mskd

METHODS = {"ab": ab, "fsp": fsp, "ft": ft}
#: What begins with these names trains in phase 1, and in phase 2.
TRAINED = {
    "ab": (("architecture.backbone",), ("architecture",)),
    "fsp": (("architecture.backbone",), ("architecture",)),
    "ft": (
        ("distiller.connectors.ft_paraphraser", "distiller.distill_losses.loss_ft_paraphraser"),
        ("architecture", "distiller.connectors.ft_translator"),
    ),
}


def base(teacher="resnet14", student="resnet8"):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=toy.CLASSES),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[80.0] * 3, std=[80.0] * 3),
    )


def build(name, *others, **settings):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return ROOT_MODELS.build(distill(base(), METHODS[name](base(), **settings), *others))


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def buffers(model):
    return {name: value.detach().clone() for name, value in model.named_buffers()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def step(model, wrapper, batch=None):
    batch = batch or toy.batch()
    losses = model(**batch, mode="loss")
    total, logged = getattr(model, "module", model).parse_losses(losses)
    wrapper.update_params(total)
    return logged


def sgd(model, lr=0.01):
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4))


# --- the algorithm -----------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_each_phase_trains_its_own_and_its_loss_falls(name, phase):
    model = build(name)
    wrapper = sgd(model, lr=1e-3)
    model.train()
    model.enter_phase(phase)
    before, statistics = parameters(model), buffers(model)
    values = [step(model, wrapper)["loss"] for _ in range(6)]
    assert values[-1] < values[0]
    moved = changed(before, parameters(model))
    assert moved == {n for n in before if n.startswith(TRAINED[name][phase - 1])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    # Statistics move where parameters do; decayed weights and momentum of the others do not.
    modules = {n.rpartition(".")[0] for n in moved}
    assert {n.rpartition(".")[0] for n in changed(statistics, buffers(model))} <= modules


@pytest.mark.parametrize("name", METHODS)
def test_the_losses_of_each_phase(name):
    model = build(name, kd(base()))
    init = set(model.init_losses)
    model.train()
    model.enter_phase(1)
    assert {n for n in model(**toy.batch(), mode="loss") if "loss" in n} == {
        f"distill.{n}" for n in init
    }
    model.enter_phase(2)
    others = {"student.loss", "distill.loss_kd"} | ({"distill.loss_ft"} if name == "ft" else set())
    assert {n for n in model(**toy.batch(), mode="loss") if "loss" in n} == others


def test_phase_2_of_ab_and_fsp_is_the_student_alone():
    for name in ("ab", "fsp"):
        model = build(name)
        model.train()
        model.enter_phase(2)
        student = copy.deepcopy(model.student)
        alone = student(**toy.batch(), mode="loss")["loss"]
        torch.testing.assert_close(model(**toy.batch(), mode="loss")["student.loss"], alone)


@pytest.mark.parametrize(
    "name, beside, runs",
    [
        ("ab", None, [{"teacher", "student"}, {"student"}]),
        ("fsp", None, [{"teacher", "student"}, {"student"}]),
        ("ft", None, [{"teacher"}, {"teacher", "student"}]),
        ("ab", kd, [{"teacher", "student"}, {"teacher", "student"}]),
    ],
)
def test_a_network_that_no_loss_reads_is_not_run(name, beside, runs):
    model, ran = build(name, *([beside(base())] if beside else [])), set()
    for network in ("teacher", "student"):
        getattr(model, network).register_forward_hook(lambda *_, network=network: ran.add(network))
    model.train()
    for phase in (1, 2):
        ran.clear()
        model.enter_phase(phase)
        model(**toy.batch(), mode="loss")
        assert ran == runs[phase - 1]


def test_terms_for_the_log_end_with_their_phase():
    model = build("ft", mskd(base()))
    model.train()
    model.enter_phase(2)
    assert "distill.mskd_stage3.sample_wise" in model(**toy.batch(), mode="loss")
    model.enter_phase(1)
    assert list(model(**toy.batch(), mode="loss")) == ["distill.loss_ft_paraphraser"]


def test_modes():
    model = build("ft")
    model.enter_phase(1)
    model.train()
    assert not model.student.training and not model.teacher.training
    paraphraser = model.distiller.connectors["ft_paraphraser"]
    assert paraphraser.training and not model.distiller.connectors["ft_translator"].training
    model.eval()  # for a validation in phase 1
    assert not any(module.training for module in model.modules())
    model.train()
    model.enter_phase(2)
    assert model.student.training and model.distiller.connectors["ft_translator"].training
    assert not paraphraser.training and not model.teacher.training
    assert not model.eval().student.training


def test_what_the_user_froze_stays_frozen():
    cfg = distill(base(), ab(base()))
    init_default_scope("mmpretrain")
    student = ROOT_MODELS.build(cfg.pop("architecture"))
    student.backbone.conv1.weight.requires_grad = False
    model = ROOT_MODELS.build({**cfg, "architecture": student})
    for phase in (1, 2):
        model.enter_phase(phase)
        assert not student.backbone.conv1.weight.requires_grad
        assert student.backbone.bn1.weight.requires_grad


def test_a_module_whose_name_begins_alike_does_not_train():
    cfg = {**distill(base(), ab(base())), "init_modules": ["architecture.backbone.layer1"]}
    init_default_scope("mmpretrain")
    student = ROOT_MODELS.build(cfg.pop("architecture"))
    student.backbone.layer10 = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    model = ROOT_MODELS.build({**cfg, "architecture": student})
    model.enter_phase(1)
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("architecture.backbone.layer1.") for n in trained)
    assert student.backbone.layer1.training and not student.backbone.layer10.training


@pytest.mark.parametrize("name", METHODS)
def test_a_phase_begins_without_gradients_of_the_other(name):
    model = build(name)
    model.train()
    model.enter_phase(1)
    model.parse_losses(model(**toy.batch(), mode="loss"))[0].backward()
    assert any(p.grad is not None for p in model.parameters())
    model.enter_phase(2)
    assert all(p.grad is None for p in model.parameters())


def test_phase_2_has_the_settings_that_the_model_was_built_with():
    cfg = distill(base(), ft(base()))
    init_default_scope("mmpretrain")
    del cfg["init_epochs"]
    model = ROOT_MODELS.build({**cfg, "calculate_student_loss": False, "student_trainable": False})
    assert model.init_epochs == 30
    for phase in (1, 2):
        model.enter_phase(phase)
        assert not model.calculate_student_loss and not model.student_trainable
    # The paraphraser learns without the student, whose forward then needs no graph.
    model = build("ft")
    for phase in (1, 2):
        model.enter_phase(phase)
        assert (model.calculate_student_loss, model.student_trainable) == (phase == 2,) * 2
    both = ("architecture.backbone", "distiller.connectors.ft_paraphraser")
    of_both = ROOT_MODELS.build({**distill(base(), ft(base())), "init_modules": both})
    for model in (build("ab"), of_both):
        model.enter_phase(1)
        assert (model.calculate_student_loss, model.student_trainable) == (False, True)


def test_no_training_without_a_phase_but_checks():
    model = build("ft")
    model.train()
    with pytest.raises(SettingError, match="custom_hooks.*PhaseHook"):
        model(**toy.batch(), mode="loss")
    losses = model.eval()(**toy.batch(), mode="loss")
    assert {"student.loss", "distill.loss_ft", "distill.loss_ft_paraphraser"} <= set(losses)
    with pytest.raises(SettingError, match="`phase`.*1 or 2.*3"):
        model.enter_phase(3)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("init_losses", ["loss_at"], "`init_losses`.*loss_ft, loss_ft_paraphraser.*'loss_at'"),
        ("init_losses", [], "`init_losses`"),
        ("init_losses", "loss_ft", "`init_losses`"),
        ("init_modules", ["teacher"], "`init_modules`.*ft_paraphraser.*'teacher'"),
        ("init_modules", ["architecture.neck.fc"], "`init_modules`"),
        ("init_epochs", 0, "`init_epochs`.*whole"),
        ("init_epochs", 1.5, "`init_epochs`.*whole.*1.5"),
        ("init_epochs", True, "`init_epochs`.*whole.*True"),
    ],
)
def test_malformed_settings(setting, value, match):
    cfg = {**distill(base(), ft(base())), setting: value}
    init_default_scope("mmpretrain")
    with pytest.raises(SettingError, match=match):
        ROOT_MODELS.build(cfg)


def test_one_method_in_two_phases_at_most():
    with pytest.raises(SettingError, match="at most one.*loss_ft_paraphraser"):
        distill(base(), ft(base()), fsp(base()))


# --- several processes -------------------------------------------------------------------------


def _phases_under_ddp(name: str, rank: int, store: str) -> dict:
    """Train two steps in each phase, each process with its half of the batch."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    model = build(name)
    # Built before the phases, as the runner does it.
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=True)
    wrapper = sgd(model)
    for phase in (1, 2, 1):  # and back, though no run does
        model.enter_phase(phase)
        wrapped.train()
        for seed in range(2):
            batch = toy.batch(8, seed=seed)
            half = slice(4 * rank, 4 * rank + 4)
            step(wrapped, wrapper, {name: value[half] for name, value in batch.items()})
    distributed.destroy_process_group()
    return {name: value.tolist() for name, value in parameters(model).items()}


@pytest.fixture(scope="module")
def pool():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as executor:
        yield executor


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_the_parameters_of_each_phase_alike(pool, tmp_path, name):
    store = (tmp_path / "store").as_uri()
    futures = [pool.submit(_phases_under_ddp, name, rank, store) for rank in range(2)]
    first, second = (future.result(timeout=300) for future in futures)
    assert first == second
    untrained = {n: v.tolist() for n, v in parameters(build(name)).items()}
    moved = {n for n in untrained if untrained[n] != first[n]}
    assert moved == {n for n in untrained if n.startswith(TRAINED[name][0] + TRAINED[name][1])}
