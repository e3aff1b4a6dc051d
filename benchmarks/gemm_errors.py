"""What FP8 costs each product: relative error against FP64 of the operands, for every recipe, on Gaussian operands.

Forward, input gradient and weight gradient of a dense layer, and of one behind a SwiGLU whose input is kept in FP8.

    .venv/bin/python benchmarks/gemm_errors.py
"""

import torch
import torch.nn.functional as F

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.qtensor import E4M3, E5M2
from octofold.kernels.recipe import block_recipe, mx_recipe, tensor_recipe
from octofold.kernels.registry import Workload, choose

ROWS, WIDTH, OUTPUTS = 1024, 768, 512
RECIPES = {
    "fp8_block, powers of two": block_recipe("fp8_block", 128, "ue8m0", E4M3),
    "fp8_block, FP32 scales": block_recipe("fp8_block", 128, "float", E4M3),
    "fp8_block, inputs kept in BF16": block_recipe("fp8_block", 128, "ue8m0", E4M3, saves_fp8=False),
    "fp8_block, gradients in E5M2": block_recipe("fp8_block", 128, "ue8m0", E5M2),
    "fp8_block, FP8 only kept": block_recipe("fp8_block", 128, "ue8m0", E4M3, arithmetic="storage"),
    "mxfp8": mx_recipe("mxfp8", E4M3),
    "fp8_tensor, powers of two": tensor_recipe("fp8_tensor_current", "ue8m0", E4M3),
    "fp8_tensor, FP32 scales": tensor_recipe("fp8_tensor_current", "float", E4M3),
}


def products(recipe: str, behind_swiglu: bool) -> list[float]:
    """Relative errors of the three products."""
    chosen = RECIPES[recipe]
    kernels, _ = choose(KernelsConfig(), Workload("cpu", torch.bfloat16, formats=chosen.formats))
    state = Fp8State(chosen, kernels, keep_weights=False)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x = normal(ROWS, 2 * WIDTH if behind_swiglu else WIDTH).requires_grad_()
    weight, grad = normal(OUTPUTS, WIDTH).requires_grad_(), normal(ROWS, OUTPUTS)
    y = (state.swiglu_linear if behind_swiglu else state.linear)(x, weight)
    found = (y.detach(), *torch.autograd.grad(y, (x, weight), grad))
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    active = x64
    if behind_swiglu:
        gate, up = x64.chunk(2, dim=-1)
        active = F.silu(gate) * up
    y64 = active @ weight64.t()
    exact = (y64.detach(), *torch.autograd.grad(y64, (x64, weight64), grad.double()))
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


def main() -> None:
    """Print one line a recipe."""
    print(f"relative error against FP64, {ROWS} rows, {WIDTH} to {OUTPUTS}; right: behind a SwiGLU")
    print(f"{'':32} {'forward':>8} {'grad x':>8} {'grad w':>8}   {'forward':>8} {'grad x':>8} {'grad w':>8}")
    for name in RECIPES:
        plain, behind = (products(name, behind_swiglu) for behind_swiglu in (False, True))
        print(f"{name:32} {' '.join(f'{e:8.2%}' for e in plain)}   {' '.join(f'{e:8.2%}' for e in behind)}")


if __name__ == "__main__":
    main()
