"""What each choice beside the default FP8 recipe does to the loss: extensions, and the recipe's own parts taken out.

Trains the tiny DeepSeek-V3 twin in BF16 twice (rounded otherwise the second time: the noise floor) and once for each
choice, on the same batches from the same weights, and prints the relative error of the smoothed loss against BF16 over
the second half of the steps, as `octofold verify precision` defines it. A difference below the noise floor is none.

    .venv/bin/python benchmarks/precision_extensions.py [--steps 320] [--only WORD]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from octofold.train.metrics import read_metrics
from octofold.train.precision.verdict import interval, relative_error

SMOOTHING = 0.9
COMMON = [
    "model=deepseek_v3_tiny",
    "backend=cpu",
    "backend.threads=1",
    "optim.lr=3e-4",
    "optim.moments=bf16",
    "model.balance.bias_update_rate=0.01",
    "data.sequence_length=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "train.eval_every=0",
    "train.eval_sequences=4",
    "train.final_eval_sequences=4",
    "train.sample_tokens=0",
]
EMULATED = ["precision.arithmetic=emulate", "precision.watch_every=0"]
FP8 = ["precision=fp8_block", *EMULATED, "precision.block=16"]


def override(*entries: str) -> str:
    """A value of precision.overrides."""
    return f"precision.overrides=[{','.join(f'{{{entry}}}' for entry in entries)}]"


CHOICES = {
    "default: fp8_block": FP8,
    "+ embedding in FP8": [*FP8, override("match:embed_tokens,name:fp8_block")],
    "+ head in FP8": [*FP8, override("match:lm_head,name:fp8_block")],
    "+ MTP projection in FP8": [*FP8, override('match:"*.eh_proj",name:fp8_block')],
    "+ all three": [*FP8, override(*(f'match:"{m}",name:fp8_block' for m in ("embed_tokens", "lm_head", "*.eh_proj")))],
    "+ moments in FP8": [*FP8, "optim.moments=fp8"],
    "+ gradients in E5M2": [*FP8, "precision.gradient_fmt=e5m2"],
    "- MLA's up-projections": [*FP8, override('match:"*.q_b_proj",name:bf16', 'match:"*.kv_b_proj",name:bf16')],
    "- experts": [*FP8, override('match:"*.experts.*",name:bf16')],
    "- powers of two: FP32 scales": [*FP8, "precision.scale_fmt=float"],
    "- FP8 inputs kept: BF16": [*FP8, "precision.saved=bf16"],
    "storage only": [*FP8, "precision.arithmetic=storage"],
    # Their tiles are part of what they are.
    **{name: [f"precision={name}", *EMULATED] for name in ("mxfp8", "fp8_tensor_current", "fp8_tensor_delayed")},
}


def losses(folder: Path, overrides: list[str], steps: int) -> np.ndarray:
    """Train in a process of its own; the loss of every step."""
    command = [sys.executable, "-c", "from octofold.launch.cli import main; raise SystemExit(main())", "train"]
    done = subprocess.run(
        [*command, *COMMON, *overrides, f"train.steps={steps}", f"run_dir={folder}"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return np.array([record["loss"] for record in read_metrics(folder) if record["kind"] == "train"])


def main() -> None:
    """Train, then print one line a choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--only", default="", help="choices whose name holds this word, or one of several with commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bf16 = losses(root / "bf16", ["precision=bf16"], options.steps)
        others = ["kernels.rms_norm=reference", "kernels.swiglu=reference"]
        again = losses(root / "again", ["precision=bf16", *others], options.steps)
        floor = interval([relative_error(again, bf16, SMOOTHING)], SMOOTHING)
        print(f"{options.steps} steps; BF16 ends at {bf16[-20:].mean():.4f} nats (mean of 20 steps)")
        print(
            f"{'BF16, rounded otherwise':32} {floor.mean:+.3%} ± {floor.half_width:.3%}   noise floor {floor.reach:.3%}"
        )
        for number, (name, overrides) in enumerate(CHOICES.items()):
            if not any(word in name for word in options.only.split(",")):
                continue
            found = losses(root / str(number), overrides, options.steps)
            error = interval([relative_error(found, bf16, SMOOTHING)], SMOOTHING)
            word = "above the noise floor" if abs(error.mean) - error.half_width > floor.reach else ""
            print(f"{name:32} {error.mean:+.3%} ± {error.half_width:.3%}   {word}", flush=True)


if __name__ == "__main__":
    main()
