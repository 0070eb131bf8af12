"""Networks of timm by name, with a stand-in for timm: what is asked of it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from map_oracles import fsp as fsp_loops
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import TIMMBackbone
from mmpretrain.structures import DataSample
from mskd_by_hand import assert_loss_is_that_of_the_loops
from torch import nn

from mskd_plugin.checkpoints.weights import load_weights
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier, network
from mskd_plugin.networks.timm import timm_network
from mskd_plugin.recipes import distill, fsp, mskd

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "heterogeneous").glob("*timm-*.py"))
WIDTHS = (4, 6, 8, 12, 16)


class Net(nn.Module):
    """As timm's networks are used: stages that ``feature_info`` lists, and a classifier of the
    average."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.pools = WIDTHS[-1], True
        for index, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS)):
            self.add_module(f"layer{index}", nn.Conv2d(before, after, 3, stride=2, padding=1))
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"layer{i}"}
            for i, width in enumerate(WIDTHS)
        ]
        self.fc: nn.Module = nn.Linear(WIDTHS[-1], 1000)
        nn.init.zeros_(self.fc.weight)  # as several of timm's start

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str) -> None:
        assert (num_classes, global_pool) == (0, "")
        self.fc, self.pools = nn.Identity(), False

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(len(WIDTHS)):
            x = getattr(self, f"layer{index}")(x)
        return x

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.fc(self.pooled(x)) if self.pools else x


class NormedNet(Net):
    """Normalises the average, as ConvNeXt does."""

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x.mean((2, 3)), (WIDTHS[-1],))


class StemlessNet(Net):
    """Lists its stages alone."""

    def __init__(self) -> None:
        super().__init__()
        del self.feature_info[0]


class TwoHeadedNet(Net):
    """Has two classifiers."""

    def get_classifier(self) -> nn.Module:
        return (self.fc, self.fc)


