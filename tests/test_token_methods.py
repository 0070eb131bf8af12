"""Methods that cross to networks of tokens: the recipes, losses, steps."""

from __future__ import annotations

import functools
from unittest.mock import patch

import feature_oracles
import logit_oracles
import map_oracles
import pytest
import torch
import toy
from mmengine.registry import MODELS, init_default_scope
from token_oracles import SIDE, TINY, laid_out, ofa_branch
from tolerances import assert_close

from mskd_plugin import recipes
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import NETWORKS
from mskd_plugin.recipes import distill
from mskd_plugin.recipes.taps import stage_sides

SIDES = ("student", "teacher")
F64 = torch.float64


# --- methods on pairs of tiny networks -----------------------------------------------------------

PAIRS = [
    ("tiny_swin", "tiny_cnn"),
    ("tiny_mixer", "tiny_cnn"),
    ("tiny_convnext", "tiny_vit"),
    ("tiny_cnn", "tiny_vit"),
    ("tiny_mixer", "tiny_vit"),
]
OF_TOKENS = ("at", "fitnet", "ft", "mskd", "nst", "ofa", "sp", "vid")


@pytest.fixture(autouse=True)
def tiny_networks():
    with patch.dict(NETWORKS, TINY):
        yield


def base(teacher, student, **pair):
    return {
        "pair": {
            "teacher": teacher,
            "student": student,
            "num_classes": toy.CLASSES,
            "image_side": SIDE,
            **pair,
        },
        "num_train_images": 8,
        "data_preprocessor": {"type": "ClsDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3},
    }


def build(pair, name, **settings):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    given = base(*pair)
    model = MODELS.build(distill(given, getattr(recipes, name)(given, **settings)))
    model.student.init_weights()
    return model.train()


def parameters(c, d, classes, mergings, blocks):
    """Parameters of a branch for widths c of the stage and d of the branch."""
    first = 4 * c * d + 2 * 4 * c  # linear without bias, normalisation
    later = 4 * d * d + 2 * 4 * d
    attention = 3 * d * d + (d * d + d)
    of_block = 2 * 2 * d + attention + (4 * d * d + 4 * d) + (4 * d * d + d)
    merging = first + (mergings - 1) * later if mergings else 0
    return merging + blocks * of_block + d * classes + classes


@pytest.mark.parametrize(
    "student, total",
    [
        ("deit_t", [1_501_156, 1_056_868, 612_580, 612_580]),
        ("mixer_s16", None),
        ("swin_t", None),
    ],
)
def test_the_recipe_gives_each_stage_the_published_branch(student, total):
    parts = recipes.ofa(base("resnet50", student, image_side=224, num_classes=100))
    width = NETWORKS[student].width
    grids = {"swin_t": (56, 28, 14, 7)}.get(student, (14,) * 4)
    counts = []
    for stage, (cfg, grid) in enumerate(zip(parts["connectors"].values(), grids), start=1):
        built = MODELS.build({**cfg, "type": "mmrazor.OFATokenBranch"})
        counts.append(sum(p.numel() for p in built.parameters()))
        mergings, blocks = {56: 3, 28: 2, 14: 1, 7: 0}[grid], max(4 - stage, 1)
        assert (len(built.mergings), len(built.blocks)) == (mergings, blocks)
        assert counts[-1] == parameters(cfg["in_channels"], width, 100, mergings, blocks)
        assert cfg["in_channels"] == NETWORKS[student].stages[stage - 1][1]
        assert cfg["class_tokens"] == (1 if student == "deit_t" else 0)
        assert cfg["pool"] == "average"
    assert total is None or counts == total


def losses_of(model, data):
    """The distillation losses of all phases."""
    found = {}
    for phase in (1, 2) if hasattr(model, "enter_phase") else (None,):
        if phase:
            model.enter_phase(phase)
        found |= model(**data, mode="loss")
    prefix = "distill.loss_"
    return {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}


def maps_of(model, pair, data, taps):
    """Maps of both networks by the test's own hooks, tokens laid out by the naive loops."""
    found = {}
    for side, name in zip(SIDES, reversed(pair), strict=True):
        net = TINY[name]
        for stage in taps:
            source = net.final[0] if stage == "final" else net.stages[stage][0]

            def note(module, args, output, key=(side, stage), net=net):
                feature = output if isinstance(output, torch.Tensor) else output[0]
                tokens = feature.dim() == 3
                assert tokens == net.tokens
                found[key] = laid_out(feature, net.class_tokens) if tokens else feature.tolist()

            handle = getattr(model, side).get_submodule(source).register_forward_hook(note)
            found.setdefault("handles", []).append(handle)
    torch.manual_seed(1)
    losses = losses_of(model, data)
    for handle in found.pop("handles"):
        handle.remove()
    return found, losses


def case(pair, name, taps, **settings):
    model = build(pair, name, **settings).double()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    data = toy.batch(2, side=SIDE)
    data["inputs"] = data["inputs"].double()
    return model, *maps_of(model, pair, data, taps)


def tensor(value):
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize("pair", [("swin_t", "deit_t"), ("mixer_b16", "convnext_t")])
def test_sizes_of_the_stages_are_those_of_their_grids(pair):
    student, teacher = stage_sides(base(*pair, image_side=224))
    whole, falling = [(14, 14)] * 4, [(side, side) for side in (56, 28, 14, 7)]
    assert (student, teacher) == ((whole, falling) if "swin" in pair[0] else (falling, whole))


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
@pytest.mark.parametrize("name", ["at", "nst", "sp"])
def test_losses_of_maps_equal_the_naive_loops_on_tokens(name, pair):
    term = {
        "at": feature_oracles.attention_transfer,
        "nst": feature_oracles.neuron_selectivity,
        "sp": feature_oracles.similarity_preserving,
    }[name]
    _, maps, losses = case(pair, name, (-1, -2), stages=(-1, -2), loss_weight=1.0)
    stages = len(TINY[pair[1]].stages)
    assert set(losses) == {f"{name}_stage{stages}", f"{name}_stage{stages - 1}"}
    for stage in (-1, -2):
        value = losses[f"{name}_stage{stages + stage + 1}"]
        assert_close(value, term(maps["student", stage], maps["teacher", stage]))


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_fitnets_and_vid_regress_the_map_of_the_tokens(pair):
    stages = len(TINY[pair[1]].stages)
    name = f"stage{stages}"
    for method in ("fitnet", "vid"):
        chosen = {"stage": -1} if method == "fitnet" else {"stages": (-1,)}
        model, maps, losses = case(pair, method, (-1,), **chosen, loss_weight=1.0)
        connector = model.distiller.connectors[f"{method}_{name}_student"]
        regressor = connector[1] if TINY[pair[1]].tokens else connector
        student = regressor(tensor(maps["student", -1])).tolist()
        teacher, value = maps["teacher", -1], losses[f"{method}_{name}"]
        if method == "fitnet":
            assert_close(value, map_oracles.mean_squared(student, teacher))
        else:
            scale = model.distiller.distill_losses[f"loss_vid_{name}"].log_scale.tolist()
            expected = feature_oracles.variational_information(student, teacher, scale)
            assert_close(value, expected)


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_factors_are_those_of_the_map_of_the_tokens(pair):
    model, maps, losses = case(pair, "ft", (-1,), loss_weight=1.0)
    connectors = model.distiller.connectors
    factors = {}
    for side, name in zip(SIDES, reversed(pair), strict=True):
        encoder = connectors["ft_translator" if side == "student" else "ft_paraphraser"]
        encoder = encoder[1] if TINY[name].tokens else encoder
        factors[side] = encoder(tensor(maps[side, -1])).tolist()
    decoder = model.distiller.distill_losses["loss_ft_paraphraser"].decoder
    rebuilt = decoder(tensor(factors["teacher"])).tolist()
    expected = map_oracles.mean_squared(rebuilt, maps["teacher", -1])
    assert_close(losses["ft_paraphraser"], expected)
    assert_close(losses["ft"], map_oracles.factor_transfer(factors["student"], factors["teacher"]))


@pytest.mark.parametrize("teacher", ["tiny_swin", "tiny_mixer"])
@pytest.mark.parametrize("term", ["kd", "dkd", "nkd"])
def test_regions_of_tokens_are_classified(term, teacher):
    pair = (teacher, "tiny_cnn")
    model, maps, losses = case(pair, f"sdd_{term}", ("final",), loss_weight=1.0)
    loss = model.distiller.distill_losses[f"loss_sdd_{term}"]
    assert loss.scales == (1, 2, 4)
    sides = [
        (maps[side, "final"], *(p.tolist() for p in getattr(model, side).head.fc.parameters()))
        for side in SIDES
    ]
    of_sample = getattr(logit_oracles, f"{term}_of_sample")
    labels = [sample.gt_label.item() for sample in toy.batch(2)["data_samples"]]
    expected = logit_oracles.sdd(of_sample, *sides, labels, loss.scales, **loss.settings)
    assert_close(losses[f"sdd_{term}"], expected)


@pytest.mark.parametrize("token_pool", ["average", "class_token"])
def test_ofa_of_a_token_student_from_tokens_to_loss(token_pool):
    pair = ("tiny_cnn", "tiny_vit")
    seen, logits = {}, {}
    model = build(pair, "ofa", token_pool=token_pool, exponent=1.3).double()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    for k, (source, _) in enumerate(TINY["tiny_vit"].stages, start=1):
        model.student.get_submodule(source).register_forward_hook(
            lambda m, a, out, k=k: seen.__setitem__(k, out.detach())
        )
    for side in SIDES:
        getattr(model, side).head.fc.register_forward_hook(
            lambda m, a, out, side=side: logits.__setitem__(side, out.tolist())
        )
    data = toy.batch(2, side=SIDE)
    data["inputs"] = data["inputs"].double()
    losses = losses_of(model, data)
    labels = [sample.gt_label.item() for sample in data["data_samples"]]
    for k in range(5):
        branch_logits = logits["student"]
        if k:
            state = model.distiller.connectors[f"ofa_stage{k}_student"].state_dict()
            branch_logits = ofa_branch(state, seen[k], (14, 14), 1, token_pool).tolist()
        expected = logit_oracles.mean(
            [
                logit_oracles.ofa_of_sample(s, t, label, 1.0, 1.3)
                for s, t, label in zip(branch_logits, logits["teacher"], labels, strict=True)
            ]
        )
        assert_close(losses[f"ofa_stage{k}" if k else "ofa"], expected)


def test_of_mixed_images_ofa_takes_the_class_of_the_larger_share():
    pair = ("tiny_cnn", "tiny_vit")
    model = build(pair, "ofa", exponent=1.3)
    data = toy.batch(2, side=SIDE)
    plain = losses_of(model, data)
    for sample in data["data_samples"]:
        score = torch.zeros(toy.CLASSES)
        label = sample.gt_label.item()
        score[label], score[(label + 3) % toy.CLASSES] = 0.6, 0.4
        sample.set_gt_score(score)
    mixed = losses_of(model, data)
    assert set(mixed) == set(plain)
    for name, value in plain.items():
        assert_close(mixed[name], value, torch.float32)
    score = torch.zeros(toy.CLASSES)
    score[5] = 1
    data["data_samples"][0].set_gt_score(score)
    assert abs(losses_of(model, data)["ofa"] - plain["ofa"]) > 1e-3


@functools.cache
def trained(name, pair):
    """Two phases' or one's values of the method's losses over a few steps on one batch."""
    settings = {"stage": -1} if name == "fitnet" else {}
    model, data = build(pair, name, **settings), toy.batch(4, side=SIDE)
    for index, sample in enumerate(data["data_samples"]):
        sample.set_metainfo(dict(sample_idx=index))
    values = []
    for phase in (1, 2) if hasattr(model, "enter_phase") else (None,):
        if phase:
            model.enter_phase(phase)
        model.train()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(parameters.values(), lr=3e-3)
        values.append([])
        for _ in range(5):
            torch.manual_seed(1)  # the same dropped paths in each step
            losses = model(**data, mode="loss")
            total, logged = model.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            # Else data-parallel training stops: every parameter takes part in every step.
            assert not [n for n, p in parameters.items() if p.grad is None]
            optimizer.step()
            mine = [v for key, v in logged.items() if key.startswith("distill.loss_")]
            values[-1].append(sum(mine).item())
    return values


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_steps_lower_the_loss(name, pair):
    for values in trained(name, pair):
        assert values[-1] < values[0]


# --- what cannot work ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ab", "fsp", "ofd", "reviewkd"])
@pytest.mark.parametrize("pair", [("swin_t", "resnet18"), ("resnet50", "deit_t")], ids="->".join)
def test_methods_of_values_before_a_relu_or_of_equal_channels_are_refused(name, pair):
    with pytest.raises(SettingError, match=f"{pair[0]}.*{pair[1]}|{pair[1]}.*{pair[0]}"):
        getattr(recipes, name)(base(*pair, image_side=224))


@pytest.mark.parametrize("pair", [("convnext_t", "resnet18"), ("swin_t", "deit_t")], ids="->".join)
def test_regions_that_no_classifier_reads_are_refused(pair):
    with pytest.raises(SettingError, match=f"average of their last.*{pair[0]} and {pair[1]}"):
        recipes.sdd_kd(base(*pair, image_side=224))


def test_sizes_that_no_regressor_brings_together_are_refused():
    match = "stage.*14 x 14 positions of deit_t and 56 x 56 positions of convnext_t"
    with pytest.raises(SettingError, match=match):
        recipes.fitnet(base("convnext_t", "deit_t", image_side=224), stage=-4)


def test_ofa_refuses_what_its_branches_cannot_read():
    small = base("tiny_cnn", "tiny_swin")
    assert len(recipes.ofa(small)["connectors"]) == 4
    small["pair"]["image_side"] = 28  # grids of 28, 14, 7 and 4
    match = r"stages.*64 channels, or.*-2 of tiny_swin, the student of tiny_cnn, with 32.*7 x 7"
    with pytest.raises(SettingError, match=match):
        recipes.ofa(small)
    assert len(recipes.ofa(small, stages=(-4, -3))["connectors"]) == 2
    for student, pool in (("tiny_swin", "class_token"), ("tiny_cnn", "class_token"),
                          ("tiny_vit", "max")):  # fmt: skip
        with pytest.raises(SettingError, match=f"token_pool.*'{pool}' for {student}.*tiny_mixer"):
            recipes.ofa(base("tiny_mixer", student), token_pool=pool)


def test_methods_join_over_one_layout():
    given = base("tiny_mixer", "tiny_vit")
    model = distill(given, *(getattr(recipes, name)(given) for name in ("at", "nst", "sp", "ft")))
    connectors = model["distiller"]["connectors"]
    layouts = [name for name in connectors if name.endswith("_map")]
    assert len(layouts) == 8
    assert connectors["stage4_student_map"]["class_tokens"] == 1
    assert connectors["stage4_teacher_map"]["class_tokens"] == 0
