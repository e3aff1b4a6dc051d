"""What a process does on one device of the software NPU. Results are what JSON can hold."""

import os
from ctypes import CDLL, byref, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octofold.backends.software_npu.activate import FOLDER
from octofold.backends.software_npu.build import ACL

STEPS = 10


def _losses(device: str) -> list[float]:
    """Of a small network with the operators that a model has, trained with clipping and AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 16))
    tokens, labels = torch.randint(0, 16, (128,)), torch.randint(0, 16, (128,))
    model, tokens, labels = model.to(device), tokens.to(device), labels.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(tokens), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses


def train() -> list[list[float]]:
    """Losses on the NPU and on the CPU."""
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    return [_losses("npu"), _losses("cpu")]


def device() -> dict[str, Any]:
    """What torch_npu finds, and how copies, views and fresh memory look."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(1)
    values = torch.arange(6.0).view(2, 3)
    there = values.to("npu")
    turned = there.t()
    turned[0] += 10.0
    # Larger than any block that torch_npu has had back.
    fresh = torch.empty(1 << 23, dtype=torch.uint8, device="npu")
    before = npu.memory_allocated()
    return {
        "name": npu.get_device_name(0),
        "devices": npu.device_count(),
        "device": str(there.device),
        "back": there.cpu().tolist(),
        "out": torch.mul(there, 2, out=torch.empty(0, device="npu")).cpu().tolist(),
        "poison": fresh.unique().tolist(),
        "held": before >= fresh.nbytes,
        "fp8": there.to(torch.float8_e4m3fn).float().cpu().tolist(),
    }


def out_of_memory() -> list[str]:
    """The error of a tensor that does not fit, and whether one that does comes after it."""
    try:
        torch.empty(100 << 20, dtype=torch.uint8, device="npu")
    except torch.OutOfMemoryError as error:
        return [type(error).__name__, str(error), str(torch.zeros(4, device="npu").tolist())]
    return []


def random_state() -> dict[str, bool]:
    """How the NPU's generator behaves, and that the CPU's stays out of it."""
    npu = torch.npu  # type: ignore[attr-defined]
    torch.manual_seed(1)
    cpu_state = torch.get_rng_state()
    npu.manual_seed(3)
    first, second = torch.rand(64, device="npu"), torch.rand(64, device="npu")
    state = npu.get_rng_state()
    third = torch.randn(64, device="npu")
    permuted = torch.randperm(64, device="npu")
    npu.set_rng_state(state)
    again = torch.randn(64, device="npu")
    npu.manual_seed(3)
    return {
        "a seed repeats": torch.equal(torch.rand(64, device="npu"), first),
        "numbers go on": not torch.equal(first, second),
        "a state repeats": torch.equal(third, again),
        "a permutation": permuted.sort().values.tolist() == list(range(64)),
        "the CPU's state is untouched": torch.equal(torch.get_rng_state(), cpu_state),
    }


QUEUED = 20
"""Pieces of work that a stream has before the one that counts, each after a pause of chance."""


def streams() -> dict[str, Any]:
    """What CANN writes on a side stream, read before it has been waited for and after; times of events.

    By CANN's own call, since torch's operators are computed in the call, whatever their stream.
    """
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    there, scratch = (torch.zeros(1 << 16, dtype=torch.uint8, device="npu") for _ in range(2))
    npu.synchronize()
    side, start, event = npu.Stream(), npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    with npu.stream(side):
        start.record()
        for tensor in [*([scratch] * QUEUED), there]:
            _acl().aclrtMemsetAsync(*_place(tensor), 1, c_size_t(tensor.nbytes), c_void_p(side.npu_stream))
        event.record()
    early = there.sum()
    npu.current_stream().wait_event(event)
    late = there.sum()
    npu.synchronize()
    totals = {"early": early.item(), "late": late.item()}
    return {**totals, "complete": event.query(), "elapsed_ms": start.elapsed_time(event)}


def _acl() -> CDLL:
    return CDLL(str(Path(os.environ[FOLDER]) / ACL))


def _place(tensor: torch.Tensor) -> tuple[c_void_p, c_size_t]:
    return c_void_p(tensor.data_ptr()), c_size_t(tensor.nbytes)


def freed() -> list[int]:
    """Results of CANN's own calls that free memory for which a stream has work, and the stream's state after that."""
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    acl, bytes_ = _acl(), c_size_t(1 << 20)
    stream, memory, state = c_void_p(), c_void_p(), c_int(-1)
    results = [acl.aclrtSetDevice(0), acl.aclrtCreateStream(byref(stream))]
    results.append(acl.aclrtMalloc(byref(memory), bytes_, 0))
    results += [acl.aclrtMemsetAsync(memory, bytes_, 0, bytes_, stream) for _ in range(QUEUED)]
    results += [acl.aclrtFree(memory), acl.aclrtStreamQuery(stream, byref(state))]
    assert set(results) == {0}, results
    return [state.value]
