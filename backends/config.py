"""What the user may say about the device and the process group. Torch-free, so that a wrong key fails at once."""

from dataclasses import dataclass

from octofold.backends.errors import ConfigError, check_finite, unknown_name_error

ALL_REDUCES = ["flat", "hierarchical"]


@dataclass(frozen=True)
class BackendConfig:
    """The `backend` group."""

    name: str = "auto"
    """`auto` takes the first available of ascend, cuda and cpu; a name that cannot be honoured stops the run."""
    software: bool = False
    """With backend=ascend: on the software NPU, CANN's stand-ins on host memory and CPU kernels (docs/ascend.md)."""
    threads: int = 0
    """CPU threads a rank computes with; 0 divides the machine's cores among its local ranks."""
    timeout_s: float = 600.0
    """A collective that waits longer than this ends the run with an error."""
    ranks_per_node: int = 0
    """Ranks that share a node's fast links; 0: as the launcher says (LOCAL_WORLD_SIZE, or Slurm's tasks a node),
    which on Ascend must agree with RANK_TABLE_FILE where that is set."""
    ranks_per_supernode: int = 0
    """Ranks whose nodes share one fast plane, such as an Atlas 900 A3's; 0: as RANK_TABLE_FILE says, else there are
    none."""
    all_reduce: str = "flat"
    """How the trainer's own sums over all ranks are taken: flat, in one step; hierarchical, inside nodes, then between
    them. Sums of gradients follow parallel.data_replicate."""
    hccl_buffer_mb: int = 0
    """Device memory that each HCCL group takes, twice, to send and to receive, in MB; 0: as HCCL_BUFFSIZE says, else
    HCCL's own, 200."""
    peak_tflops_bf16: float = 0.0
    """Peak of the device for dense BF16 products in TFLOP/s, for MFU; 0: what is known of the device."""
    peak_tflops_fp8: float = 0.0
    """The same for FP8 products."""


def check(backend: BackendConfig, world_size: int) -> None:
    """Raise `ConfigError` for a number that no device has, or nodes that `world_size` ranks do not fill."""
    check_finite("backend.timeout_s", backend.timeout_s, least=1.0)
    if backend.software and backend.name != "ascend":
        shown, rule = f"backend.software=true backend.name={backend.name}", "only an Ascend NPU has a software twin"
        raise ConfigError("backend.software", shown, rule, "backend=ascend, or backend.software=false")
    for name in ("peak_tflops_bf16", "peak_tflops_fp8"):
        check_finite(f"backend.{name}", getattr(backend, name), least=0.0)
    if not 0 <= backend.hccl_buffer_mb < 1 << 20:
        rule = "a size in MB, or 0 for HCCL's own"
        raise ConfigError("backend.hccl_buffer_mb", backend.hccl_buffer_mb, rule, "backend.hccl_buffer_mb=200")
    _check_nodes(backend, world_size)


def _check_nodes(backend: BackendConfig, world_size: int) -> None:
    if backend.all_reduce not in ALL_REDUCES:
        raise unknown_name_error("backend.all_reduce", backend.all_reduce, ALL_REDUCES)
    for name in ("ranks_per_node", "ranks_per_supernode"):
        _check_divides(f"backend.{name}", getattr(backend, name), world_size)
    per_node, per_supernode = backend.ranks_per_node, backend.ranks_per_supernode
    if per_supernode and (not per_node or per_supernode % per_node):
        shown = f"backend.ranks_per_node={per_node} backend.ranks_per_supernode={per_supernode}"
        rule = "a supernode is made of whole nodes, whose size is given, too"
        remedy = "set backend.ranks_per_node to a divisor of backend.ranks_per_supernode"
        raise ConfigError("backend.ranks_per_supernode", shown, rule, remedy)


def _check_divides(key: str, ranks: int, world_size: int) -> None:
    """A unit of so many ranks (0: not said) holds the whole job, or the job is made of whole units."""
    if ranks < 0 or (0 < ranks < world_size and world_size % ranks):
        legal = [d for d in range(1, world_size + 1) if world_size % d == 0]
        rule = f"the job's {world_size} rank(s) fill whole units of this size"
        raise ConfigError(key, ranks, rule, f"{key} one of {legal}, larger than the job, or 0")
