"""selection.py against loops over probabilities, in float64."""

import math

import pytest
import torch
from helpers import naive_min_max_loss, naive_ranking

from trainers.prompting.selection import LOSSES, hard_negatives, log_probabilities, min_max_loss, select, top_classes

SHAPES = [(1, 2, 5), (3, 2, 1), (4, 5, 5), (6, 6, 5), (5, 17, 1), (5, 17, 5), (8, 100, 10)]  # B, C, K


def logits_of(batch, classes, seed=0):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def conditional_logits(batch, classes):
    """(B, c, C) logits of x_c."""
    return torch.stack([logits_of(batch, classes, seed=1 + c) for c in range(classes)], 1)


def naive_softmax(row):
    exponentials = [math.exp(v) for v in row.tolist()]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("batch, classes, k", SHAPES)
def test_hard_negatives_are_the_most_probable_other_classes(batch, classes, k):
    logits = logits_of(batch, classes)
    label = torch.arange(batch) % classes
    negatives = hard_negatives(logits, label, k)
    assert negatives.shape == (batch, min(k, classes - 1))
    for i in range(batch):
        others = [c for c in naive_ranking(logits[i].tolist()) if c != label[i]]
        assert negatives[i].tolist() == others[:k]


def test_hard_negatives_stay_on_the_device_of_the_logits():
    logits, label = torch.zeros(3, 7, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    negatives = hard_negatives(logits, label, 2)
    assert negatives.device.type == "meta" and negatives.shape == (3, 2)


@pytest.mark.parametrize("classes", [5, 1000])
def test_ties_go_to_the_lower_label(classes):
    """Sorting algorithms are often stable by accident where there is little to sort."""
    logits = torch.randint(0, 3, (4, classes), generator=torch.Generator().manual_seed(0)).float()
    for row, ranked in zip(logits.tolist(), top_classes(logits, classes).tolist()):
        assert ranked == naive_ranking(row)
    assert hard_negatives(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), torch.tensor([2]), 3).tolist() == [[1, 4, 0]]


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("batch, classes, k", SHAPES)
def test_loss_equals_loop(batch, classes, k, form):
    original, conditional = logits_of(batch, classes), conditional_logits(batch, classes)
    label = torch.arange(batch) % classes
    negatives = hard_negatives(original, label, k)
    log_p = log_probabilities(original)
    log_pc = log_probabilities(conditional).diagonal(dim1=1, dim2=2)  # log p(c|x_c)
    rows = torch.arange(batch)
    loss = min_max_loss(
        log_p[rows, label], log_pc[rows, label], log_p.gather(1, negatives), log_pc.gather(1, negatives), form
    )
    for i in range(batch):
        p = naive_softmax(original[i])
        pc = [naive_softmax(conditional[i, c])[c] for c in range(classes)]
        expected = naive_min_max_loss(p, pc, int(label[i]), negatives[i].tolist(), form)
        assert loss[i].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("form", LOSSES)
def test_gradient_reaches_only_smaller_positive_and_larger_negatives(form):
    values = [torch.tensor(v, requires_grad=True) for v in ([-1.0], [-2.0], [[-3.0, -1.5]], [[-2.5, -4.0]])]
    min_max_loss(*values, form).sum().backward()
    positive, positive_c, negative, negative_c = (v.grad.flatten().tolist() for v in values)
    assert positive == [0.0] and positive_c[0] < 0
    assert negative[0] == 0.0 and negative[1] > 0
    assert negative_c[0] > 0 and negative_c[1] == 0.0


@pytest.mark.parametrize("form", LOSSES)
def test_underflowing_probabilities_stay_finite(form):
    logits = torch.tensor([[0.0, 400.0, -400.0]], requires_grad=True)  # exp(-800) is 0 in float32 and in float64
    log_p = log_probabilities(logits)
    loss = min_max_loss(log_p[:, 2], log_p[:, 2], log_p[:, [0, 1]], log_p[:, [0, 1]], form)
    loss.sum().backward()
    assert loss.item() == pytest.approx(800.0)
    assert torch.isfinite(logits.grad).all()


def test_half_precision_logits_are_computed_in_float32():
    logits = (logits_of(4, 9) * 10).half()
    log_p = log_probabilities(logits)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, torch.log_softmax(logits.double(), 1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", LOSSES)
def test_loss_without_negatives_is_zero_with_zero_gradient(form):
    assert hard_negatives(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), 5).shape == (3, 0)
    positive = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = min_max_loss(positive, positive - 1, torch.zeros(2, 0), torch.zeros(2, 0), form)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and positive.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("batch, classes, k", SHAPES)
def test_selection_equals_loop(batch, classes, k):
    original, conditional = logits_of(batch, classes), conditional_logits(batch, classes)
    candidates = top_classes(original, k)
    assert candidates.shape == (batch, min(k, classes))
    log_pc = log_probabilities(conditional).diagonal(dim1=1, dim2=2)
    scores = select(log_probabilities(original), candidates, log_pc.gather(1, candidates))
    for i in range(batch):
        p = naive_softmax(original[i])
        pc = [naive_softmax(conditional[i, c])[c] for c in range(classes)]
        chosen = naive_ranking(p)[:k]
        assert scores[i].argmax() == max(chosen, key=lambda c: max(p[c], pc[c]))
        for c in range(classes):
            expected = max(p[c], pc[c]) if c in chosen else 0.0
            assert scores[i, c].exp().item() == pytest.approx(expected, rel=1e-9)
