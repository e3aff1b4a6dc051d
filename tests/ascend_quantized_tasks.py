"""The FP8 providers of kernels/npu/ on the software NPU beside the reference. Results are JSON, by case."""

from typing import Any

import torch
from ascend_hccl_tasks import group
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from octofold.kernels import bytes_scaled_mm
from octofold.kernels.config import KernelsConfig
from octofold.kernels.npu import quantize as npu_quantize
from octofold.kernels.npu import scaled_mm as npu_scaled_mm
from octofold.kernels.qtensor import E4M3, E5M2, PUBLISHED_LEAST_AMAX, Format, QTensor
from octofold.kernels.reference import quantize as reference
from octofold.kernels.reference import scaled_mm as reference_mm
from octofold.kernels.registry import FP8_OPS, Workload, choose
from octofold.parallel.transport import Route, Traffic, exchange

SHAPES = [(1, 1), (3, 32), (5, 33), (2, 128), (7, 300), (130, 161)]
TILES = [(1, 32), (1, 128), (128, 128), (32, 32)]


def _formats() -> list[Format]:
    plain = [Format(tile, dtype=dtype) for tile in TILES for dtype in (E4M3, E5M2)]
    return [*plain, Format((1, 128), least_amax=PUBLISHED_LEAST_AMAX)]


