"""`octofold doctor`: processor, memory, shared memory, disk, clock and limits of this machine or container."""

import ctypes
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from octofold.backends.host import usable_cores, usable_memory_bytes
from octofold.launch.doctor_finding import FAIL, WARN, Check, Finding, Problem, Surroundings, ok

GIB = 1 << 30
CPU_INFO = Path("/proc/cpuinfo")
SHARED = Path("/dev/shm")
FEATURES = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX"}
LEAST_MEMORY_BYTES, LEAST_SHARED_BYTES = 4 * GIB, GIB
FULL_DISK_BYTES, LEAST_DISK_BYTES = GIB, 10 * GIB
LEAST_FILES = 4096
MOST_SKEW_S = 5.0
UNSYNCHRONISED = 5
"""What adjtimex returns then (TIME_ERROR)."""

MANY_THREADS = Problem(
    WARN,
    "OMP_NUM_THREADS={threads} for each of {ranks} local rank(s), on {cores} core(s)",
    "OMP_NUM_THREADS={share}, or unset it",
)


def check_cpu(here: Surroundings) -> Iterator[Finding]:
    cores = usable_cores()
    flags = set(CPU_INFO.read_text().partition("flags")[2].partition("\n")[0].split()) if CPU_INFO.exists() else set()
    features = [name for flag, name in FEATURES.items() if flag in flags]
    slow = "" if {"avx512_bf16", "amx_bf16"} & flags else "; BF16 products are computed in FP32"
    threads, ranks = here.environ.get("OMP_NUM_THREADS", ""), here.environ.get("LOCAL_WORLD_SIZE", "1")
    if threads.isdigit() and ranks.isdigit() and int(threads) * int(ranks) > cores:
        share = max(1, cores // max(1, int(ranks)))
        yield MANY_THREADS.found(threads=threads, ranks=ranks, cores=cores, share=share)
    yield ok(f"{cores} core(s) usable of {os.cpu_count()}, {', '.join(features) or os.uname().machine}{slow}")


LITTLE_MEMORY = Problem(
    WARN, "{found} of memory may be used", "a larger limit of the container (docker run --memory), or machine"
)
LITTLE_SHARED = Problem(
    WARN,
    "{found} free in /dev/shm, less than 1 GiB: NCCL and data workers put buffers there",
    "docker run --shm-size=16g, or --ipc=host",
)


def check_memory(here: Surroundings) -> Iterator[Finding]:
    usable = usable_memory_bytes()
    shown = f"{usable / GIB:.1f} GiB"
    yield LITTLE_MEMORY.found(found=shown) if usable < LEAST_MEMORY_BYTES else ok(f"{shown} of memory")
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
    shown = f"{free / GIB:.2f} GiB"
    yield LITTLE_SHARED.found(found=shown) if free < LEAST_SHARED_BYTES else ok(f"{shown} free in /dev/shm")


READ_ONLY = Problem(FAIL, "{place} may not be written", "another folder (run_dir=FOLDER), or its owner's permission")
FULL = Problem(FAIL, "{free} free in {place}, less than 1 GiB", "free some, or another run_dir or checkpoint.dir")
LITTLE_DISK = Problem(
    WARN, "{free} free in {place}, less than 10 GiB", "free some, or another run_dir or checkpoint.dir"
)


def check_disk(here: Surroundings) -> Iterator[Finding]:
    place = _existing(here.run_dir)
    free = shutil.disk_usage(place).free
    shown = f"{free / GIB:.1f} GiB"
    if not os.access(place, os.W_OK | os.X_OK):
        yield READ_ONLY.found(place=place)
    elif free < LEAST_DISK_BYTES:
        yield (FULL if free < FULL_DISK_BYTES else LITTLE_DISK).found(free=shown, place=place)
    else:
        yield ok(f"{shown} free in {place}")


SKEWED = Problem(
    WARN,
    "files in {place} get a time {skew:.0f} s from this machine's clock",
    "synchronise both clocks (chrony or ntpd)",
)
FREE_RUNNING = Problem(
    WARN, "nothing synchronises the clock, and the job has {ranks} ranks", "start chrony or ntpd on every node"
)


def check_clock(here: Surroundings) -> Iterator[Finding]:
    place, found = _existing(here.run_dir), []
    if os.access(place, os.W_OK | os.X_OK):
        with tempfile.TemporaryFile(dir=place) as file:
            before = time.time()
            file.write(b".")
            file.flush()
            skew = os.fstat(file.fileno()).st_mtime - before
        if abs(skew) > MOST_SKEW_S:
            found.append(SKEWED.found(place=place, skew=abs(skew)))
    ranks = here.environ.get("WORLD_SIZE", "1")
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == UNSYNCHRONISED and ranks != "1":
        found.append(FREE_RUNNING.found(ranks=ranks))
    told = "not synchronised, which matters between nodes only" if state == UNSYNCHRONISED else "synchronised"
    yield from found or [ok(f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {told if state >= 0 else 'state not told'}")]


FEW_FILES = Problem(
    WARN, "a process may open {found} files", "ulimit -n 65536 (LimitNOFILE, docker run --ulimit nofile=65536)"
)


def check_limits(here: Surroundings) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    yield FEW_FILES.found(found=soft) if few else ok("files a process may open: " + ("any" if soft < 0 else str(soft)))


def _existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


CHECKS = (
    Check("cpu", "cores, instructions for BF16, and threads against cores", check_cpu, (MANY_THREADS,)),
    Check("memory", "memory with the container's limit, and /dev/shm", check_memory, (LITTLE_MEMORY, LITTLE_SHARED)),
    Check("disk", "space and permission where runs are written", check_disk, (READ_ONLY, FULL, LITTLE_DISK)),
    Check("clock", "this machine's clock, and that of the disk's server", check_clock, (SKEWED, FREE_RUNNING)),
    Check("limits", "open files", check_limits, (FEW_FILES,)),
)
