"""What ranks do in an HCCL group on the software NPU: the collectives that Octofold uses. Results are JSON."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from octofold.backends.ascend import AscendBackend
from octofold.backends.config import BackendConfig
from octofold.backends.determinism import set_deterministic
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.software_npu.activate import FOLDER
from octofold.backends.software_npu.build import HCCL


@contextmanager
def group(config: BackendConfig = BackendConfig()) -> Iterator[tuple[int, int, torch.device]]:  # noqa: B008 - frozen
    """Rank, ranks and device in the default group."""
    info = RankInfo.from_environment()
    backend = AscendBackend()
    with joined(backend, config, info):
        yield info.rank, info.world_size, backend.device(info.local_rank)


def settings() -> dict[str, Any]:
    """What HCCL was told of the default group, of its twin for sends, and of a subgroup; with what people are shown."""
    set_deterministic(True, AscendBackend())
    with group(BackendConfig(timeout_s=90.5, hccl_buffer_mb=64)) as (rank, _, device):
        x = torch.ones(1, device=device)
        dist.all_reduce(x)
        half = dist.new_group([0, 1])
        dist.all_reduce(x, group=half)
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
        told = CDLL(str(Path(os.environ[FOLDER]) / HCCL)).software_npu_groups
        told.restype = c_char_p
        world: Any = dist.group.WORLD
        watchdog_s = world._get_backend(device).options._timeout.total_seconds()
        groups = [list(map(int, line.split(" ")[:4])) for line in told().decode().splitlines()]
        return {"groups": groups, "watchdog_s": watchdog_s, "shown": AscendBackend().group_settings()}


def groups_of_a_table() -> dict[str, Any]:
    """Names that HCCL has for the default group and for a part of it, and sums over both."""
    with group() as (rank, ranks, device):
        halves = [dist.new_group(list(range(part, ranks, 2))) for part in range(2)]
        found: dict[str, Any] = {}
        for name, members in {"world": dist.group.WORLD, "half": halves[rank % 2]}.items():
            x = torch.full((3,), rank + 1.0, device=device)
            dist.all_reduce(x, group=members)
            backend: Any = members._get_backend(device)  # type: ignore[union-attr]
            found[name] = [backend.get_hccl_comm_name(rank), x.tolist()]
        return found


def collectives() -> dict[str, Any]:
    """Each collective once, on small tensors; whole numbers, exact in every dtype."""
    with group() as (rank, ranks, device):
        found: dict[str, Any] = {"group": type(dist.group.WORLD._get_backend(device)).__name__}  # type: ignore[union-attr]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            x = torch.arange(5, device=device).to(dtype) + rank
            dist.all_reduce(x)
            found[f"all_reduce {dtype}"] = x.tolist()
        x = torch.full((3,), float(rank), device=device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        found["max"] = x.tolist()
        x = torch.empty(2 * ranks, device=device)
        dist.all_gather_into_tensor(x, torch.full((2,), float(rank), device=device))
        found["all_gather"] = x.tolist()
        x = torch.empty(2, device=device)
        dist.reduce_scatter_tensor(x, torch.arange(2.0 * ranks, device=device))
        found["reduce_scatter"] = x.tolist()
        x = torch.full((4,), float(rank), device=device)
        dist.broadcast(x, src=ranks - 1)
        found["broadcast"] = x.tolist()
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8):
            found[f"all_to_all {dtype}"] = _uneven(rank, ranks, device, dtype)
        after, before = (rank + 1) % ranks, (rank - 1) % ranks
        x, sent = torch.empty(2, device=device), torch.full((2,), float(rank), device=device)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, x, before)])
        for work in works:
            work.wait()
        found["ring"] = x.tolist()
        if rank == 0:
            dist.send(sent + 7, 1)
        elif rank == 1:
            dist.recv(x, 0)
            found["received"] = x.tolist()
        halves = [dist.new_group(list(range(part, ranks, 2))) for part in range(2)]
        x = torch.ones(1, device=device) * rank
        dist.all_reduce(x, group=halves[rank % 2])
        found["subgroup"] = x.tolist()
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, {"rank": rank})
        found["objects"] = told
        dist.barrier()
        return found


def _uneven(rank: int, ranks: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """From rank i to rank j travel (i + j) % 3 elements, 4 i + j each, which E4M3 holds too; some are none."""
    counts = [(rank + other) % 3 for other in range(ranks)]
    sent = torch.cat([torch.full((count,), 4.0 * rank + other) for other, count in enumerate(counts)])
    received = torch.empty(sum(counts), device=device, dtype=dtype)
    dist.all_to_all_single(received, sent.to(device).to(dtype), counts, counts)
    return received.float().tolist()


def _caught(what: Callable[[torch.device], Any]) -> str:
    """What the ranks are told when the function has run and the device is waited for; "" for nothing."""
    with group() as (_, _, device):
        dist.all_reduce(torch.ones(4, device=device))
        return _caught_here(what)


def _caught_here(what: Callable[[torch.device], Any]) -> str:
    """The same, in a group."""
    torch.npu.synchronize()  # type: ignore[attr-defined]
    try:
        what(AscendBackend().device(int(os.environ["LOCAL_RANK"])))
        torch.npu.synchronize()  # type: ignore[attr-defined]
    except RuntimeError as error:
        # The group is broken, and so would be leaving it in order.
        return _leave(str(error))
    return _leave("")


def _leave(told: str) -> str:
    import json
    import sys

    print("RESULT " + json.dumps(told), flush=True)
    sys.stderr.flush()
    os._exit(0)


def other_size() -> str:
    """Rank 1 sums fewer elements."""
    return _caught(lambda device: dist.all_reduce(torch.ones(3 if dist.get_rank() == 1 else 4, device=device)))


def other_dtype() -> str:
    """Rank 1 sums integers of the same size."""
    dtypes = {1: torch.int32}
    return _caught(
        lambda device: dist.all_reduce(torch.ones(4, device=device, dtype=dtypes.get(dist.get_rank(), torch.float32)))
    )


def other_order() -> str:
    """Rank 1 broadcasts first and sums then; the others the other way round."""

    def what(device: torch.device) -> None:
        x = torch.ones(4, device=device)
        calls = [lambda: dist.all_reduce(x), lambda: dist.broadcast(x, src=1)]
        for call in reversed(calls) if dist.get_rank() == 1 else calls:
            call()

    return _caught(what)


def other_root() -> str:
    """Each rank broadcasts what it has itself."""
    return _caught(lambda device: dist.broadcast(torch.ones(4, device=device), src=dist.get_rank()))


def other_kind() -> str:
    """Rank 0 gives to rank 1, which gives to rank 0: neither expects anything."""

    def what(device: torch.device) -> None:
        x = torch.ones(4, device=device)
        dist.reduce(x, dst=0) if dist.get_rank() == 1 else dist.broadcast(x, src=0)

    return _caught(what)


def killed_peer() -> str:
    """Rank 1 is killed while the others wait for it."""

    def what(device: torch.device) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(4, device=device))

    return _caught(what)


def absent_peer() -> str:
    """Rank 1 does something else for longer than the others wait."""
    import time

    def what(device: torch.device) -> None:
        if dist.get_rank() == 1:
            time.sleep(6)
        else:
            dist.all_reduce(torch.ones(4, device=device))

    return _caught(what)


def stopped_peer() -> str:
    """Rank 1 is stopped before it takes what fills every buffer between the ranks. Rank 0 lets it go on to its end."""
    pids: list[Any] = [None, None]

    def what(device: torch.device) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        try:
            dist.all_reduce(torch.ones(4 << 20, device=device))
        finally:
            os.kill(pids[1], signal.SIGCONT)

    with group():
        dist.all_gather_object(pids, os.getpid())
        return _caught_here(what)


def absent_from_group() -> str:
    """Rank 1 never makes a group that the others use."""
    import time

    with group() as (rank, ranks, device):
        x = torch.ones(4, device=device)
        dist.all_reduce(x)
        part = dist.new_group(list(range(ranks)))

        def what(device: torch.device) -> None:
            if rank == 1:
                time.sleep(10)
            else:
                dist.all_reduce(x, group=part)

        return _caught_here(what)


def waits() -> dict[str, float]:
    """A sum whose result is read after a wait, before it, and on a stream that does not wait."""
    with group() as (rank, _, device):

        def summed() -> tuple[torch.Tensor, Any]:
            x = torch.full((4,), rank + 1.0, device=device)
            return x, dist.all_reduce(x, async_op=True)

        x, work = summed()
        work.wait()
        good = (x * 2)[0]
        x, work = summed()
        missing = (x * 2)[0]
        work.wait()
        x, work = summed()
        work.wait()
        other = torch.npu.Stream()  # type: ignore[attr-defined]
        with torch.npu.stream(other):  # type: ignore[attr-defined]
            wrong_stream = (x * 2)[0]
        torch.npu.synchronize()  # type: ignore[attr-defined]
        x, work = summed()
        work.wait()
        other.wait_stream(torch.npu.current_stream())  # type: ignore[attr-defined]
        with torch.npu.stream(other):  # type: ignore[attr-defined]
            right_stream = (x * 2)[0]
        torch.npu.synchronize()  # type: ignore[attr-defined]
        results = {"good": good, "missing": missing, "wrong_stream": wrong_stream, "right_stream": right_stream}
        return {name: value.item() for name, value in results.items()}


def bits() -> list[str]:
    """Gradients summed over ranks while the next layer's are computed, 20 times over: their bytes."""
    with group() as (rank, ranks, device):
        torch.manual_seed(0)
        weights = [torch.randn(16, 16) for _ in range(4)]
        batch = torch.randn(ranks, 8, 16)[rank]
        seen = []
        for _ in range(20):
            held = [weight.to(device).requires_grad_() for weight in weights]
            works = []
            for parameter in held:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, works=works: works.append(dist.all_reduce(p.grad, async_op=True))
                )
            x = batch.to(device)
            for parameter in held:
                x = torch.tanh(x @ parameter)
            x.square().sum().backward()
            for work in works:
                work.wait()
            seen.append(b"".join(p.grad.cpu().numpy().tobytes() for p in held if p.grad is not None).hex())
        return sorted(set(seen))
