"""CRD's loss and memories: against naive loops, MMRazor's, copies, and two processes."""

from __future__ import annotations

import copy

import pytest
import test_distributed
import torch
import torch.distributed as dist
from feature_oracles import CRD
from mmpretrain.structures import DataSample
from mmrazor.registry import MODELS
from test_distributed import own_rows, random
from tolerances import assert_close

import mskd_plugin  # noqa: F401  (registers the loss, in the spawned processes too)
from mskd_plugin.errors import SettingError

both = test_distributed.both
IMAGES, WIDTH, SIZE, NEGATIVES = 12, 5, 4, 6
CLASS_OF = torch.arange(IMAGES) % 3


def build(seed=0, **settings):
    torch.manual_seed(seed)
    cfg = {
        "type": "MemoryCRDLoss",
        "num_images": IMAGES,
        "embedding_channels": WIDTH,
        "num_negatives": NEGATIVES,
        **settings,
    }
    return MODELS.build(cfg).double()


def batch(step, size=SIZE, width=WIDTH):
    """Embeddings, labels, indices, and negatives that depend on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    index = torch.randperm(IMAGES, generator=generator)[:size]
    negatives = [
        (CLASS_OF != CLASS_OF[i]).nonzero()[:, 0][
            torch.randperm(8, generator=generator)[:NEGATIVES]
        ]
        for i in index
    ]
    return {
        "student_embedding": random(size, width, seed=step),
        "teacher_embedding": 0.3 + random(size, width, seed=50 + step),
        "labels": CLASS_OF[index],
        "sample_idx": index,
        "negatives": torch.stack(negatives),
    }


def oracle(loss):
    memories = (loss.student_memory.tolist(), loss.teacher_memory.tolist())
    return CRD(*memories, loss.temperature, loss.momentum)


def oracle_step(naive, batch):
    names = ("student_embedding", "teacher_embedding", "sample_idx", "negatives")
    return naive.step(*(batch[name].tolist() for name in names))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"momentum": 0.9}, {"loss_weight": 3.0}], ids=str
)
def test_steps_equal_the_naive_loops(settings):
    loss = build(**settings)
    naive = oracle(loss)
    for step in range(4):  # the first sets Z, the others read it; rows come again
        value = loss(**batch(step))
        assert_close(value, settings.get("loss_weight", 1) * oracle_step(naive, batch(step)))
        assert_close(loss.student_memory, naive.memories["student"])
        assert_close(loss.teacher_memory, naive.memories["teacher"])
        assert_close(loss.log_normalizers.exp(), [naive.z["student"], naive.z["teacher"]])
    assert_close(loss.terms["student"] + loss.terms["teacher"], value / loss.loss_weight)


def test_each_term_is_of_one_embedding():
    loss = build()
    loss(**batch(0))
    loss.eval()
    for side, other in (("student", "teacher"), ("teacher", "student")):
        loss(**batch(1))
        before = loss.terms
        loss(**{**batch(1), f"{side}_embedding": random(SIZE, WIDTH, seed=9)})
        assert loss.terms[other] == before[other] and loss.terms[side] != before[side]


def test_defaults_are_those_that_the_docstring_tells():
    torch.manual_seed(0)
    loss = MODELS.build(dict(type="MemoryCRDLoss", num_images=1000))
    assert (loss.loss_weight, loss.num_negatives) == (1, 16384)
    for memory in (loss.student_memory, loss.teacher_memory):
        assert memory.shape == (1000, 128)
        assert memory.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)
        assert memory.mean().abs() < 1e-3


@pytest.mark.parametrize("name, value", [("temperature", 0.5), ("momentum", 0.9)])
def test_settings_change_the_loss(name, value):
    plain, changed = build(), build(**{name: value})
    for loss in (plain, changed):
        loss(**batch(0))
    same_rows = {**batch(0), "negatives": (batch(0)["sample_idx"] + 3)[:, None] % IMAGES}
    assert (plain(**same_rows) - changed(**same_rows)).abs() > 1e-3


def test_value_is_mmrazors_of_weight_1():
    loss, cfg = build(), dict(sample_n=IMAGES, dim_out=WIDTH, neg_num=NEGATIVES)
    theirs = MODELS.build(dict(type="CRDLoss", temperature=0.07, **cfg)).double()
    theirs.contrast.params = theirs.contrast.params.new_tensor([NEGATIVES, 0.07, -1, -1, 0.5])
    theirs.contrast.memory_v1.copy_(loss.student_memory)
    theirs.contrast.memory_v2.copy_(loss.teacher_memory)
    for step in range(3):
        ours = batch(step)
        rows = torch.cat([ours["sample_idx"][:, None], ours["negatives"]], dim=1)
        samples = [DataSample(sample_idx=row[0], contrast_sample_idxs=row) for row in rows]
        embeddings = [
            torch.nn.functional.normalize(ours[f"{side}_embedding"], dim=1).requires_grad_()
            for side in ("student", "teacher")
        ]
        assert_close(loss(**ours), theirs(*embeddings, samples)[0])
        assert_close(loss.student_memory, theirs.contrast.memory_v1)


def test_mmrazors_forgets_its_weight_and_cannot_be_copied():
    cfg = dict(type="CRDLoss", sample_n=IMAGES, dim_out=WIDTH, neg_num=NEGATIVES)
    values = []
    for weight in (1.0, 100.0):
        torch.manual_seed(0)
        theirs = MODELS.build(dict(cfg, loss_weight=weight))
        embeddings = [random(SIZE, WIDTH, seed=s).float().requires_grad_() for s in (1, 2)]
        samples = [DataSample(sample_idx=torch.tensor(i)) for i in range(SIZE)]
        values.append(theirs(*embeddings, samples).item())
    assert values[0] == values[1]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)


def test_a_copy_made_after_the_first_batch_goes_on_alike():
    loss = build()
    student = batch(0)["student_embedding"].requires_grad_()
    loss(**{**batch(0), "student_embedding": student}).backward()
    twin = copy.deepcopy(loss)
    assert not any(buffer.requires_grad for buffer in loss.buffers())
    for step in (1, 2):
        assert_close(twin(**batch(step)), loss(**batch(step)))


def test_a_state_dict_carries_everything_that_the_next_step_reads():
    loss = build()
    for step in range(2):
        loss(**batch(step))
    other = build(seed=9)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    drawn = []
    for resumed in (loss, other):
        torch.manual_seed(3)
        drawn.append([resumed(**{**batch(step), "negatives": None}).item() for step in (2, 3)])
    assert drawn[0] == drawn[1]
    for name, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_gradient_of_both_embeddings_with_z_held():
    loss = build(temperature=0.5)
    loss(**batch(0))
    loss.eval()
    case = batch(1)
    inputs = [case.pop(f"{side}_embedding").requires_grad_() for side in ("student", "teacher")]
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, **case), inputs)


def test_the_first_batch_has_the_gradient_of_a_constant_z():
    first, later = build(), build()
    later(**batch(0))
    later.student_memory, later.teacher_memory = first.student_memory, first.teacher_memory
    grads = []
    for loss in (first, later):
        student = batch(0)["student_embedding"].requires_grad_()
        loss(**{**batch(0), "student_embedding": student}).backward()
        grads.append(student.grad)
    assert_close(*grads)


def test_rows_of_no_known_class_are_drawn_for_every_class():
    loss = build()
    case = {**batch(0), "labels": torch.zeros(SIZE, dtype=torch.int64), "negatives": None}
    assert loss(**case).isfinite()  # the other eight rows
    assert sorted(loss.row_labels.tolist()) == [-1] * (IMAGES - SIZE) + [0] * SIZE


def test_negatives_are_drawn_among_the_classes_seen():
    loss = build(num_images=200, num_negatives=20)
    class_of = torch.arange(200) % 4
    for start in range(0, 200, 50):
        index = torch.arange(start, start + 50)
        loss(random(50, WIDTH, seed=1), random(50, WIDTH, seed=2), class_of[index], index)
    assert torch.equal(loss.row_labels, class_of)


def test_drawn_negatives_are_those_of_other_classes(monkeypatch):
    loss, seen = build(), []
    gather = torch.Tensor.gather

    def noted(products, dim, rows):
        seen.append(rows)
        return gather(products, dim, rows)

    for step in range(9):  # until every class is known
        loss(**batch(step))
    assert (loss.row_labels == CLASS_OF).all()
    monkeypatch.setattr(torch.Tensor, "gather", noted)
    case = batch(9)
    loss(**{**case, "negatives": None})
    rows = seen[0]
    assert rows.shape == (SIZE, 1 + NEGATIVES) and torch.equal(rows[:, 0], case["sample_idx"])
    assert (CLASS_OF[rows[:, 1:]] != case["labels"][:, None]).all()
    assert torch.equal(seen[1], rows)


def test_of_an_image_that_comes_twice_the_last_counts():
    loss, case = build(), batch(0)
    case["sample_idx"] = torch.tensor([2, 7, 2, 2])
    case["labels"] = CLASS_OF[case["sample_idx"]]
    naive = oracle(loss)
    assert_close(loss(**case), oracle_step(naive, case))
    assert_close(loss.student_memory, naive.memories["student"])


def test_eval_mode_leaves_the_memories_alone():
    loss = build().eval()
    before = copy.deepcopy(loss.state_dict())
    expected = oracle_step(oracle(loss), batch(0))
    assert_close(loss(**batch(0)), expected)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_published_negatives_and_images_stay_finite_in_float32():
    torch.manual_seed(0)
    loss = MODELS.build(dict(type="MemoryCRDLoss", num_images=50_000, temperature=0.01))
    labels = torch.arange(8) % 5
    embeddings = [random(8, 128, seed=s).float().requires_grad_() for s in (1, 2)]
    value = loss(*embeddings, labels, torch.arange(8))
    value.backward()
    assert value.isfinite() and all(e.grad.isfinite().all() for e in embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_computes_in_float32_also_under_autocast(dtype):
    loss, case = build(temperature=0.5).float(), batch(0)
    for side in ("student", "teacher"):
        case[f"{side}_embedding"] = case[f"{side}_embedding"].to(dtype)
    expected = oracle_step(oracle(loss), case)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(**case)
    assert value.dtype == torch.float32
    assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_no_and_of_one_image_keep_the_graph(size):
    case = batch(0, size) if size else {k: v[:0] for k, v in batch(0).items()}
    both = [case.pop(f"{side}_embedding").requires_grad_() for side in ("student", "teacher")]
    value = build()(*both, **case)
    value.backward()
    assert value.isfinite() and all(embedding.grad.isfinite().all() for embedding in both)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"num_images": 0}, "num_images.*0"),
        ({"num_negatives": 2.5}, "num_negatives.*2.5"),
        ({"embedding_channels": True}, "embedding_channels"),
        ({"temperature": 0}, "temperature.*above 0"),
        ({"momentum": 1}, r"momentum.*\[0, 1\)"),
        ({"loss_weight": -1}, "loss_weight"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(SettingError, match=match):
        build(**settings)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"sample_idx": torch.tensor([0, 1, 2, IMAGES])}, "num_images.*12 for indices 0 to 12"),
        ({"sample_idx": torch.tensor([0, 1, 2, -1])}, "num_images"),
        ({"sample_idx": torch.arange(3)}, "sample_idx.*4 whole numbers"),
        ({"sample_idx": torch.arange(4.0)}, "sample_idx.*4 whole numbers.*float32"),
        ({"labels": torch.rand(4, 3)}, "labels.*float32.*mixed by batch augmentations"),
        ({"student_embedding": torch.rand(4, 6)}, r"student_embedding.*\(4, 5\).*\(4, 6\)"),
        ({"teacher_embedding": torch.rand(3, 5)}, "teacher_embedding"),
    ],
)
def test_inputs_are_checked(change, match):
    with pytest.raises(SettingError, match=match):
        build()(**{**batch(0), **change})


# --- two processes -----------------------------------------------------------------------------


def _train(steps: int, drawn: bool) -> tuple[list, list, list, list]:
    """Losses, the gradients of a shared map of the embeddings, memories and Z."""
    distributed = dist.is_initialized()
    # Each process starts from memories of its own, which those of rank 0 replace.
    loss = build(seed=dist.get_rank() if distributed else 0)
    shared = random(WIDTH, WIDTH, seed=5).requires_grad_()
    losses, grads = [], []
    for step in range(steps):
        case = {name: own_rows(value) for name, value in batch(step).items()}
        case["student_embedding"] = case["student_embedding"] @ shared
        if drawn:
            case["negatives"] = None
        value = loss(**case)
        grads.append(torch.autograd.grad(value, shared)[0].tolist())
        losses.append(value.item())
    state = {name: value.tolist() for name, value in loss.state_dict().items()}
    return (
        losses,
        grads,
        [state["student_memory"], state["teacher_memory"]],
        [
            state["log_normalizers"],
            state["row_labels"],
        ],
    )


def test_two_processes_equal_one_with_the_whole_batch(both):
    results = both(_train, 4, False)
    losses, grads, memories, rest = _train(4, False)
    assert_close(test_distributed.mean([result[:2] for result in results])[0], losses)
    assert_close(test_distributed.mean([result[:2] for result in results])[1], grads)
    for result in results:
        assert_close(result[2], memories)
        for own, expected in zip(result[3], rest, strict=True):
            assert_close(own, expected)


def test_two_processes_hold_the_same_memories_to_the_last_bit(both):
    (losses, _, *first), (other_losses, _, *second) = both(_train, 4, True)
    assert first == second
    assert losses != other_losses  # of different images
