"""Which versions go together, and what communication libraries take, with sources. Data only."""

PYTHON = (3, 11)
"""The least, as pyproject.toml has it."""
TORCH = (2, 13)

Version = tuple[int, ...]

TORCH_NPU_CANN: dict[Version, tuple[Version, ...]] = {(2, 13): ((9, 2), (9, 1), (9, 0), (8, 5))}
"""torch_npu -> CANN, the one it was released with first. TorchNPU 26.2.0 release notes, October 2026
(gitcode.com/Ascend/pytorch, docs/zh/release_notes)."""

CANN_DRIVERS: dict[Version, tuple[Version, ...]] = {
    (8, 5): ((25, 0), (25, 2), (25, 3), (25, 5), (25, 7), (26, 0), (26, 1)),
    (9, 0): ((25, 0), (25, 2), (25, 3), (25, 5), (25, 7), (26, 0), (26, 1)),
    (9, 1): ((25, 2), (25, 3), (25, 5), (25, 7), (26, 0), (26, 1)),
}
"""CANN -> drivers (Ascend HDK). CANN 9.1.1 release notes (hiascend.com); those of 9.2 were not at hand."""

CUDA_DRIVERS = {12: (525, 60), 13: (580, 65)}
"""CUDA's major version -> the least driver. NVIDIA's CUDA toolkit release notes, minor version compatibility."""

HCCL_NUMBERS = {
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_EXEC_TIMEOUT": (0, 2147483647),
    "HCCL_IF_BASE_PORT": (1024, 65520),
    "HCCL_BUFFSIZE": (1, 1 << 20),
}
"""Least and most: seconds, seconds, port, MB. CANN 9.0 environment variables (hiascend.com, envref_07_0072 on);
no upper bound of the buffer is documented, a terabyte is a slip."""
HCCL_WORDS = {
    "HCCL_DETERMINISTIC": ("true", "false", "strict"),
    "HCCL_SOCKET_FAMILY": ("AF_INET", "AF_INET6"),
    "HCCL_WHITELIST_DISABLE": ("0", "1"),
    "HCCL_INTRA_ROCE_ENABLE": ("0", "1"),
    "HCCL_INTRA_PCIE_ENABLE": ("0", "1"),
}
HCCL_OTHERS = (
    *("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "HCCL_ALGO", "HCCL_WHITELIST_FILE", "HCCL_DIAGNOSE_ENABLE"),
    *("HCCL_ENTRY_LOG_ENABLE", "HCCL_RDMA_TC", "HCCL_RDMA_SL", "HCCL_RDMA_TIMEOUT", "HCCL_RDMA_RETRY_CNT"),
    *("HCCL_RDMA_PCIE_DIRECT_POST_NOSTRICT", "HCCL_RDMA_QPS_PER_CONNECTION", "HCCL_RDMA_QP_PORT_CONFIG_PATH"),
    *("HCCL_MULTI_QP_THRESHOLD", "HCCL_OP_EXPANSION_MODE", "HCCL_OP_RETRY_ENABLE", "HCCL_OP_RETRY_PARAMS"),
    *("HCCL_INTER_HCCS_DISABLE", "HCCL_LOGIC_SUPERPOD_ID", "HCCL_HOST_SOCKET_PORT_RANGE"),
    *("HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_DEBUG_CONFIG", "HCCL_DFS_CONFIG", "HCCL_CONCURRENT_ENABLE"),
    *("HCCL_ASYNC_ERROR_HANDLING", "HCCL_DESYNC_DEBUG", "HCCL_EVENT_TIMEOUT", "HCCL_BLOCKING_WAIT"),
)
"""Also those that torch_npu reads."""
HCCL_PORTS = 32
"""That HCCL takes from HCCL_IF_BASE_PORT on (default 60000), where it meets without a rank table."""
HCCL_BASE_PORT = 60000

NCCL_RENAMED = {
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
}
"""torch 2.2 took these names for its own."""