class TokenNet(Net):
    """Tokens of 12 blocks, with or without class tokens in front, and a classifier called head."""

    width = 6

    def __init__(self, class_tokens: int = 0, average: bool = True) -> None:
        super().__init__()
        for index in range(len(WIDTHS)):
            delattr(self, f"layer{index}")
        del self.fc
        self.num_prefix_tokens, self.average = class_tokens, average
        self.stem = nn.Conv2d(3, self.width, 16, stride=16)
        self.cls_token = nn.Parameter(torch.randn(1, class_tokens, self.width))
        self.blocks = nn.Sequential(*[nn.Linear(self.width, self.width) for _ in range(12)])
        self.feature_info = [{"num_chs": self.width, "module": f"blocks.{i}"} for i in range(12)]
        self.head: nn.Module = nn.Linear(self.width, 1000)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str) -> None:
        self.head, self.pools = nn.Identity(), False

    def features(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 224, "Input height doesn't match model"
        patches = self.stem(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        return self.blocks(tokens)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.num_prefix_tokens :].mean(1) if self.average else x[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.head(self.pooled(x)) if self.pools else x


class MixedNet(TokenNet):
    """Lists a map, a module that it has not, and no module, too."""

    def __init__(self) -> None:
        super().__init__()
        others = [{"module": "stem"}, {"module": "gone"}, {}]
        self.feature_info = [*others, *self.feature_info]


class ShortNet(TokenNet):
    """Lists three of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = self.feature_info[3::4]


class DroppingNet(Net):
    """Drops half of its numbers in training."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().features(x), 0.5, self.training)


class GridNet(Net):
    """Gives its maps as (N, H, W, C), as timm's Swin transformers do."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x).permute(0, 2, 3, 1)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2))


class VectorNet(Net):
    """Gives no maps."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x).mean((2, 3))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x


class SilentNet(Net):
    """Lists nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = []


NETS = {
    "resnet50d": Net,
    "mlp": TokenNet,
    "resmlp_12_224": TokenNet,
    "vit": lambda: TokenNet(1, average=False),
    "registers": lambda: TokenNet(3, average=False),
    "vit_gap": lambda: TokenNet(1, average=True),
    "stemless": StemlessNet,
    "normed": NormedNet,
    "mixed": MixedNet,
    "short": ShortNet,
    "dropping": DroppingNet,
    "two_heads": TwoHeadedNet,
    "grid": GridNet,
    "vector": VectorNet,
    "silent": SilentNet,
}


@pytest.fixture
def timm(monkeypatch):
    module = ModuleType("timm")

    def create_model(model_name, pretrained=False, **settings):
        assert not pretrained
        if model_name not in NETS:
            raise RuntimeError(f"Unknown model ({model_name})")
        return NETS[model_name]()

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    # Where timm is not installed, mmpretrain puts a refusal in front of the wrapper.
    plain = getattr(TIMMBackbone.__init__, "__wrapped__", TIMMBackbone.__init__)
    monkeypatch.setattr(TIMMBackbone, "__init__", plain)
    timm_network.cache_clear()
    yield module
    timm_network.cache_clear()


def test_the_stages_are_what_timm_lists(timm):
    net = network("timm:resnet50d")
    assert net.stages == tuple((f"backbone.timm_model.layer{i}", WIDTHS[i]) for i in range(1, 5))
    assert net.stem == ("backbone.timm_model.layer0", 4)
    assert net.final == ("backbone.timm_model", 16) and net.width == 16
    init_default_scope("mmpretrain")
    model = MODELS.build(classifier("timm:resnet50d", 10)).eval()
    nn.init.normal_(model.head.fc.weight)
    images = torch.randn(2, 3, 64, 64)
    features = model.backbone.timm_model(images)
    torch.testing.assert_close(model(images), model.head.fc(features.mean((2, 3))))


@pytest.mark.parametrize(
    "name, class_tokens, average",
    [("mlp", 0, True), ("vit", 1, False), ("registers", 3, False), ("vit_gap", 1, True)],
)
def test_token_networks_and_what_they_classify(timm, name, class_tokens, average):
    net = network(f"timm:{name}")
    quarters = [f"backbone.timm_model.blocks.{block}" for block in (2, 5, 8, 11)]
    assert net.stages == tuple((quarter, 6) for quarter in quarters)
    assert net.tokens and net.class_tokens == class_tokens
    assert net.final == ("backbone.timm_model", 6) and net.width == 6
    assert net.final_is_pooled == average
    assert net.neck == dict(type="TokenPooling", class_tokens=class_tokens, average=average)


@pytest.mark.parametrize("name, alike", [("mixed", "mlp"), ("dropping", "resnet50d")])
def test_what_else_a_network_lists_or_does_in_training(timm, name, alike):
    net, other = network(f"timm:{name}"), network(f"timm:{alike}")
    assert (net.stages, net.stem, net.neck) == (other.stages, other.stem, other.neck)


def test_all_of_the_few_token_stages_that_a_network_lists(timm):
    net = network("timm:short")
    assert net.stages == tuple((f"backbone.timm_model.blocks.{i}", 6) for i in (3, 7, 11))
    assert net.stem is None


def pair_of(teacher, student):
    return {
        "pair": {"teacher": teacher, "student": student, "num_classes": 10},
        "data_preprocessor": {"type": "ClsDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3},
    }


def test_fsp_begins_at_the_map_before_the_stages(timm):
    init_default_scope("mmpretrain")
    base = pair_of("timm:resnet50d", "timm:resnet50d")
    model = MODELS.build({**distill(base, fsp(base)), "_scope_": "mmrazor"}).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    samples = [DataSample().set_gt_label(label) for label in (3, 5)]
    losses = model(images, samples, mode="loss")
    nets = [network_.backbone.timm_model for network_ in (model.student, model.teacher)]
    bottoms = [net.layer0(images) for net in nets]
    tops = [net.layer1(bottom) for net, bottom in zip(nets, bottoms)]
    maps = (bottoms[0], tops[0], bottoms[1], tops[1])
    expected = fsp_loops(*(feature.tolist() for feature in maps))
    assert losses["distill.loss_fsp_stage1"].item() == pytest.approx(expected, rel=1e-9)
    base = pair_of("timm:resnet50d", "timm:stemless")
    with pytest.raises(SettingError, match=r"pair.student.*before the first.*'timm:stemless' in"):
        fsp(base)


def test_describing_a_network_draws_no_random_numbers(timm):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    network("timm:vit")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["resnet50d", "mlp", "vit", "registers", "vit_gap"])
def test_timms_own_weights_fit_and_give_its_own_logits(timm, name, tmp_path):
    init_default_scope("mmpretrain")
    own = NETS[name]().eval()
    nn.init.normal_(own.get_classifier().weight)
    torch.save(own.state_dict(), tmp_path / "timm.pth")
    model = MODELS.build(classifier(f"timm:{name}", 1000))
    assert load_weights(model, tmp_path / "timm.pth") == "timm"
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(model.double().eval()(images), own.double()(images))


@pytest.mark.parametrize("classifier_name", ["head.fc.", "last_linear.", "classif."])
def test_a_classifier_of_another_name(timm, tmp_path, classifier_name):
    init_default_scope("mmpretrain")
    weights = {
        key.replace("fc.", classifier_name): value.clone()
        for key, value in Net().state_dict().items()
    }
    model = MODELS.build(classifier("timm:resnet50d", 1000))
    for extra, refused in (({}, False), ({"head.norm.weight": torch.ones(16)}, True)):
        torch.save(weights | extra, tmp_path / "timm.pth")
        if refused:
            with pytest.raises(SettingError, match="unexpected keys: .*head.norm.weight"):
                load_weights(model, tmp_path / "timm.pth")
        else:
            assert load_weights(model, tmp_path / "timm.pth") == "timm"


def two_images():
    torch.manual_seed(1)
    samples = [DataSample().set_gt_label(label) for label in (3, 5)]
    return dict(inputs=torch.randn(2, 3, 224, 224), data_samples=samples)


def assert_the_student_learns(model, loss):
    loss.backward()
    grads = [p.grad for p in model.student.backbone.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize(
    "teacher, student, tokens",
    [("timm:vit", "resnet18", dict(teacher_tokens=1)), ("resnet18", "timm:mlp", {})],
)
def test_mskd_on_token_networks_of_timm(timm, teacher, student, tokens):
    base = pair_of(teacher, student)
    init_default_scope("mmpretrain")
    cfg = {**distill(base, mskd(base)), "_scope_": "mmrazor"}
    assert_the_student_learns(*assert_loss_is_that_of_the_loops(cfg, two_images(), **tokens))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_pair_takes_a_step(timm, file):
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    cfg.model.teacher_ckpt = None  # tests download nothing
    if "kd" not in file.stem.split("_"):
        tokens = dict(student_tokens=1) if "deit" in file.stem else {}
        model, loss = assert_loss_is_that_of_the_loops(cfg.model, two_images(), **tokens)
    else:
        torch.manual_seed(0)
        model, logits = MODELS.build(cfg.model), []
        for network_ in (model.student, model.teacher):
            network_.head.fc.register_forward_hook(lambda *io: logits.append(io[-1].detach()))
        loss = model(**two_images(), mode="loss")["distill.loss_kd"]
        settings = cfg.model.distiller.distill_losses.loss_kd
        tau = settings.tau
        teacher, student = (values.double().div(tau).softmax(1) for values in logits)
        expected = (teacher * (teacher.log() - student.log())).sum(1).mean() * tau**2
        torch.testing.assert_close(
            loss.item(), settings.loss_weight * expected.item(), rtol=1e-4, atol=1e-6
        )
    assert_the_student_learns(model, loss)


def test_refusals(timm, monkeypatch):
    with pytest.raises(SettingError, match=r"network of timm's, but got 'timm:nothing'.*Unknown"):
        network("timm:nothing")
    refusals = {
        "normed": r"average of its last maps.*'timm:normed', .*\(1, 16, 7, 7\) otherwise",
        "grid": r"average of its last maps.*'timm:grid', .*\(1, 7, 7, 16\) otherwise",
        "two_heads": r"one linear classifier.*'timm:two_heads' with a tuple",
        "vector": r"gives maps .* or tokens .*'timm:vector' .*\(1, 16\)",
        "silent": r"lists its stages.*'timm:silent' with none",
    }
    for name, match in refusals.items():
        with pytest.raises(SettingError, match=match):
            network(f"timm:{name}")
    with monkeypatch.context() as patch:
        patch.setattr("mskd_plugin.networks.timm._SIDE", 192)
        with pytest.raises(SettingError, match=r"192 x 192.*'timm:mlp'.*doesn't match"):
            network("timm:mlp")
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_network.cache_clear()
    with pytest.raises(SettingError, match=r"'timm:resnet50d' without timm.*pip install timm"):
        Config.fromfile(CONFIGS[0])
