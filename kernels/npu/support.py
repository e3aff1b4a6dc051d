"""What every provider on torch_npu's operators (`torch.ops.npu`) asks of a run."""

import torch

from octofold.kernels.registry import Workload

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_no_npu(workload: Workload, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why an operator that takes these dtypes cannot serve the run."""
    if workload.device_type != "npu":
        return f"made for Ascend, the run is on {workload.device_type}"
    if workload.dtype not in dtypes:
        return f"the operator takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    return None
