"""Prints what torch says of itself and its devices, as JSON on the last line. Run by its path in a process of its own.

That process may die or hang with a broken installation, which must not take `octofold doctor` with it.
"""

import json
import os
import sys
from importlib.util import find_spec
from typing import Any


def device_facts(module: Any) -> dict[str, Any]:
    """Devices of `torch.cuda` or `torch.npu`, by what they say of themselves, or why they say nothing."""
    try:
        return {"devices": [module.get_device_name(index) for index in range(module.device_count())]}
    except Exception as error:  # noqa: BLE001 whatever a broken driver raises is the answer
        return {"error": f"{type(error).__name__}: {error}"}


def facts(*, alone: bool) -> dict[str, Any]:
    """Of the torch that this interpreter imports.

    Args:
        alone: torch_npu is not imported where torch does not.
    """
    import torch

    if "OCTOFOLD_SOFTWARE_NPU" in os.environ:
        from octofold.backends.software_npu.activate import activate

        activate()
    said: dict[str, Any] = {"torch": torch.__version__, "cuda_build": torch.version.cuda}
    if torch.version.cuda and torch.cuda.is_available():
        said["cuda"] = device_facts(torch.cuda)
        said["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if not alone and not hasattr(torch, "npu") and find_spec("torch_npu"):
        # Where TORCH_DEVICE_BACKEND_AUTOLOAD=0 torch has not, and ranks import it by themselves, too.
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # noqa: BLE001 whatever a broken installation raises is the answer
            said["npu"] = {"error": f"{type(error).__name__}: {error}"}
            return said
    if hasattr(torch, "npu"):
        said["npu"] = device_facts(torch.npu)
    return said


if __name__ == "__main__":
    print(json.dumps(facts(alone="alone" in sys.argv)))
