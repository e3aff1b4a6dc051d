"""Rows between real ranks, as they are and in FP8, against index arithmetic and the specification of the cast."""

import pytest
import rank_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.kernels.qtensor import E5M2, Format
from octofold.kernels.reference.quantize import quantize

FORMATS = [Format((1, 128)), Format((1, 16), dtype=E5M2), Format((1, 32), scale="float")]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(
    data: st.DataObject, n: int, width: int, dtype: torch.dtype
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Blocks by [source][target], and what their gradients start from by [target][source]."""
    row = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    counts = data.draw(st.lists(row, min_size=n, max_size=n))
    blocks = [[normal(n * s + t, counts[s][t], width).to(dtype) for t in range(n)] for s in range(n)]
    cotangents = [[normal(100 + n * s + t, counts[s][t], width).to(dtype) for s in range(n)] for t in range(n)]
    return blocks, cotangents


@pytest.mark.parametrize("n", [1, 2, 4])
@settings(max_examples=15)
@given(data=st.data(), width=st.sampled_from([1, 3]))
def test_blocks_travel_to_their_targets_and_gradients_back(ranks, n, data, width):
    blocks, cotangents = drawn(data, n, width, torch.float64)
    outcomes = ranks(n).run(rank_tasks.move, blocks, [torch.cat(row) for row in cotangents])
    for rank, (received, gradient, sent_bytes) in enumerate(outcomes):
        assert torch.equal(received, torch.cat([blocks[source][rank] for source in range(n)]))
        assert torch.equal(gradient, torch.cat([cotangents[target][rank] for target in range(n)]))
        away = sum(len(block) for target, block in enumerate(blocks[rank]) if target != rank)
        back = sum(len(block) for source, block in enumerate(cotangents[rank]) if source != rank)
        assert sent_bytes == {"dispatch": away * 8 * width, "dispatch_gradient": back * 8 * width}


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("n", [1, 2])
@settings(max_examples=10)
@given(data=st.data(), width=st.sampled_from([5, 128, 300]))
def test_rows_in_fp8_arrive_as_the_specification_rounds_them(ranks, n, format, data, width):
    """Also their gradients; the bytes are a number an element and its tiles' scales."""
    blocks, cotangents = drawn(data, n, width, torch.bfloat16)
    outcomes = ranks(n).run(rank_tasks.move, blocks, [torch.cat(row) for row in cotangents], format, format)
    row_bytes = width + -(-width // format.tile[1]) * format.scale_dtype.itemsize
    for rank, (received, gradient, sent_bytes) in enumerate(outcomes):
        sent = torch.cat([blocks[source][rank] for source in range(n)])
        assert torch.equal(received, quantize(sent, format).dequantize(torch.bfloat16))
        returned = torch.cat([cotangents[target][rank] for target in range(n)])
        assert torch.equal(gradient, quantize(returned, format).dequantize(torch.bfloat16))
        away = sum(len(block) for target, block in enumerate(blocks[rank]) if target != rank)
        back = sum(len(block) for source, block in enumerate(cotangents[rank]) if source != rank)
        assert sent_bytes == {"dispatch": away * row_bytes, "dispatch_gradient": back * row_bytes}


def test_what_is_not_finite_does_not_hide_on_the_way(ranks):
    rows = normal(0, 2, 64).to(torch.bfloat16)
    rows[0, 3], rows[1, 60] = float("inf"), float("nan")
    format = Format((1, 32))
    for received, _, _ in ranks(2).run(rank_tasks.move, [[rows, rows]] * 2, [torch.cat([rows] * 2)] * 2, format, None):
        assert received.isnan().sum() == 2 * 2 * 32
