"""The loss with its vocabulary cut over processes equals the loss of one process."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.head import DistillationHead
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher
from incr_ds.testing.processes import ProcessError, run_processes

N, V, HS, HT, K = 23, 101, 12, 7, 5
CASES = {
    "labels": {"alpha": 0.0, "z_loss": 0.1, "label_smoothing": 0.1},
    "forward": {"alpha": 0.3, "temperature": 2.0, "z_loss": 0.1, "label_smoothing": 0.1},
    "reverse": {"alpha": 0.6, "temperature": 1.5, "divergence": "reverse_kl"},
    "jsd": {"alpha": 1.0, "divergence": "jsd", "label_smoothing": 0.2},
    "top-k": {"alpha": 0.5, "temperature": 1.5, "label_smoothing": 0.1},
    "sampled": {"alpha": 0.5},
    "triton": {"alpha": 0.3, "temperature": 2.0, "backend": "triton"},
    "recompute": {"alpha": 0.3, "temperature": 2.0, "z_loss": 0.1, "backend": "recompute"},
    "capped": {"alpha": 0.3, "temperature": 2.0, "z_loss": 0.1, "softcap": 3.0},
    "recompute capped": {"alpha": 0.6, "divergence": "reverse_kl", "backend": "recompute", "softcap": 3.0},
    "recompute jsd": {"alpha": 0.6, "divergence": "jsd", "backend": "recompute"},
}


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[[2, 11]] = -100
    shapes = ((N, HS), (V, HS), (N, HT), (V, HT))
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return hidden, head, labels, teacher_hidden, teacher_head


def teacher_of(name, teacher_hidden, teacher_head, whole_head):
    if name == "labels":
        return None
    if name in ("top-k", "sampled"):
        q, indices = F.softmax(teacher_hidden @ whole_head.T / 1.5, 1).topk(K)
        return TopKTeacher(indices, q.log()) if name == "top-k" else SampledTeacher(indices, q / q.sum(1)[:, None])
    return HiddenTeacher(teacher_hidden, teacher_head)


def dtype_of(name):
    return torch.float32 if name == "triton" else torch.float64


def padded(rows, padding):
    return F.pad(rows, (0, 0, 0, padding), value=torch.inf)


def part(name, cuts):
    """One rank's loss and gradients; rank r holds vocabulary entries cuts[r] to cuts[r + 1], the last one padding too."""
    rank = dist.get_rank()
    rows = slice(cuts[rank], min(cuts[rank + 1], V))
    hidden, head, labels, teacher_hidden, teacher_head = problem(dtype_of(name))
    padding = cuts[rank + 1] - rows.stop if rows.start < V else cuts[rank + 1] - cuts[rank]
    hidden, own = hidden.requires_grad_(), padded(head[rows], padding).requires_grad_()
    taught = padded(teacher_head[rows], 2 * padding)
    loss = distillation_loss(
        hidden, own, labels, teacher=teacher_of(name, teacher_hidden, taught, teacher_head), **CASES[name],
        group=dist.group.WORLD, vocab_start=cuts[rank], vocab_size=V, budget_bytes=3_000,
    )  # fmt: skip
    loss.loss.backward()
    kept = own.grad[: len(own) - padding]
    assert not own.grad[len(kept) :].any()
    return [value.detach() for value in loss], hidden.grad, kept


def messages():
    hidden, head, labels, teacher_hidden, teacher_head = problem()
    wrong = [
        {"vocab_start": 0},
        {"backend": "reference"},
        {"alpha": 0.5, "teacher": HiddenTeacher(teacher_hidden, teacher_head[1:])},
    ]
    found = []
    for arguments in wrong:
        try:
            distillation_loss(hidden, head, labels, **{"alpha": 0.0, "group": dist.group.WORLD} | arguments)
        except ValueError as error:
            found.append(str(error))
    return found


def parts(cuts, names):
    warnings.simplefilter("ignore", RuntimeWarning)  # of Triton's interpreter
    dist.init_process_group("gloo")
    results = {name: part(name, cuts) for name in names}
    refused = messages()
    dist.destroy_process_group()
    return results, refused


def whole_of(name):
    hidden, head, labels, teacher_hidden, teacher_head = problem(dtype_of(name))
    teacher = teacher_of(name, teacher_hidden, teacher_head, teacher_head)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    loss = distillation_loss(hidden, head, labels, teacher=teacher, **{**CASES[name], "backend": "torch"})
    loss.loss.backward()
    return [value.detach() for value in loss], hidden.grad, head.grad


