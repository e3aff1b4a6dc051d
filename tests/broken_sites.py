"""Environments for `octofold doctor`: folders for PYTHONPATH whose packages are wrong, and files as CANN has them."""

from pathlib import Path

NPU_POINTS = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
NO_HCCL = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"


def package(site: Path, name: str, code: str) -> Path:
    """A package whose import runs the code."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(code)
    return site


def distribution(site: Path, name: str, version: str, entry_points: str = "") -> Path:
    """What pip leaves of an installed package: its dist-info."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (folder / "entry_points.txt").write_text(entry_points)
    return site


def ascend(root: Path, cann: str | None = "9.2.0", driver: str = "26.1.0", operators: bool = True) -> dict[str, str]:
    """CANN and driver below `root`, and the variables that CANN's set_env.sh would set."""
    home = root / "Ascend/cann"
    inner = home / "aarch64-linux"
    (inner / "lib64").mkdir(parents=True)
    if cann:
        text = f"package_name=Ascend-cann-toolkit\nversion={cann}\ninnerversion=V100R001C21\narch=aarch64\n"
        (inner / "ascend_toolkit_install.info").write_text(text)
    if operators:
        (inner / "ascend_ops_install.info").write_text(f"package_name=Ascend-cann-910b-ops\nversion={cann}\n")
    (root / "Ascend/driver").mkdir()
    text = f"Version={driver}\nascendhal_version=7.35.23\npackage_version={driver}\n"
    (root / "Ascend/driver/version.info").write_text(text)
    return {"ASCEND_HOME_PATH": str(home), "LD_LIBRARY_PATH": f"/lib:{inner / 'lib64'}"}
