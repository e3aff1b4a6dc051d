"""Which providers of FP8 ops are tested in which formats, and on which matrices. R rows, C columns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from octofold.backends.dotted import load_dotted
from octofold.kernels.qtensor import E4M3, E5M2, Format
from octofold.kernels.registry import PROVIDERS, Workload


def why_not(op: str, provider: str, *formats: Format, accumulation: str = "fp32") -> str | None:
    """Why a provider of `op` cannot serve a CPU so."""
    why_unsupported = load_dotted(f"{PROVIDERS[op][provider]}:why_unsupported", "test")
    assert callable(why_unsupported)
    workload = Workload("cpu", torch.bfloat16, formats=formats, accumulation=accumulation)
    reason: str | None = why_unsupported(workload)
    return reason


def serving(op: str, *formats: Format) -> list[str]:
    """The providers of `op` that take these formats on a CPU."""
    return [provider for provider in PROVIDERS[op] if why_not(op, provider, *formats) is None]


def cases(op: str, tiles: list[tuple[int, int]]) -> list[Any]:
    """Every provider of `op` with every format over these tiles."""
    formats = [Format(t, s, d) for t in tiles for s in ("ue8m0", "float") for d in (E4M3, E5M2)]
    return [pytest.param(p, f, id=f"{p}-{described(f)}") for f in formats for p in serving(op, f)]


def described(format: Format) -> str:
    dtype = "e4m3" if format.dtype == E4M3 else "e5m2"
    return f"{format.tile[0]}x{format.tile[1]}-{format.scale}-{dtype}"


def implementation(op: str, provider: str) -> Callable[..., Any]:
    function = load_dotted(f"{PROVIDERS[op][provider]}:{op}", "test")
    assert callable(function)
    return function


def extents(tile: tuple[int, int]) -> tuple[int, int]:
    """A shape of two whole tiles and a part of one each way."""
    rows, columns = (2 * length + 5 if length > 1 else 5 if length else 37 for length in tile)
    return rows, columns


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """FP32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_some(x: np.ndarray, numbers: list[float]) -> np.ndarray:
    """x with each of the numbers somewhere."""
    places = np.random.default_rng(1).choice(x.size, len(numbers), replace=False)
    x.reshape(-1)[places] = numbers
    return x
