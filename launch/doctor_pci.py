"""Which accelerators the PCI bus shows, whether or not there is a driver for them. Torch-free."""

from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_VENDOR, HUAWEI_VENDOR = "0x10de", "0x19e5"
GPU_CLASSES = ("0x0300", "0x0302")
"""Display controllers: VGA, 3D."""
NPU_CLASSES = ("0x1200",)
"""Processing accelerators."""


def pci_devices(vendor: str, classes: tuple[str, ...]) -> int:
    """How many devices of a vendor and of these classes (base and subclass) there are."""
    count = 0
    for device in DEVICES.glob("*"):
        try:
            there = (device / "vendor").read_text().strip(), (device / "class").read_text()[:6]
        except OSError:
            continue
        count += there[0] == vendor and there[1] in classes
    return count
