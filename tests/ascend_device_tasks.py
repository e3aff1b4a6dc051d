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


SIGNALS = 40
QUEUED = 20
"""Pieces of work that a stream has before the one that counts, each after a pause of chance."""


def streams() -> dict[str, Any]:
    """What a side stream computes, read before it has been waited for and after; times of events."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    there = torch.zeros(1 << 16, device="npu")
    npu.synchronize()
    side, start, event = npu.Stream(), npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    with npu.stream(side):
        start.record()
        for _ in range(QUEUED):
            there += 1
        event.record()
    complete_at_once = event.query()
    early = there.sum()
    npu.current_stream().wait_event(event)
    late = there.sum()
    npu.synchronize()
    totals = {"early": early.item(), "late": late.item(), "complete at once": complete_at_once}
    return {**totals, "complete": event.query(), "elapsed_ms": start.elapsed_time(event)}


def recorded_twice() -> float:
    """What a stream reads that waits for an event which another, quicker one has recorded since."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    slow, quick, waiting = npu.Stream(), npu.Stream(), npu.Stream()
    there, event = torch.zeros(4, device="npu"), npu.Event()
    npu.synchronize()
    with npu.stream(slow):
        for _ in range(QUEUED):
            there += 1
        event.record()
    with npu.stream(waiting):
        event.wait()
        seen = there.clone()
    event.record(quick)
    npu.synchronize()
    return float(seen[0])


def given_away() -> dict[str, float]:
    """What a side stream reads from memory that its owner frees: with nothing said, and with `record_stream`."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    side, seen = npu.Stream(), {}
    for said in (False, True):
        lent = torch.ones(1 << 20, device="npu")
        npu.synchronize()
        with npu.stream(side):
            busy = torch.zeros(4, device="npu")
            for _ in range(QUEUED):
                busy += 1
            copy = lent.clone()
        if said:
            lent.record_stream(side)
        del lent
        taken = torch.full((1 << 20,), 2.0, device="npu")
        npu.synchronize()
        seen["recorded" if said else "not recorded"] = float(copy.mean())
        del taken, copy
    return seen


def copies() -> dict[str, list[float]]:
    """Numbers on the host: of copies that do not wait, read at once and later, to and from page-locked memory; of ones
    that do, whose memory on the host is changed after the call."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    there, pinned = torch.zeros(4, device="npu"), torch.full((4,), 7.0).pin_memory()
    npu.synchronize()
    for _ in range(QUEUED):
        there += 1
    to_host = there.to("cpu", non_blocking=True)
    seen = {"at once": [float(to_host.isnan().any() or to_host[0])]}
    npu.synchronize()
    seen["later"] = [float(to_host[0])]
    for _ in range(QUEUED):
        there += 1
    from_locked = pinned.to("npu", non_blocking=True)
    pinned.fill_(8.0)
    pageable = torch.full((4,), 7.0)
    from_pageable = pageable.to("npu", non_blocking=True)
    pageable.fill_(8.0)
    seen["changed"] = [float(from_locked[0]), float(from_pageable[0]), float(there.cpu()[0])]
    return seen


def waits_with_pythons_lock() -> dict[str, Any]:
    """Calls that wait for a stream while they hold Python's lock, which a kernel on the stream needs."""
    import torch_npu

    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    x, gamma, index = torch.randn(64, 16, device="npu"), torch.ones(16, device="npu"), torch.tensor(1, device="npu")

    def busy() -> torch.Tensor:
        for _ in range(QUEUED):
            y = torch_npu.npu_rms_norm(x, gamma, 1e-6)[0]
        return y

    found: dict[str, Any] = {"row": (busy()[index] == busy()[1]).all().item()}
    busy()
    npu.empty_cache()
    start, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    start.record()
    busy()
    end.record()
    found["elapsed"] = start.elapsed_time(end) > 0
    # More than is left: the allocator frees what it has kept.
    held = [torch.empty(24 << 20, dtype=torch.uint8, device="npu") for _ in range(3)]
    held.clear()
    grown = torch.empty(0, dtype=torch.uint8, device="npu")
    busy()
    grown.untyped_storage().resize_(80 << 20)
    return found


def two_devices() -> list[float]:
    """Sums on one device while another is current, and copies between the two."""
    npu, found = torch.npu, []  # type: ignore[attr-defined]
    npu.set_device(0)
    y, z = torch.ones(4, device="npu:1"), torch.ones(4, device="npu:0")
    for _ in range(QUEUED):
        y += 1
    with npu.device(1):
        found.append(float(y[0]))
        for _ in range(QUEUED):
            y += 1
    found.append(float(y.cpu()[0]))
    for _ in range(QUEUED):
        z += 1
    with npu.device(1):
        found.append(float(z.to("npu:1")[0]))
    return found


def odd_calls() -> dict[str, Any]:
    """A list that mixes NPU and host, statistics of norms, another default dtype: each twice, as a plan is kept."""
    npu, found = torch.npu, {}  # type: ignore[attr-defined]
    npu.set_device(0)
    for turn in ("first", "again"):
        mixed = [torch.zeros((), device="npu"), torch.zeros(())]
        torch._foreach_add_(mixed, 1.0)
        found[f"mixed {turn}"] = [float(tensor) for tensor in mixed]
        x = torch.randn(4, 8, dtype=torch.bfloat16, device="npu", requires_grad=True)
        F.layer_norm(x, (8,)).square().sum().backward()
        assert x.grad is not None
        found[f"norm {turn}"] = bool(x.grad.isfinite().all())
        halves = torch.arange(3, device="npu") / 2
        torch.set_default_dtype(torch.float64)
        wide = torch.arange(3, device="npu") / 2
        npu.synchronize()
        torch.set_default_dtype(torch.float32)
        found[f"dtypes {turn}"] = [str(halves.dtype), str(wide.dtype), wide.tolist()]
    return found


def signals() -> int:
    """How many of the exceptions that a signal raises, at any time, come to the caller."""
    import signal

    def raise_it(*_: object) -> None:
        raise KeyboardInterrupt

    npu, seen = torch.npu, 0  # type: ignore[attr-defined]
    npu.set_device(0)
    signal.signal(signal.SIGALRM, raise_it)
    x = torch.ones(4, device="npu")
    for number in range(SIGNALS):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0001 * (number % 10))
            # A plan for each size, by kernels in Python.
            for size in range(10_000):
                x.clamp(0, 1)[:1].expand(size % 97 + 1).where(x[0] > 0, 2.0).isfinite()
        except KeyboardInterrupt:
            seen += 1
    return seen


def late_error() -> list[str]:
    """An index out of range: where it is said, and by whom."""
    npu = torch.npu  # type: ignore[attr-defined]
    npu.set_device(0)
    told = []
    rows, out_of_range = torch.ones(2, 4, device="npu"), torch.tensor([7], device="npu")
    for what in (lambda: rows.index_select(0, out_of_range), npu.synchronize):
        try:
            what()
            told.append("")
        except (RuntimeError, IndexError) as error:
            told.append(str(error))
    return told


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
