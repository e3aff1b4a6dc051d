"""Every provider of every op against the reference in FP64: results and all gradients, memory poisoned with NaN.

Tolerances. Operands are standard normal, so the terms of every sum have size about 1 and a result differs from the
exact one by a few roundings of that size, however much it cancels: the root mean square of the difference may be
`ROUNDINGS` units of the dtype's precision, relative to the root mean square of the exact result or to 1, the larger.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.dotted import load_dotted
from octofold.kernels.registry import PROVIDERS, Workload

pytestmark = pytest.mark.usefixtures("poisoned")

ROUNDINGS = 4
"""Few chained steps round to the dtype (scores, weights, products); sums inside are FP32 or better."""
LONG_SUM_ROUNDINGS = 16
"""FP32 and FP64 add in their own precision, so that the error grows with the length of a sum (here up to 300)."""
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def cases(op: str) -> list[Any]:
    """Every provider of `op` with every dtype it supports on a CPU."""
    found: list[Any] = []
    for provider, module in PROVIDERS[op].items():
        why_unsupported = load_dotted(f"{module}:why_unsupported", "test")
        assert callable(why_unsupported)
        for dtype in DTYPES:
            if why_unsupported(Workload("cpu", dtype)) is None:
                short = str(dtype).removeprefix("torch.")
                found.append(pytest.param(provider, dtype, id=f"{provider}-{short}"))
    return found


def everywhere(op: str) -> list[str]:
    """Providers that run on a CPU in FP32."""
    return [case.values[0] for case in cases(op) if case.values[1] == torch.float32]


def implementation(op: str, provider: str) -> Callable[..., torch.Tensor]:
    function = load_dotted(f"{PROVIDERS[op][provider]}:{op}", "test")
    assert callable(function)
    return function


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    assert found.shape == exact.shape, what
    assert found.dtype == dtype, what
    assert found.isfinite().all(), f"{what}: memory that was never written, or an overflow"
    if exact.numel() == 0:
        return
    error = (found.double() - exact).square().mean().sqrt()
    size = max(1.0, float(exact.square().mean().sqrt()))
    roundings = ROUNDINGS if dtype == torch.bfloat16 else LONG_SUM_ROUNDINGS
    assert error <= roundings * torch.finfo(dtype).eps * size, f"{what}: {error:.1e} off, of size {size:.1e}"


def assert_as_reference(op: str, provider: str, operands: list[torch.Tensor], seed: int, **options: object) -> None:
    """Compare the result and the gradient of every floating operand."""
    dtype = operands[0].dtype
    outcomes = []
    for name, to in ((provider, dtype), ("reference", torch.float64)):
        # Copies that share no memory with the other call's, in the same strides.
        inputs = [x.detach().to(to, copy=True).requires_grad_() if x.is_floating_point() else x for x in operands]
        out = implementation(op, name)(*inputs, **options)
        cotangent = normal(torch.Generator().manual_seed(seed), dtype, *out.shape)
        differentiable = [x for x in inputs if x.requires_grad]
        outcomes.append((out.detach(), *torch.autograd.grad(out, differentiable, cotangent.to(to))))
    for index, (found, exact) in enumerate(zip(*outcomes, strict=True)):
        assert_close(found, exact, dtype, f"gradient {index}" if index else "result")


seeds = st.integers(0, 2**31)


@pytest.mark.parametrize(("provider", "dtype"), cases("rms_norm"))
@given(rows=st.integers(0, 40), width=st.integers(1, 70), dims=st.integers(1, 3), seed=seeds)
def test_rms_norm(provider, dtype, rows, width, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = {1: (width,), 2: (rows, width), 3: (rows, 2, width)}[dims]
    # Away from zero: near it the norm's own gradient, 1 / |x|, is the ill-conditioned part.
    x = normal(generator, dtype, *shape)
    x = x + x.sign() * 0.5
    assert_as_reference("rms_norm", provider, [x, normal(generator, dtype, width)], seed, eps=1e-6)


@pytest.mark.parametrize("provider", everywhere("rms_norm"))
def test_rms_norm_of_zeros(provider):
    x = torch.zeros(3, 8, requires_grad=True)
    out = implementation("rms_norm", provider)(x, torch.ones(8), 1e-6)
    assert not out.any()
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.allclose(gradient, torch.full_like(x, 1e3)), "1 / √eps"


@pytest.mark.parametrize(("provider", "dtype"), cases("rotary"))
@given(batch=st.integers(0, 3), length=st.integers(1, 9), heads=st.integers(1, 4), pairs=st.integers(1, 33), seed=seeds)
def test_rotary(provider, dtype, batch, length, heads, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    x_BSHr = normal(generator, dtype, batch, length, heads, 2 * pairs)
    angles_BSc = torch.rand(batch, length, pairs, generator=generator, dtype=torch.float64) * 2 * torch.pi
    # Rounded to the dtype of x, by contract: the reference in FP64 must take the same.
    tables = {"cos_BSc": angles_BSc.cos().to(dtype).double(), "sin_BSc": angles_BSc.sin().to(dtype).double()}
    assert_as_reference("rotary", provider, [x_BSHr], seed, **tables)


def test_rotary_turns_interleaved_pairs_by_their_angles():
    x_BSHr = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    angles_BSc = torch.tensor([0.5, 1.0]).view(1, 1, 2)
    turned = implementation("rotary", "reference")(x_BSHr, angles_BSc.cos(), angles_BSc.sin())
    first = torch.cat([angles_BSc.cos()[..., :1], -2 * angles_BSc.sin()[..., 1:]], -1)
    second = torch.cat([angles_BSc.sin()[..., :1], 2 * angles_BSc.cos()[..., 1:]], -1)
    assert torch.allclose(turned.flatten(), torch.cat([first, second], -1).flatten())


@pytest.mark.parametrize(("provider", "dtype"), cases("swiglu"))
@given(rows=st.integers(0, 40), width=st.integers(1, 70), scale=st.sampled_from([1.0, 20.0]), seed=seeds)
def test_swiglu(provider, dtype, rows, width, scale, seed):
    gate_up = normal(torch.Generator().manual_seed(seed), dtype, rows, 2 * width) * scale
    assert_as_reference("swiglu", provider, [gate_up], seed)


def counts_of(experts: int) -> st.SearchStrategy[list[int]]:
    """Rows of each expert: arbitrary with empty ones among them, all rows to one, or none at all."""
    arbitrary = st.lists(st.integers(0, 20), min_size=experts, max_size=experts)
    one_takes_all = st.tuples(st.integers(0, experts - 1), st.integers(1, 60)).map(
        lambda taker: [taker[1] if expert == taker[0] else 0 for expert in range(experts)]
    )
    return st.one_of(arbitrary, one_takes_all, st.just([0] * experts))


@pytest.mark.parametrize(("provider", "dtype"), cases("grouped_mm"))
@given(data=st.data(), experts=st.integers(1, 6), seed=seeds)
def test_grouped_mm(provider, dtype, data, experts, seed):
    counts = data.draw(counts_of(experts))
    # torch's kernel takes rows of whole multiples of 16 bytes (its why_unsupported says so).
    widths = st.integers(1, 5).map(lambda n: 8 * n) if provider == "torch" else st.integers(1, 40)
    width_in, width_out = data.draw(widths), data.draw(widths)
    generator = torch.Generator().manual_seed(seed)
    x_ND = normal(generator, dtype, sum(counts), width_in)
    w_EFD = normal(generator, dtype, experts, width_out, width_in)
    assert_as_reference("grouped_mm", provider, [x_ND, w_EFD, torch.tensor(counts)], seed)


@st.composite
def document_ids(draw: st.DrawFn, length: int) -> list[int]:
    """Non-decreasing ids: documents of length one, one document, or cuts anywhere."""
    kind = draw(st.sampled_from(["single tokens", "one", "cut"]))
    if kind == "single tokens":
        return list(range(length))
    starts = draw(st.sets(st.integers(0, length - 1), max_size=6)) if kind == "cut" else set()
    first = draw(st.integers(0, 3))
    return [first + sum(start <= position for start in starts) for position in range(length)]


@pytest.mark.parametrize(("provider", "dtype"), cases("attention"))
@settings(max_examples=15)
@given(
    data=st.data(),
    length=st.one_of(st.sampled_from([1, 2, 127, 128, 129, 256, 300]), st.integers(1, 300)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 25),
    value_width=st.integers(1, 25),
    masked=st.booleans(),
    all_queries=st.booleans(),
    seed=seeds,
)
def test_attention(provider, dtype, data, length, batch, heads, width, value_width, masked, all_queries, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = length if all_queries else data.draw(st.integers(1, length))
    # Heads next to positions in memory for keys and values, as the model hands them over.
    q = normal(generator, dtype, batch, heads, queries, width)
    k = normal(generator, dtype, batch, length, heads, width).transpose(1, 2)
    v = normal(generator, dtype, batch, length, heads, value_width).transpose(1, 2)
    doc_ids = torch.tensor([data.draw(document_ids(length)) for _ in range(batch)]) if masked else None
    assert_as_reference("attention", provider, [q, k, v], seed, scale=width**-0.5, doc_ids_BS=doc_ids)


@pytest.mark.parametrize("provider", everywhere("attention"))
def test_attention_of_a_document_of_one_is_its_value(provider):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (normal(generator, torch.float32, 1, 2, 130, 8) for _ in range(3))
    out = implementation("attention", provider)(q, k, v, scale=1.0, doc_ids_BS=torch.arange(130)[None])
    assert torch.allclose(out, v)


@pytest.mark.parametrize(("provider", "dtype"), cases("attention"))
def test_attention_survives_large_scores(provider, dtype):
    """Scores in the thousands: the softmax subtracts the maximum first."""
    generator = torch.Generator().manual_seed(0)
    q, k = (normal(generator, dtype, 1, 1, 140, 16).mul_(50).requires_grad_() for _ in range(2))
    v = normal(generator, dtype, 1, 1, 140, 8)
    out = implementation("attention", provider)(q, k, v, scale=1.0)
    gradients = torch.autograd.grad(out.sum(), (q, k))
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
