"""FrozenTeacherDistill: each thing in which it differs from MMRazor's SingleTeacherDistill, against
that class."""

from __future__ import annotations

import copy

import pytest
import torch
import toy
from mmengine.runner.checkpoint import load_state_dict
from mmrazor.registry import MODELS

from mskd_plugin.algorithms.records import connectors_computed_once
from mskd_plugin.errors import SettingError


def save_teacher(path, **settings):
    """Write a teacher's weights and return the teacher."""
    torch.manual_seed(7)
    teacher = MODELS.build(toy.classifier("teacher", **settings))
    torch.save({"state_dict": teacher.state_dict()}, path)
    return teacher


def with_same_weights(kind, model):
    """Build MMRazor's class with the weights of ``model``."""
    other = toy.build(kind=kind)
    other.architecture.load_state_dict(model.architecture.state_dict())
    other.teacher.load_state_dict(model.teacher.state_dict())
    other.distiller.load_state_dict(model.distiller.state_dict())
    return other


def test_losses_and_gradients_equal_mmrazors_where_no_mend_applies():
    model = toy.build()
    original = with_same_weights("SingleTeacherDistill", model)
    ours, theirs = (m.train() or m for m in (model, original))
    losses, expected = ours(**toy.batch(), mode="loss"), theirs(**toy.batch(), mode="loss")
    assert set(expected) <= set(losses)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    ours.parse_losses(losses)[0].backward()
    theirs.parse_losses(expected)[0].backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_whole_teacher_is_in_eval_mode():
    model = toy.build()
    assert not any(m.training for m in model.teacher.modules())  # as built, before any train()
    model.teacher.add_module("dropout", torch.nn.Dropout())
    assert model.train() is model
    assert model.student.training
    assert not any(m.training for m in model.teacher.modules())
    model.eval().train(True)
    assert not model.teacher.dropout.training

    trainable = toy.build(teacher_trainable=True, teacher_norm_eval=False)
    assert trainable.train().teacher.training


