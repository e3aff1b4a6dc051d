"""`octofold inspect CHECKPOINT|RUN`: what a checkpoint holds, who wrote it, and whether it may be loaded.

Only manifests and the headers of files are read, and with --verify every byte.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octofold.backends.errors import UserError
from octofold.train.checkpoint.checksums import DamagedError
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.manifest import Manifest
from octofold.train.checkpoint.validity import candidates, check_in_full, checkpoints_of

FLAGS = ("--tensors", "--verify", "--config")
UNITS = ["B", "KB", "MB", "GB", "TB", "PB"]


def inspect(argv: list[str]) -> int:
    """Print what is known of a checkpoint, or of a run's newest; the exit status is 0 where it is valid, else 1.

    Args:
        argv: the place, and flags.

    Raises:
        UserError: no place is named, or there is no checkpoint there.
    """
    flags, places = {text for text in argv if text in FLAGS}, [text for text in argv if text not in FLAGS]
    if len(places) != 1 or places[0].startswith("-"):
        rule = f"it takes one checkpoint, run or URL, and {', '.join(FLAGS)}"
        raise UserError(f"inspect {' '.join(argv)}\n  rule:   {rule}\n  remedy: octofold inspect RUN")
    where = _place(places[0])
    found, skipped = candidates(where)
    if not found and not skipped:
        raise UserError(f"{where} holds no checkpoint\n  remedy: name a run, or RUN/checkpoints/step_N")
    valid = bool(found)
    newest_step = found[0][1].state.get("step", -1) if found else -1
    for folder, manifest in found[:1]:
        for line in _lines(folder, manifest, flags):
            print(line)
        if "--verify" in flags:
            valid = _verified(folder, manifest)
    for other, manifest in found[1:]:
        print(f"older      {other.name}, {_when(manifest)}, {size(manifest.nbytes)}")
    for passed in skipped:
        print(f"not valid  {passed.path.name}: {passed}")
    if not found:
        print("There is no valid checkpoint.")
    elif any(passed.step > newest_step for passed in skipped):
        print(f"{found[0][0].name} is the newest that is valid.")
    return 0 if valid else 1


def _place(text: str) -> str | Folder:
    """A checkpoint or URL as it is; a run's folder as the place where it keeps its checkpoints."""
    path = Path(text).expanduser()
    if "://" in text or not (path / "config.yaml").is_file():
        return text
    from octofold.launch.run_folder import read_config

    return checkpoints_of(path, read_config(path.absolute()).checkpoint.dir)


def _lines(folder: Folder, manifest: Manifest, flags: set[str]) -> Iterator[str]:
    state, made_by = manifest.state, manifest.made_by
    yield f"checkpoint {folder}"
    yield f"step       {state.get('step', '?')}, {state.get('updates', '?')} updates applied"
    yield f"tokens     {state.get('tokens_seen', 0):,}"
    yield f"saved      {_when(manifest)}, by octofold {made_by.get('version', 'of an earlier format')}"
    yield f"layout     {layout(made_by)}"
    yield f"format     {manifest.format}, {'checksums' if manifest.format > 1 else 'sizes only, no checksums'}"
    for key, value in state.items():
        if key not in ("step", "updates", "tokens_seen"):
            yield f"state      {key}: {shortened(value)}"
    yield f"files      {len(manifest.files)}, {size(manifest.nbytes)}"
    try:
        yield from _contents(folder, manifest, listed="--tensors" in flags)
    except DamagedError as error:
        yield f"not valid  {str(error).splitlines()[0]}"
    if "--config" in flags:
        yield from json.dumps(made_by.get("config", {}), indent=2).splitlines()


def _contents(folder: Folder, manifest: Manifest, *, listed: bool) -> Iterator[str]:
    """Numbers and bytes by kind, and with `listed` each tensor."""
    from octofold.train.checkpoint.reading import CheckpointReader

    with CheckpointReader(folder, manifest) as reader:
        kinds: dict[str, list[int]] = {}
        for name, tensor in reader.saved.items():
            sizes = [shard.stored.nbytes for shard in tensor.shards]
            of_kind = kinds.setdefault(name.partition(".")[0], [0, 0])
            of_kind[0] += 1
            of_kind[1] += sum(sizes)
        for kind, (count, nbytes) in sorted(kinds.items()):
            yield f"tensors    {kind}: {count}, {size(nbytes)}"
        for name, tensor in sorted(reader.saved.items()) if listed else []:
            dtype, parts = str(tensor.dtype).removeprefix("torch."), len(tensor.shards)
            yield f"  {name}  {dtype} {list(tensor.shape)}  in {parts} part{'s' * (parts > 1)}"


def _verified(folder: Folder, manifest: Manifest) -> bool:
    began_s = time.monotonic()
    try:
        check_in_full(folder, manifest)
    except DamagedError as error:
        print(f"not valid  {str(error).splitlines()[0]}")
        return False
    told = "every byte is as it was written" if manifest.format > 1 else "files have the sizes that were written"
    print(f"verified   {told} ({size(manifest.nbytes)} in {time.monotonic() - began_s:.1f} s)")
    return True


def layout(made_by: dict[str, Any]) -> str:
    """The degrees above 1 of the layout that a checkpoint was saved with."""
    if "world_size" not in made_by:
        return "not known"
    parallel = made_by.get("config", {}).get("parallel", {})
    degrees = {key: value for key, value in parallel.items() if type(value) is int and value > 1}
    degrees.pop("placement_every", None)
    return ", ".join([f"{made_by['world_size']} ranks", *(f"{key}={value}" for key, value in degrees.items())])


def shortened(value: object, most: int = 90) -> str:
    """A value on one line."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"


def size(nbytes: float) -> str:
    """Bytes for people: 1.23 GB."""
    unit = 0
    while nbytes >= 1000 and unit < len(UNITS) - 1:
        nbytes, unit = nbytes / 1000, unit + 1
    return f"{nbytes:.0f} B" if unit == 0 else f"{nbytes:.2f} {UNITS[unit]}"


def _when(manifest: Manifest) -> str:
    if not manifest.saved_at_s:
        return "at a time that is not known"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at_s))
