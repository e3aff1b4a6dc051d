"""What is said of quantised tensors is what a plain count over every element says, on one rank and over several."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.qtensor import E5M2, Format, QTensor
from octofold.kernels.recipe import Recipe, block_recipe, mx_recipe, tensor_recipe
from octofold.kernels.reference.quantize import quantize
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.train.metrics import HEALTH_METRICS
from octofold.train.precision.watch import SAMPLED_ROWS, Health, Watch

CPU = torch.device("cpu")
BLOCK = block_recipe("fp8_block", 16, "ue8m0", torch.float8_e4m3fn)
FORMATS = {
    "tiles": Format((1, 16)),
    "blocks": Format((16, 16), "float", least_amax=1e-4),
    "rows": Format((1, 0), "float"),
    "tensor": Format((0, 0)),
    "gradients": Format((1, 16), dtype=E5M2),
}


def kernels() -> Kernels:
    return choose(KernelsConfig(), Workload("cpu", torch.bfloat16, formats=BLOCK.formats))[0]


def state_of(recipe: Recipe = BLOCK) -> Fp8State:
    return Fp8State(recipe, kernels(), keep_weights=True)


def counted(x: torch.Tensor, quantized: QTensor) -> dict[str, float]:
    """The metrics of a single tensor without tiles that are not finite, over every element, in FP64."""
    format, found, exact = quantized.format, quantized.dequantize(torch.float64), x.double()
    r, c = format.tiles(*x.shape[-2:])
    high, wide = format.tile[0] or x.shape[-2], format.tile[1] or x.shape[-1]
    scale = quantized.scale.double()
    scales, clipped = [], 0
    for matrix, of_matrix in zip(exact.reshape(-1, *x.shape[-2:]), scale.reshape(-1, r, c), strict=True):
        for i in range(r):
            for j in range(c):
                tile = matrix[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                clipped += int((tile.abs() > of_matrix[i, j] * format.largest * (1 + 1e-6)).sum())
                if tile.any():
                    scales.append(float(of_matrix[i, j]))
    noise = float((exact - found).square().sum())
    return {
        "underflow": float(((found == 0) & (exact != 0)).double().mean()),
        "saturation": clipped / x.numel(),
        "amax": float(exact.abs().max()),
        "scale_spread": math.log2(max(scales) / min(scales)) if scales else 0.0,
        "snr_db": 10 * math.log10(float(exact.square().sum()) / noise) if noise else math.inf,
        "non_finite_tiles": 0.0,
    }


def watched(tensors: Mapping[str, list[tuple[str, torch.Tensor, QTensor]]]) -> Health:
    """A sample in which the module of each name saw the tensors given."""
    states = {name: state_of() for name in tensors}
    watch = Watch(states, 1, CPU)
    watch.begin(1)
    for name, seen in tensors.items():
        for kind, x, quantized in seen:
            observer = states[name].observer
            assert observer is not None
            observer.tensor(kind, x, quantized)
    health = watch.collect()
    assert health is not None
    return health


def spread_out(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers over many binades, so that some underflow, with zeros among them and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(10 * torch.randn(shape, generator=generator))
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    x[..., -1, :] = 0
    return x.to(dtype)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_metrics_are_those_of_every_element(format, dtype):
    for shape in [(40, 48), (1, 5), (33, 50), (3, 20, 30)]:
        x = spread_out(*shape, dtype=dtype)
        for given_scale in (None, torch.tensor(2.0**-6)):
            quantized = quantize(x, format, scale=given_scale)
            found = watched({"a": [("weight", x, quantized)]})["weight"]["a"]
            assert found.keys() == set(HEALTH_METRICS)
            assert found == pytest.approx(counted(x, quantized), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_plain_cases(provider):
    quantizer = choose(KernelsConfig(quantize=provider), Workload("cpu", torch.bfloat16, formats=BLOCK.formats))[0]
    ones = torch.ones(4, 32, dtype=torch.bfloat16)
    late = torch.zeros(4, 32, dtype=torch.bfloat16)
    late[:, 0], late[:, 1] = 448.0, 2.0**-11  # the second is below half the smallest number that goes with the first
    seen = {
        "exact": [("activation", ones, quantizer.quantize(ones, FORMATS["tiles"]))],
        "zero": [("activation", 0 * ones, quantizer.quantize(0 * ones, FORMATS["tiles"]))],
        "underflow": [("activation", late, quantizer.quantize(late, FORMATS["tiles"]))],
        "clipped": [("activation", late, quantizer.quantize(late, FORMATS["tiles"], scale=torch.tensor(0.5)))],
    }
    found = watched(seen)["activation"]
    nothing = dict.fromkeys(HEALTH_METRICS, 0.0) | {"snr_db": math.inf}
    assert found["exact"] == nothing | {"amax": 1.0}
    assert found["zero"] == nothing
    faulty = watched({"a": [("activation", 0 * ones, quantizer.quantize(ones, FORMATS["tiles"]))]})
    assert faulty["activation"]["a"]["snr_db"] == -math.inf
    assert found["underflow"] == pytest.approx(
        nothing | {"underflow": 1 / 32, "amax": 448.0, "snr_db": 20 * math.log10(448 * 2**11)}, rel=1e-6
    )
    assert found["clipped"]["saturation"] == 1 / 32
    assert found["clipped"]["snr_db"] == pytest.approx(20 * math.log10(2), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("world_of_one")
def test_tiles_that_are_not_finite_are_counted_and_spoil_nothing_else():
    x = spread_out(8, 32)
    broken = x.clone()
    broken[0, 0], broken[1, 20] = math.nan, -math.inf
    kept = x.clone()
    kept[0, :16] = kept[1, 16:] = 0
    found = watched({"a": [("gradient", broken, quantize(broken, FORMATS["tiles"]))]})["gradient"]["a"]
    expected = watched({"a": [("gradient", kept, quantize(kept, FORMATS["tiles"]))]})["gradient"]["a"]
    for share in ("underflow", "saturation"):
        expected[share] *= 256 / (256 - 32)
    assert found == pytest.approx(expected | {"amax": math.inf, "non_finite_tiles": 2.0})
    lost = torch.full((8, 16), math.nan, dtype=torch.bfloat16)
    found = watched({"a": [("gradient", lost, quantize(lost, FORMATS["tiles"]))]})["gradient"]["a"]
    assert found["non_finite_tiles"] == 8
    assert math.isnan(found["underflow"])


@pytest.mark.usefixtures("world_of_one")
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 40), name=st.sampled_from(sorted(FORMATS)), seed=st.integers(0, 99)
)
def test_any_shape(rows, columns, name, seed):
    x = spread_out(rows, columns, seed=seed)
    quantized = quantize(x, FORMATS[name])
    expected = counted(x, quantized)
    for kind in ("activation", "weight", "gradient"):
        found = watched({"a": [(kind, x, quantized)]})[kind]["a"]
        if expected["snr_db"] > 120:  # rounded nowhere but in the FP32 product of data and scale
            assert found["snr_db"] > 120
            found["snr_db"] = expected["snr_db"]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("shape", [(5000, 32), (16, 200, 32), (2000, 2, 32)], ids=str)
@pytest.mark.parametrize("name", ["tiles", "blocks", "tensor"])
def test_large_tensors_are_estimated_from_some_rows(shape, name):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x *= torch.exp2(torch.randn(shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert x.numel() > 8 * SAMPLED_ROWS * x.shape[-1]
    quantized = quantize(x, FORMATS[name])
    found, expected = watched({"a": [("weight", x, quantized)]})["weight"]["a"], counted(x, quantized)
    assert found["underflow"] == pytest.approx(expected["underflow"], rel=0.2, abs=0.001)
    assert found["snr_db"] == pytest.approx(expected["snr_db"], abs=1.0)
    x[..., -1, 7] = 2.0**14  # no row sampled holds it
    quantized = quantize(x, FORMATS[name])
    found, expected = watched({"a": [("weight", x, quantized)]})["weight"]["a"], counted(x, quantized)
    for exactly in ("amax", "scale_spread", "non_finite_tiles"):
        assert found[exactly] == pytest.approx(expected[exactly])


@pytest.mark.usefixtures("world_of_one")
def test_micro_batches_and_tensors_add_up_by_their_size():
    big, small = spread_out(60, 32), 2 * spread_out(10, 32, seed=1)
    parts = [("activation", x, quantize(x, FORMATS["tiles"])) for x in (big, small)]
    joined = torch.cat([big, small])
    apart = watched({"a": parts})["activation"]["a"]
    assert apart == pytest.approx(counted(joined, quantize(joined, FORMATS["tiles"])), rel=1e-4, abs=1e-6)


RECIPES = {
    "block": BLOCK,
    "mx": mx_recipe("mxfp8", E5M2),
    "current": tensor_recipe("fp8_tensor_current", "float", E5M2),
    "delayed": tensor_recipe("fp8_tensor_delayed", "ue8m0", E5M2, delayed=True),
}


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_layers_show_all_they_quantise_and_compute_the_same_under_watch(recipe):
    x, counts = spread_out(20, 32), torch.tensor([7, 0, 13])
    weights = {"dense": torch.randn(48, 32), "experts": torch.randn(3, 48, 32), "down": torch.randn(16, 24)}

    def run(states: dict[str, Fp8State]) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_(), *(w.bfloat16().requires_grad_() for w in weights.values())]
        dense = states["dense"].linear(inputs[0], inputs[1])
        grouped = states["experts"].grouped(inputs[0], inputs[2], counts)
        (states["down"].swiglu_linear(dense + grouped, inputs[3]).float() * torch.arange(16)).sum().backward()
        return [dense, grouped, *(tensor.grad for tensor in inputs)]

    states = {name: state_of(recipe) for name in (*weights, "unused")}
    plain, watch = run(states), Watch(states, 10, CPU)
    watch.begin(9)
    assert watch.collect() is None
    for state in states.values():
        state.amax_K = torch.zeros(3) if recipe.delayed else None
    watch.begin(10)  # the weights are still kept from the step before, and are seen all the same
    for unwatched, seen in zip(plain, run(states), strict=True):
        assert torch.equal(unwatched, seen)
    health = watch.collect()
    assert {kind: list(of_modules) for kind, of_modules in health.items()} == {
        kind: list(weights) for kind in ("activation", "weight", "gradient")
    }
    expected = counted(weights["experts"].bfloat16(), quantize(weights["experts"].bfloat16(), recipe.weight))
    if recipe.delayed:
        expected["scale_spread"] = 0.0  # one for all experts
    assert health["weight"]["experts"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert health["activation"]["dense"]["amax"] == float(x.abs().max())
    assert 15 < health["activation"]["down"]["snr_db"] < 60
    assert all(state.observer is None for state in states.values())
    assert watch.collect() is None, "a sample is given once"


def sample_steps(every: int) -> list[int]:
    """The steps of ten that are watched, where there is a module and where there is none."""
    watches = [Watch({"a": state_of()}, every, CPU), Watch({}, every, CPU)]
    found: list[list[int]] = [[], []]
    for steps, watch in zip(found, watches, strict=True):
        for step in range(1, 11):
            watch.begin(step)
            if watch.collect() is not None:
                steps.append(step)
    assert found[1] == []
    return found[0]


@pytest.mark.usefixtures("world_of_one")
def test_steps_that_are_watched():
    assert [sample_steps(every) for every in (0, 1, 4, 11)] == [[], list(range(1, 11)), [4, 8], []]


def watch_some(parts: list[torch.Tensor]) -> Health | None:
    """A sample in which each rank saw its part, `late` only the last one, and `never` nobody."""
    states = {name: state_of() for name in ("all", "late", "never")}
    watch = Watch(states, 1, CPU)
    watch.begin(1)
    rank, x = dist.get_rank(), parts[dist.get_rank()]
    states["all"].observer.tensor("gradient", x, quantize(x, FORMATS["tiles"]))
    if rank == len(parts) - 1:
        states["late"].observer.tensor("weight", x, quantize(x, FORMATS["tiles"]))
    nothing = x[:0]
    states["never"].observer.tensor("activation", nothing, quantize(nothing, FORMATS["tiles"]))
    return watch.collect()


def test_ranks_add_up_whatever_each_has_seen(ranks):
    parts = [spread_out(9, 32), 2.0**9 * spread_out(30, 32, seed=1)]
    samples = ranks(2).run(watch_some, parts)
    assert samples[0] == samples[1]
    everything = torch.cat(parts)
    expected = counted(everything, quantize(everything, FORMATS["tiles"]))
    assert samples[0]["gradient"] == {"all": pytest.approx(expected, rel=1e-4, abs=1e-6)}
    assert samples[0]["weight"].keys() == {"late"}
    assert samples[0]["activation"] == {}
