"""Memory and speed of `octofold import` and `octofold export` on a synthetic checkpoint of several gigabytes.

    .venv/bin/python benchmarks/convert.py [--layers 3] [--folder /tmp]

For each conversion: the peak memory of the process above that of the same command on a checkpoint of a few hundred
kilobytes, beside the largest tensor; and its speed (bytes written a second) beside that of copying as many bytes from
file to file on the same disk in the same run. `--json` prints the figures as one line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from octofold.launch.compose import compose
from octofold.train.checkpoint.safetensors_files import SLAB_BYTES, OutputTensor, write_file
from octofold.train.models.config import ModelConfig
from octofold.train.models.hf_config import to_hf
from octofold.train.models.hf_names import hf_tensors

OCTOFOLD = Path(sys.executable).with_name("octofold")


def large(layers: int) -> ModelConfig:
    """DeepSeek-V3 with V2-Lite's width and experts: 1.2 GB a layer of experts, 0.5 GB of embedding, in BF16."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1408, "n_routed_experts": 64, "intermediate_size": 4096}
    model = compose(["model=deepseek_v3"]).model
    return replace(model, **sizes, num_attention_heads=16, num_hidden_layers=layers + 1, first_k_dense_replace=1)  # type: ignore[arg-type]


def write_checkpoint(folder: Path, model: ModelConfig) -> tuple[int, int]:
    """A checkpoint of random numbers in BF16; returns the bytes of all tensors and of the largest stack of experts."""
    folder.mkdir()
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()

    def slabs(left: int) -> Iterator[torch.Tensor]:
        for first in range(0, left, len(noise)):
            yield noise[: min(len(noise), left - first)]

    tensors = [OutputTensor(t.name, torch.bfloat16, t.shape, partial(slabs, prod(t.shape))) for t in hf_tensors(model)]
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    config = to_hf(model, dtype="bfloat16", sequence_length=512, bos_id=None, eos_id=1, quantization=None)
    (folder / "config.json").write_text(json.dumps(config))
    stack = model.n_routed_experts * 2 * model.moe_intermediate_size * model.hidden_size * 2
    return sum(tensor.nbytes for tensor in tensors), max(stack, *(tensor.nbytes for tensor in tensors))


def run(*arguments: str) -> tuple[float, int]:
    """Seconds and peak bytes of an `octofold` command."""
    began_s = time.monotonic()
    process = subprocess.Popen([OCTOFOLD, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.monotonic() - began_s, usage.ru_maxrss * 1024


def folder_bytes(folder: Path) -> int:
    """Of the tensors' files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_bytes_per_s(source: Path, target: Path) -> float:
    """Speed of a plain copy that reaches the disk."""
    began_s = time.monotonic()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    speed = source.stat().st_size / (time.monotonic() - began_s)
    target.unlink()
    return speed


def conversions(root: Path, name: str, model: ModelConfig) -> tuple[int, int, dict[str, tuple[float, int, int]]]:
    """Total and largest bytes, and seconds, peak bytes and bytes written of each conversion."""
    total, largest = write_checkpoint(root / name, model)
    imported = root / f"{name}-run"
    done: dict[str, tuple[float, int, int]] = {}
    seconds, peak = run("import", str(root / name), f"run_dir={imported}")
    done["import bf16"] = (seconds, peak, folder_bytes(imported / "checkpoints" / "step_0"))
    for precision in ("bf16", "fp8"):
        out = root / f"{name}-{precision}"
        seconds, peak = run("export", str(imported), f"export.to={out}", f"export.precision={precision}")
        done[f"export {precision}"] = (seconds, peak, folder_bytes(out))
    shutil.rmtree(imported)
    seconds, peak = run("import", str(root / f"{name}-fp8"), f"run_dir={imported}")
    done["import fp8"] = (seconds, peak, folder_bytes(imported / "checkpoints" / "step_0"))
    return total, largest, done


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="layers with experts beside that of MTP; 1.2 GB each")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        small = replace(compose(["model=deepseek_v3_tiny"]).model, vocab_size=320)
        _, _, baseline = conversions(root, "small", small)
        total, largest, measured = conversions(root, "large", large(options.layers))
        copy_speed = copy_bytes_per_s(root / "large" / "model.safetensors", root / "copy")
    figures = {
        name: {
            "extra_bytes": peak - baseline[name][1],
            "bytes_per_s": written / seconds,
            "share_of_copy": written / seconds / copy_speed,
        }
        for name, (seconds, peak, written) in measured.items()
    }
    if options.json:
        print(json.dumps({"total_bytes": total, "largest_bytes": largest, "slab_bytes": SLAB_BYTES, **figures}))
        return
    print(f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, copy {copy_speed / 1e9:.2f} GB/s")
    for name, figure in figures.items():
        print(
            f"{name:12}  memory above the command's own {figure['extra_bytes'] / 2**20:7.0f} MiB  "
            f"{figure['bytes_per_s'] / 1e9:5.2f} GB/s  {figure['share_of_copy']:.2f} of a copy"
        )


if __name__ == "__main__":
    main()
