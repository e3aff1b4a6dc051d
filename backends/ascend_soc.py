"""Ascend systems on a chip: from the name that the driver reports to what the device can do. Torch-free.

Names are those that torch_npu 2.13.0 knows (`SocVersion`): a name says the generation, which says the arithmetic, and
the bin, which says the speed. Arithmetic: torch_npu casts to E4M3, E5M2 and HiF8 on Ascend 950 only, and Huawei's FP8
recipes (MindSpeed) run there only; 910B and 910C multiply BF16 and INT8. Peaks are those of the matrix units in dense
BF16, from torchtitan-npu's `get_peak_flops`; other bins and FP8 are left out: no figure for these units was found.
"""

import re
from dataclasses import dataclass

from octofold.backends.base import Capabilities
from octofold.backends.errors import UserError


@dataclass(frozen=True)
class Chip:
    """A generation of chips."""

    name: str
    """As people call it."""
    products: str
    soc_names: str
    """A pattern that whole names match."""
    shown: str
    """The pattern for people."""
    has_fp8: bool
    """FP8 (E4M3, E5M2), MXFP8 and HiF8 came together."""


CHIPS = (
    Chip("Ascend 910B", "Atlas A2", r"Ascend910B[1-4]\w*(-\d)?", "Ascend910B1 to Ascend910B4", has_fp8=False),
    Chip("Ascend 910C", "Atlas A3", r"Ascend910_93\d\d", "Ascend910_93xx", has_fp8=False),
    Chip("Ascend 950PR", "Atlas 350, 850, 950", r"Ascend950PR(_\w+)?", "Ascend950PR_xxxx", has_fp8=True),
    Chip("Ascend 950DT", "Atlas 850, 950", r"Ascend950DT(_\w+)?", "Ascend950DT_xxxx", has_fp8=True),
)
"""Ascend910A, ProA, ProB, PremiumA and the plain Ascend910B are the first generation, which has no BF16."""

PEAK_BF16_FLOPS = {
    "Ascend910B1": 373.9e12,
    "Ascend910B2": 353.9e12,
    "Ascend910B3": 294.9e12,
    "Ascend910B4": 245.8e12,
    "Ascend910_9362": 353.9e12,
    "Ascend910_9392": 353.9e12,
    "Ascend950PR": 432e12,
    "Ascend950DT": 486e12,
}
"""SoC, or generation where its bins agree -> operations a second, of a device: on A3, of one die of two."""


def chip_of(soc_name: str) -> Chip:
    """The generation of a SoC.

    Args:
        soc_name: such as Ascend910_9392 (`torch.npu.get_device_name()`, `aclrtGetSocName`).

    Raises:
        UserError: nobody has said what this chip can do.
    """
    found = next((chip for chip in CHIPS if re.fullmatch(chip.soc_names, soc_name)), None)
    if found is None:
        known = ", ".join(f"{chip.shown} ({chip.name})" for chip in CHIPS)
        remedy = "run on one of these, or add its arithmetic to CHIPS in backends/ascend_soc.py"
        raise UserError(f"SoC {soc_name or '(no name)'}\n  rule:   a known chip: {known}\n  remedy: {remedy}")
    return found


def capabilities(soc_name: str, memory_bytes: int) -> Capabilities:
    """What a device can do.

    Args:
        soc_name: as in `chip_of`.
        memory_bytes: of the device, read from it.

    Raises:
        UserError: as `chip_of`.
    """
    chip = chip_of(soc_name)
    peak = PEAK_BF16_FLOPS.get(soc_name) or PEAK_BF16_FLOPS.get(soc_name.partition("_")[0])
    return Capabilities(
        f"{chip.name} ({soc_name})",
        bf16=True,
        int8=True,
        fp8=chip.has_fp8,
        mxfp8=chip.has_fp8,
        hif8=chip.has_fp8,
        casts_fp8=chip.has_fp8,
        memory_bytes=memory_bytes,
        peak_flops=None if peak is None else {"bf16": peak},
    )