def _matrix(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, the first of zeros."""
    x = torch.randn(shape) * 2.0 ** torch.linspace(-20, 10, shape[-2])[:, None]
    x[..., 0, :] = 0
    return x.to(dtype)


def _differ(found: QTensor, expected: QTensor) -> int:
    """Codes and scales that differ; the scale of a tile of zeros is free."""
    assert found.format == expected.format
    codes = found.data.cpu().view(torch.uint8) != expected.data.view(torch.uint8)
    amax = reference.amax_of(expected.data.float(), expected.format)
    scales = (found.scale.cpu().view(torch.uint8) != expected.scale.view(torch.uint8)) & (amax > 0)
    return int(codes.sum() + scales.sum())


def quantised() -> dict[str, int]:
    """Numbers that differ from the reference's."""
    torch.manual_seed(0)
    found = {}
    for format in _formats():
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                x, name = _matrix(shape, dtype), f"{format.tile} {format.dtype} {dtype} {shape}"
                for turned in (False, True):
                    tiles = format.transposed if turned else format
                    there = npu_quantize.quantize(x.to("npu"), tiles, transpose=turned)
                    found[f"{name} {turned}"] = _differ(there, reference.quantize(x, tiles, transpose=turned))
            if format.tile[0] == 1:
                counts = torch.tensor([3, 0, 70, 1])
                x = _matrix((74, 40), dtype)
                there = npu_quantize.quantize_groups(x.to("npu"), counts.to("npu"), format)
                found[f"groups {format} {dtype}"] = _differ(there, reference.quantize_groups(x, counts, format))
    return found


def products() -> dict[str, float]:
    """Relative errors of products with FP32 results, and of those that the bytes provider forms."""
    torch.manual_seed(0)
    found = {}
    pairs = [(Format((1, 32)), Format((1, 32))), (Format((1, 128), dtype=E5M2), Format((128, 128)))]
    for left, right in pairs:
        for m, n, k in [(1, 1, 1), (5, 7, 33), (130, 3, 64), (4, 140, 300)]:
            a, b = (reference.quantize(torch.randn(rows, k), f) for rows, f in ((m, left), (n, right)))
            expected = reference_mm.scaled_mm(a, b, out_dtype=torch.float32)
            for name, module in (("npu", npu_scaled_mm), ("bytes", bytes_scaled_mm)):
                out = module.scaled_mm(_there(a), _there(b), out_dtype=torch.float32)
                found[f"{name} {left.tile} {m, n, k}"] = float((out.cpu() - expected).norm() / expected.norm())
            counts = torch.tensor([m, 0, 2])
            a = reference.quantize(torch.randn(m + 2, k), left)
            b = reference.quantize(torch.randn(3, n, k), right)
            expected = reference_mm.scaled_grouped_mm(a, b, counts, out_dtype=torch.float32)
            out = npu_scaled_mm.scaled_grouped_mm(_there(a), _there(b), counts.to("npu"), out_dtype=torch.float32)
            found[f"grouped {left.tile} {m, n, k}"] = float((out.cpu() - expected).norm() / expected.norm())
    return found | inner_products()


def inner_products() -> dict[str, float]:
    """Relative errors of experts' weight gradients: empty groups, one row, rows that fill no tile."""
    found = {}
    for wide in (32, 128):
        for counts, f, d in [([0, 1, 40, 0], 5, 3), ([7], 1, 1), ([130, 64, 0, 3], 96, 40)]:
            counts_E = torch.tensor(counts)
            # Wider tiles are of E5M2, whose numbers reach far below and above.
            format = Format((1, wide), dtype=E4M3 if wide == 32 else E5M2)
            a, b = (
                reference.quantize_groups(torch.randn(sum(counts), width) * 10.0 ** (width % 7 - 5), counts_E, format)
                for width in (f, d)
            )
            for dtype in (torch.float32, torch.bfloat16):
                expected = reference_mm.scaled_grouped_inner_mm(a, b, counts_E, out_dtype=dtype).float()
                out = npu_scaled_mm.scaled_grouped_inner_mm(_there(a), _there(b), counts_E.to("npu"), out_dtype=dtype)
                assert out.dtype == dtype
                kind = "inner" if dtype == torch.float32 else "rounded"
                error = (out.cpu().float() - expected).norm() / expected.norm()
                found[f"{kind} {format.dtype} {counts} {f} {d}"] = float(error)
    return found


def _there(x: QTensor) -> QTensor:
    return QTensor(x.data.to("npu"), x.scale.to("npu"), x.format)


def fakes() -> dict[str, Any]:
    """Shapes and dtypes by torch_npu's meta kernels."""
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    torch.npu.current_stream()  # type: ignore[attr-defined]
    with FakeTensorMode():
        x, w = torch.empty(70, 300, device="npu").bfloat16(), torch.empty(3, 96, 300, device="npu").bfloat16()
        counts = torch.empty(3, dtype=torch.int64, device="npu")
        row = Format((1, 128))
        a = npu_quantize.quantize(x, row)
        b = QTensor(w.to(E4M3), torch.empty(3, 1, 3, device="npu").to(torch.float8_e8m0fnu), Format((128, 128)))
        one = QTensor(b.data[0], b.scale[0], b.format)
        results = {
            "data": a.data,
            "scale": a.scale,
            "product": npu_scaled_mm.scaled_mm(a, one),
            "grouped": npu_scaled_mm.scaled_grouped_mm(a, b, counts, out_dtype=torch.float32),
            "inner": npu_scaled_mm.scaled_grouped_inner_mm(
                *(npu_quantize.quantize_groups(rows, counts, row) for rows in (x, x[:, :96])), counts
            ),
        }
        return {name: [list(out.shape), str(out.dtype)] for name, out in results.items()}


def refused() -> list[str]:
    """What torch_npu's meta kernels say of arguments that no provider passes."""
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
    q, scale = torch.empty(4, 64, dtype=E4M3, device="meta"), torch.empty(4, 1, 2, dtype=torch.uint8, device="meta")
    options = {"pertoken_scale": scale, "output_dtype": 15, "pertoken_scale_dtype": 293, "group_sizes": [1, 1, 32]}
    npu, told = torch.ops.npu, []
    for call in (
        lambda: npu.npu_dynamic_mx_quant(x, block_size=48, dst_type=24),
        lambda: npu.npu_quant_matmul(q, q.t(), scale.transpose(0, 1), scale_dtype=24, **options),
        lambda: npu.npu_quant_matmul(q, q, scale.transpose(0, 1), scale_dtype=293, **options),
    ):
        try:
            told.append(str(call().shape))
        except RuntimeError as error:
            told.append(str(error))
    return told


def chosen() -> dict[str, str]:
    """Provider of each FP8 op on this chip."""
    workload = Workload("npu", torch.bfloat16, formats=(Format((1, 32)),))
    return {c.op: c.provider for c in choose(KernelsConfig(), workload)[1] if c.op in [*FP8_OPS, "dequantize"]}


def dispatched() -> list[list[float]]:
    """Rows in FP8 to the other rank and back, and their gradients."""
    with group() as (rank, ranks, device):
        kernels = choose(KernelsConfig(), Workload("npu", torch.bfloat16))[0]
        format, counts = Format((1, 128)), [1 + rank] * ranks
        route = Route(torch.distributed.group.WORLD, counts, [1 + sender for sender in range(ranks)])  # type: ignore[arg-type]
        rows = _tokens(rank, ranks).to(device).requires_grad_()
        arrived = exchange(rows, route, kernels, Traffic(), purpose="dispatch", forward=format, backward=format)
        arrived.backward(torch.ones_like(arrived))
        # Rank s sends 1 + s rows to each.
        sent = [_tokens(sender, ranks)[(1 + sender) * rank :][: 1 + sender] for sender in range(ranks)]
        expected = torch.cat([reference.quantize(rows, format).dequantize(torch.bfloat16) for rows in sent])
        assert rows.grad is not None
        error = (arrived.detach().cpu() - expected).abs().max()
        return [[float(error)], [float(rows.grad.min()), float(rows.grad.max())]]


def _tokens(rank: int, ranks: int) -> Tensor:
    """Of a rank that sends 1 + rank rows to each."""
    return (torch.arange((1 + rank) * ranks * 130.0).view(-1, 130) / 7 + 100 * rank).bfloat16()