# Two nearly even parts; three with a single row in the middle; four, the last one padding alone.
@pytest.mark.parametrize("cuts", [(0, 51, 101), (0, 60, 61, 101), (0, 51, 90, 128, 131)], ids=str)
def test_cut_equals_whole(cuts):
    names = [name for name in CASES if name != "triton" or len(cuts) == 3]
    ranks = run_processes(parts, len(cuts) - 1, cuts, names)
    for name in names:
        values, hidden_gradient, head_gradient = whole_of(name)
        found = [results[name] for results, _ in ranks]
        assert all(torch.equal(a, b) for mine, *_ in found for a, b in zip(mine, found[0][0], strict=True)), (
            "every rank reports the same numbers"
        )
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "triton" else {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(found[0][0], values, **tolerance)
        for _, mine, _ in found:
            torch.testing.assert_close(mine, hidden_gradient, **tolerance)
        torch.testing.assert_close(torch.cat([rows for *_, rows in found]), head_gradient, **tolerance)
    for text, expected in zip(
        ranks[0][1],
        [
            "vocab_start and vocab_size belong together; one of them is missing",
            "'reference' needs the whole vocabulary in one process",
            "teacher_head has 100 rows, student_head 101: vocabularies differ",
        ],
        strict=True,
    ):
        assert expected in text


def equal_parts():
    """Without vocab_start and vocab_size the ranks hold equal parts in their order; also through the module."""
    dist.init_process_group("gloo")
    rank, (hidden, head, labels, *_) = dist.get_rank(), problem()
    head, labels = head[:100], torch.where(labels == 100, 7, labels)
    mine = head[50 * rank : 50 * rank + 50]
    collectives = []
    original = dist.all_gather
    dist.all_gather = lambda *arguments, **options: collectives.append(1) or original(*arguments, **options)
    loss = distillation_loss(hidden, mine, labels, alpha=0.0, group=dist.group.WORLD)
    module = DistillationHead(nn.Parameter(mine.clone()), dist.group.WORLD, 50 * rank, 100)
    same = module(hidden[None], labels[None])
    dist.destroy_process_group()
    return loss.loss, same.loss.detach(), F.cross_entropy(hidden @ head.T, labels), len(collectives)


def test_equal_parts_are_the_default_and_each_slab_is_one_collective():
    for ours, module, expected, collectives in run_processes(equal_parts, 2):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        assert torch.equal(ours, module)
        assert collectives == 2, "one for each of the two losses"


def tokens_of_each_rank():
    dist.init_process_group("gloo")
    rank, (hidden, head, labels, teacher_hidden, teacher_head) = dist.get_rank(), problem()
    tokens, rows = slice(11 * rank, 11 * rank + 11), slice(51 * rank, 51 * rank + 51)
    own, results = head[rows].clone().requires_grad_(), []
    for name in ("jsd", "top-k", "sampled"):
        mine = hidden[tokens].clone().requires_grad_()
        teacher = teacher_of(name, teacher_hidden[tokens], teacher_head[rows], teacher_head)
        loss = distillation_loss(
            mine, own, labels[tokens], teacher=teacher, **CASES[name], group=dist.group.WORLD, vocab_start=rows.start,
            vocab_size=V, sequence_parallel=True,
        )  # fmt: skip
        results.append((loss.loss.detach(), *torch.autograd.grad(loss.loss, (mine, own))))
    dist.destroy_process_group()
    return results


def test_sequence_parallel_inputs_equal_whole_ones():
    ranks = run_processes(tokens_of_each_rank, 2)
    for index, name in enumerate(("jsd", "top-k", "sampled")):
        hidden, head, labels, teacher_hidden, teacher_head = problem()
        hidden, head = hidden[:22].requires_grad_(), head.requires_grad_()
        teacher = teacher_of(name, teacher_hidden[:22], teacher_head, teacher_head)
        whole = distillation_loss(hidden, head, labels[:22], teacher=teacher, **CASES[name]).loss
        expected = torch.autograd.grad(whole, (hidden, head))
        for results in ranks:
            torch.testing.assert_close(results[index][0], whole.detach(), rtol=1e-12, atol=0)
        for position in (1, 2):
            found = torch.cat([results[index][position] for results in ranks])
            torch.testing.assert_close(found, expected[position - 1], rtol=1e-11, atol=1e-13)


def fail(rank):
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("no luck")
    dist.barrier()


def test_a_failing_process_shows_its_traceback_and_ends_the_others():
    with pytest.raises(ProcessError, match=r"(?s)rank 1 failed:.*ValueError: no luck"):
        run_processes(fail, 2, 1)
