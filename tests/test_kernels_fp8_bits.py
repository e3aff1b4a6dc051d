"""FP8 where the device casts none: numbers from their bits and back, and a layer whose FP8 tensors are only stored."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.fp8_bits import decode, decode_scale, encode, encode_scale
from octofold.kernels.qtensor import E4M3, E5M2, E8M0, LARGEST, Format
from octofold.kernels.recipe import block_recipe
from octofold.kernels.registry import FP8_OPS, Kernels, Workload, choose
from octofold.parallel.transport import Packing

FP8 = {E4M3, E5M2, E8M0}
STORING = {"view", "as_strided", "transpose", "slice", "split_with_sizes", "detach", "alias", "unsqueeze", "empty"}
"""What a device without FP8 may do with it: look at its bytes otherwise."""


class NoFp8Arithmetic(TorchDispatchMode):
    """Fails at operators that read or write FP8 numbers, as Ascend 910 does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        touched = {x.dtype for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)} & FP8
        name = func.overloadpacket.__name__
        assert not touched or name in STORING, f"{name} on {touched}"
        return out


def byte_kernels(*formats: Format) -> Kernels:
    chosen = KernelsConfig(**dict.fromkeys([*FP8_OPS, "dequantize"], "bytes"))
    return choose(chosen, Workload("cpu", torch.bfloat16, formats=formats))[0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_is_decoded_as_torch_does(dtype):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert torch.equal(decode(codes).nan_to_num(12345.0), codes.float().nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_ties_and_neighbours_are_rounded_as_torch_does(dtype):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    known = codes[codes.isfinite()].sort().values
    ties = (known[1:] + known[:-1]) / 2
    beside = torch.cat([ties, known])
    some = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(-30, 6, 50_000)
    x = torch.cat(
        [beside, torch.nextafter(beside, torch.tensor(9e9)), torch.nextafter(beside, torch.tensor(-9e9)), some]
    )
    x = torch.cat([x, torch.tensor([torch.nan, 0.0, -0.0, 1e-45])]).clamp(-LARGEST[dtype], LARGEST[dtype])
    assert torch.equal(encode(x, dtype), x.to(dtype).view(torch.uint8))


def test_scales_are_exponents():
    scales = torch.cat([2.0 ** torch.arange(-126, 128), torch.tensor([torch.nan])])
    codes = encode_scale(scales)
    assert torch.equal(codes.view(torch.uint8), scales.to(E8M0).view(torch.uint8))
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(E8M0)
    assert torch.equal(decode_scale(every).nan_to_num(7.0), every.float().nan_to_num(7.0))


@pytest.mark.parametrize("scale", ["ue8m0", "float"])
def test_the_mode_fails_where_a_device_without_casts_would(scale):
    format = Format((1, 32), scale)
    kernels = choose(KernelsConfig(quantize="reference"), Workload("cpu", torch.bfloat16, formats=(format,)))[0]
    with NoFp8Arithmetic(), pytest.raises(AssertionError, match="_to_copy on"):
        kernels.quantize(torch.ones(2, 64), format)


@pytest.mark.parametrize("arithmetic", ["storage", "product"])
def test_a_layer_trains_with_fp8_that_is_only_stored(arithmetic):
    """And computes what the other providers do."""
    recipe = block_recipe("fp8_block", 32, "ue8m0", E4M3, arithmetic=arithmetic)
    x, weight, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) for shape in SHAPES)
    results = []
    for kernels in (byte_kernels(*recipe.formats), choose(KernelsConfig(), Workload("cpu", torch.float32))[0]):
        state = Fp8State(recipe, kernels, keep_weights=True, turned_copies=True)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with NoFp8Arithmetic() if not results else torch.enable_grad():
            out = state.linear(*leaves)
            out.backward(dy)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


SHAPES = [(6, 64), (96, 64), (6, 96)]


@pytest.mark.parametrize("scale", ["ue8m0", "float"])
def test_tokens_travel_as_bytes(scale):
    """A message is uint8, whatever the collective library knows of FP8, and comes out as every provider makes it."""
    format = Format((1, 128), scale)
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    marks = torch.arange(5)[:, None]
    with NoFp8Arithmetic():
        packing = Packing((rows, marks), byte_kernels(format), format)
        parcels = packing.pack((rows, marks))
        assert parcels.dtype == torch.uint8
        assert parcels.shape == (5, 300 + 3 * format.scale_dtype.itemsize + 8)
        found, columns = packing.unpack(parcels)
    usual = Packing((rows, marks), choose(KernelsConfig(), Workload("cpu", torch.bfloat16))[0], format)
    assert torch.equal(found, usual.unpack(usual.pack((rows, marks)))[0])
    assert torch.equal(columns, marks)
