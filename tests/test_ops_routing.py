"""Router logits to experts: values, torch integration, errors. The kernel's own cases are in triton_cases.py."""

from __future__ import annotations

import pytest
import torch

from gemq import ops, reference


@pytest.mark.parametrize("normalize, scale", [(True, 1.0), (False, 2.5)])
def test_softmax_routing_is_what_routers_do(normalize, scale):
    """As MixtralTopKRouter and Qwen2MoeTopKRouter of transformers compute it."""
    logits = torch.randn(9, 60)
    weights, ids = ops.topk_routing(logits, 4, normalize=normalize, scale=scale)
    expected, expected_ids = torch.topk(torch.softmax(logits, -1), 4, dim=-1)
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids.long(), expected_ids) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, expected * scale)


def test_a_bias_changes_the_choice_and_not_the_weights():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    weights, ids = ops.topk_routing(logits, 2, scoring="sigmoid", normalize=False, bias=bias)
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [0, 3]])


def test_equal_scores_go_by_index():
    _, ids = ops.topk_routing(torch.zeros(2, 8), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_opcheck_and_fullgraph():
    args = (torch.randn(5, 8), 2, "softmax", True, 1.0, None)
    torch.library.opcheck(torch.ops.gemq.topk_routing, args)
    compiled = torch.compile(lambda x: ops.topk_routing(x, 2), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(args[0]), reference.topk_routing(args[0], 2), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(3, 8, dtype=torch.int32)}, "logits must be float32"),
        ({"logits": torch.zeros(8)}, "logits must have 2 dimensions"),
        ({"top_k": 0}, r"top_k must be within 1\.\.8"), ({"top_k": 9}, r"top_k must be within 1\.\.8"),
        ({"scoring": "tanh"}, "scoring must be one of softmax, sigmoid"),
        ({"bias": torch.zeros(7)}, "bias has 7 entries for 8 experts"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(3, 8), "top_k": 2} | change
    with pytest.raises((TypeError, ValueError), match=message):
        ops.topk_routing(**arguments)