def test_teachers_statistics_and_weights_do_not_move():
    model = toy.build()
    before = copy.deepcopy(model.teacher.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for seed in range(2):
        loss, _ = model.parse_losses(model(**toy.batch(seed=seed), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode, calls", [("tensor", 0), ("loss", 1)])
def test_teachers_loss_is_computed_on_demand_only(mode, calls):
    model = toy.build(teacher_mode=mode)
    seen = []
    model.teacher.head.loss_module.register_forward_hook(lambda *_: seen.append(1))
    model(**toy.batch(), mode="loss")
    assert len(seen) == calls


def test_unknown_teacher_mode():
    with pytest.raises(SettingError, match="teacher_mode.*'predict'"):
        toy.build(teacher_mode="predict")


def test_keeping_the_teacher_is_yes_or_no():
    with pytest.raises(SettingError, match="`save_teacher` to be True or False, but got 'no'"):
        toy.build(save_teacher="no")


def test_teachers_weights_are_loaded_and_survive_initialisation(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pth")
    model = toy.build(teacher_ckpt=str(tmp_path / "teacher.pth"))
    assert model.teacher_source == str(tmp_path / "teacher.pth")
    for name, value in teacher.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], value), name
    assert toy.build().teacher_source is None


def test_wrong_teacher_is_refused_with_its_keys(tmp_path):
    save_teacher(tmp_path / "other.pth", num_classes=7)
    with pytest.raises(SettingError, match=r"teacher_ckpt.*head\.fc\.weight"):
        toy.build(teacher_ckpt=str(tmp_path / "other.pth"))


def test_a_teacher_with_other_classes_is_refused_when_built():
    with pytest.raises(
        SettingError, match=r"teacher\.head\.num_classes` to be 10, as the student's .* but got 7"
    ):
        toy.build(teacher=toy.classifier("teacher", num_classes=7))


def test_checkpoints_leave_the_teacher_out_unless_asked():
    model, keeping = toy.build(), toy.build(save_teacher=True)
    assert not [key for key in model.state_dict() if key.startswith("teacher.")]
    teacher_keys = {f"teacher.{key}" for key in model.teacher.state_dict()}
    assert set(keeping.state_dict()) - set(model.state_dict()) == teacher_keys
    assert {k for k in toy.build(teacher_trainable=True).state_dict() if "teacher." in k}


@pytest.mark.parametrize("load", [torch.nn.Module.load_state_dict, load_state_dict])
def test_loading_keeps_the_teacher_in_place_and_is_strict(load):
    source, target = toy.build(seed=0), toy.build(seed=1)
    teacher = copy.deepcopy(target.teacher.state_dict())
    load(target, source.state_dict(), strict=True)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    for name, value in teacher.items():
        assert torch.equal(target.teacher.state_dict()[name], value), name

    broken = source.state_dict()
    del broken["architecture.head.fc.bias"]
    with pytest.raises(RuntimeError, match=r"architecture\.head\.fc\.bias"):
        load(target, broken, strict=True)


def test_a_saved_teacher_is_loaded_too():
    source, target = toy.build(seed=0, save_teacher=True), toy.build(seed=1)
    target.load_state_dict(source.state_dict())
    for name, value in source.teacher.state_dict().items():
        assert torch.equal(target.teacher.state_dict()[name], value), name


def two_losses():
    """Return a distiller with two losses behind the same connectors."""
    cfg = toy.distiller()
    for part in ("distill_losses", "loss_forward_mappings"):
        cfg[part]["loss_again"] = copy.deepcopy(cfg[part]["loss_mskd_stage3"])
    return cfg


@pytest.mark.parametrize("kind, calls", [("FrozenTeacherDistill", 1), ("SingleTeacherDistill", 2)])
def test_shared_connector_is_computed_once(kind, calls):
    model = toy.build(kind=kind, distiller=two_losses())
    seen = []
    model.distiller.connectors["stage3_student"].register_forward_hook(lambda *_: seen.append(1))
    losses = model(**toy.batch(), mode="loss")
    assert len(seen) == calls
    torch.testing.assert_close(losses["distill.loss_again"], losses["distill.loss_mskd_stage3"])
    first = losses["distill.loss_again"]
    changed = model(**toy.batch(seed=1), mode="loss")["distill.loss_again"]
    assert not torch.equal(first, changed)  # nothing is kept from step to step


class Records:
    """Gives what it is asked for, and counts."""

    def __init__(self):
        self.asked = []

    def get_record(
        self,
        recorder,
        from_student,
        record_idx=0,
        data_idx=None,
        connector=None,
        connector_idx=None,
    ):
        asked = (recorder, from_student, record_idx, data_idx, connector)
        self.asked.append(asked)
        outputs = [(*asked, index) for index in range(2)]
        return outputs if connector_idx is None else outputs[connector_idx]


def test_only_what_is_the_same_is_computed_once():
    settings = [
        dict(recorder=recorder, from_student=side, record_idx=k, data_idx=j, connector=connector)
        for recorder in ("a", "b")
        for side in (True, False)
        for k in (0, 1)
        for j in (None, 0)
        for connector in (None, "c")
    ]
    records, plain = Records(), Records()
    with connectors_computed_once(records):
        for _ in range(2):
            for cfg in settings:
                for index in (None, 0, 1):
                    found = records.get_record(**cfg, connector_idx=index)
                    assert found == plain.get_record(**cfg, connector_idx=index)
    assert len(records.asked) == len(settings) == len(set(records.asked))
    assert "get_record" not in vars(records)


def test_records_are_released_after_the_step_even_if_it_fails():
    model = toy.build()
    recorder = model.distiller.student_recorders.get_recorder("stage3")
    of_teacher = model.distiller.teacher_recorders.get_recorder("stage3")
    model(**toy.batch(), mode="loss")
    assert recorder.data_buffer == [] == of_teacher.data_buffer
    original = toy.build(kind="SingleTeacherDistill")
    original(**toy.batch(), mode="loss")
    assert len(original.distiller.student_recorders.get_recorder("stage3").data_buffer) == 1

    model.distiller.distill_losses["loss_mskd_stage3"].forward = None
    with pytest.raises(TypeError):
        model(**toy.batch(), mode="loss")
    assert recorder.data_buffer == [] == of_teacher.data_buffer


@pytest.mark.parametrize("name", ["loss_mskd_stage3", "mskd_stage3_loss"])
def test_terms_are_logged_and_not_summed(name):
    distiller = toy.distiller(loss_weight=2.0, feature_weight=0.5)
    for part in ("distill_losses", "loss_forward_mappings"):
        distiller[part] = {name: distiller[part]["loss_mskd_stage3"]}
    model = toy.build(distiller=distiller)
    one = {"own_loss": torch.ones(())}
    model.distiller.distill_losses[name].register_forward_hook(lambda m, *_: m.terms.update(one))
    loss, logged = model.parse_losses(model(**toy.batch(), mode="loss"))
    torch.testing.assert_close(
        loss.detach(), logged["student.loss"].detach() + logged[f"distill.{name}"].detach()
    )
    assert logged["distill.mskd_stage3.own"] == 1
    torch.testing.assert_close(
        logged[f"distill.{name}"].detach(),
        2.0
        * (
            logged["distill.mskd_stage3.sample_wise"]
            + 0.5 * logged["distill.mskd_stage3.feature_wise"]
        ),
    )


def test_stopped_distillation_does_not_run_the_teacher():
    model = toy.build()
    model(**toy.batch(), mode="loss")  # whose terms are not logged again
    model.distillation_stopped = True
    seen = []
    model.teacher.register_forward_hook(lambda *_: seen.append(1))
    assert set(model(**toy.batch(), mode="loss")) == {"student.loss"}
    assert not seen


def noise():
    """What a delivery takes from the teacher's forward to the student's."""
    return torch.rand(1)


def with_delivery(kind="FrozenTeacherDistill", **settings):
    """Build a distillation whose backbones multiply their map by noise, which they share."""
    delivery = dict(type="FunctionOutputs", func_path=f"{__name__}.noise", max_keep_data=1)
    distiller = dict(toy.distiller(), distill_deliveries=dict(noise=delivery))
    model, drawn = toy.build(kind=kind, distiller=distiller, **settings), {}
    for name in ("teacher", "architecture"):

        def multiply(module, inputs, maps, name=name):
            drawn[name] = noise()
            return tuple(drawn[name] * value for value in maps)

        getattr(model, name).backbone.register_forward_hook(multiply)
    return model, drawn


@pytest.mark.parametrize("stopped", [False, True])
def test_deliveries_reach_the_student_as_with_mmrazor(stopped):
    model, drawn = with_delivery()
    original, drawn_there = with_delivery("SingleTeacherDistill")
    seen = []
    for algorithm, noises in ((model, drawn), (original, drawn_there)):
        algorithm.load_state_dict(toy.build(seed=1, save_teacher=True).state_dict())
        algorithm.train()
        algorithm.distillation_stopped = stopped  # what the student is given has to be made still
        torch.manual_seed(3)
        losses = [algorithm(**toy.batch(seed=seed), mode="loss") for seed in (0, 1)]
        assert noises["teacher"] == noises["architecture"]
        seen.append((noises["teacher"], losses))
    assert seen[0][0] == seen[1][0]
    for ours, theirs in zip(seen[0][1], seen[1][1]):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
    # Nothing is kept for the next step, be it that the student did not come to take it.
    queue = model.distiller.deliveries.deliveries["noise"].data_queue
    assert len(queue) == 0
    model.architecture.backbone.forward = None
    with pytest.raises(TypeError):
        model(**toy.batch(), mode="loss")
    assert len(queue) == 0


def test_without_gradients_the_student_keeps_no_graph():
    with torch.no_grad():
        losses = toy.build()(**toy.batch(), mode="loss")
    assert not any(value.requires_grad for value in losses.values())
    # MMRazor's setting takes the graph away only where the student's loss is not computed.
    losses = toy.build(student_trainable=False)(**toy.batch(), mode="loss")
    assert losses["student.loss"].requires_grad


def test_a_pretrained_teachers_weights_have_a_source():
    given = MODELS.build(toy.classifier("teacher"))
    assert toy.build(teacher=given).teacher_source == "the model given"
    for init_cfg, source in (
        (dict(type="Pretrained", checkpoint="teacher.pth"), "teacher.pth"),
        ([dict(type="Kaiming", layer="Conv2d")], None),
    ):
        teacher = toy.classifier("teacher", init_cfg=init_cfg)
        assert MODELS.build(toy.algorithm(teacher=teacher)).teacher_source == source


def test_student_loss_can_be_left_out():
    losses = toy.build(calculate_student_loss=False)(**toy.batch(), mode="loss")
    assert "student.loss" not in losses
    assert losses["distill.loss_mskd_stage3"].requires_grad
    frozen = toy.build(calculate_student_loss=False, student_trainable=False)
    frozen.distiller.connectors.requires_grad_(False)
    assert not frozen(**toy.batch(), mode="loss")["distill.loss_mskd_stage3"].requires_grad


def test_trainable_teacher_is_mmrazors():
    model = toy.build(teacher_trainable=True)
    losses = model(**toy.batch(), mode="loss")
    assert {"teacher.loss", "student.loss"} <= set(losses)
    model.parse_losses(losses)[0].backward()
    assert model.teacher.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "side, recorder, source, near",
    [
        ("student", "stage3", "backbone.layer4", "backbone.layer3"),
        ("teacher", "stage3", "layer3", "backbone.layer3"),
        ("teacher", "classifier_weight", "head.fc.weights", "head.fc.weight"),
        ("teacher", "classifier_weight", "head.fc", "head.fc.weight"),
        ("student", "labels", "head.loss_modul", "head.loss_module"),
    ],
)
def test_unknown_source_names_the_nearest(side, recorder, source, near):
    cfg = toy.distiller()
    cfg[f"{side}_recorders"][recorder]["source"] = source
    with pytest.raises(SettingError, match=rf"{side}_recorders\.{recorder}.*{near}"):
        toy.build(distiller=cfg)


@pytest.mark.parametrize(
    "key, value, told",
    [
        (
            "connectors.stage3_teacher",
            dict(type="MultiScaleDecouplingConnector", scales=(1, 2, 9)),
            r"distiller\.connectors\.stage3_teacher\.scales` .* scale 9 for a side of 8",
        ),
        (
            "connectors.stage3_teacher",
            [
                dict(type="FullPrecisionConnector"),
                dict(type="MultiScaleDecouplingConnector", scales=(1, 2, 9)),
            ],
            r"distiller\.connectors\.stage3_teacher\.1\.scales` .* scale 9 for a side of 8",
        ),
        (
            "distill_losses.loss_mskd_stage3",
            dict(type="MultiScaleContrastiveLoss", scale_weights=(1, 2)),
            r"distiller\.distill_losses\.loss_mskd_stage3\.scale_weights` .* got \[1, 2\]",
        ),
        (  # no setting of the loss itself
            "distill_losses.loss_mskd_stage3",
            dict(type="MultiScaleContrastiveLoss", exclude_same_class=True),
            r"labels` to be mapped in `loss_forward_mappings`",
        ),
    ],
    ids=["connector", "list", "loss", "mapping"],
)
def test_what_a_step_refuses_is_told_with_its_place(key, value, told):
    distiller = toy.distiller()
    part, name = key.split(".")
    distiller[part][name] = value
    model = toy.build(distiller=distiller)
    with pytest.raises(SettingError, match=rf"^Expected `{told}"):
        model(**toy.batch(), mode="loss")
