"""A checkpoint of weights alone, from which a run begins: what an import writes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.manifest import MANIFEST, write_manifest
from octofold.train.checkpoint.validity import CHECKPOINTS


def publish_weights(run_dir: Path, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a checkpoint of weights only as step 0 of a run, from one process; all of it or nothing.

    Args:
        write: fills a folder with safetensors files of whole tensors named model.…; a weight may be E4M3 beside its
            scales (train/checkpoint/quantized.py).
        state: joins the manifest; `block` is the edge of the FP8 blocks.
    """
    checkpoints = folder_at(run_dir / CHECKPOINTS)
    partial = checkpoints.partial("step_0")
    try:
        checkpoints.begin("step_0", MANIFEST)
        write(Path(str(partial)))
        start = {"step": 0, "updates": 0, "tokens_seen": 0, "weights_only": True}
        write_manifest(partial, {**start, **state})
        return Path(str(checkpoints.publish("step_0")))
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)
        raise
