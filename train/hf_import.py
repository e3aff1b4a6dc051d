"""From a Hugging Face checkpoint to a run that training and sampling start from, one slab of a tensor at a time.

Numbers keep their type: FP8 weights and their scales are copied as they are, so nothing passes through BF16.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from octofold.backends.errors import UserError
from octofold.train.checkpoint.quantized import SCALE_SUFFIX, scale_shape
from octofold.train.checkpoint.safetensors_files import OutputTensor, StoredTensor, read_header, read_rows, slabs_of
from octofold.train.checkpoint.weights import publish_weights
from octofold.train.data.config import DataConfig
from octofold.train.data.tokenizer import load_tokenizer
from octofold.train.hf_files import finite, refuse, unwritable, write_shards
from octofold.train.models.config import ModelConfig
from octofold.train.models.config import check as check_model
from octofold.train.models.hf_config import fp8_block, from_hf
from octofold.train.models.hf_names import HfTensor, hf_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.float8_e8m0fnu)
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Published by some tools; the model computes it."""
SHARD_BYTES = 8 * 10**9
KEPT_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json tokenizer.model added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json generation_config.json LICENSE config.json"
)
SOURCE = "source"
"""RUN/source keeps what came with the weights as it came, for export."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint, opened."""

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    block: int | None
    """Edge of its FP8 blocks; None: it is not quantised."""
    tensors: dict[str, StoredTensor]


def open_source(folder: Path) -> Source:
    """Read config.json and the headers of all files.

    Raises:
        UserError: naming every file that is missing or damaged, every tensor that is not where the index says, or what
            config.json asks for that the model does not compute.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no config.json\n  rule:   a Hugging Face checkpoint is a folder with config.json and "
            "*.safetensors\n  remedy: name such a folder"
        ) from None
    except (OSError, ValueError) as error:
        rule = "it is a JSON object"
        raise UserError(
            f"{folder / 'config.json'} cannot be read: {error}\n  rule:   {rule}\n  remedy: fetch it again"
        ) from None
    if not isinstance(config, dict):
        rule = "it is a JSON object"
        raise UserError(f"{folder / 'config.json'}: {config}\n  rule:   {rule}\n  remedy: fetch it again")
    model, block = replace(from_hf(config), name=folder.name), fp8_block(config)
    check_model(model)
    tensors, faults = _headers(folder)
    refuse(folder, faults, rule="every file is whole and holds what the index says", remedy="fetch those files again")
    return Source(folder, config, model, block, tensors)


def _headers(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    places: dict[str, str] = {}
    if index.exists():
        try:
            places = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {}, [f"{index.name} cannot be read: {error!r}"]
    elif not single.exists():
        return {}, [f"there is neither {single.name} nor {index.name}"]
    tensors: dict[str, StoredTensor] = {}
    faults = [
        f"{index.name}: {name} lies in {file!r}, which is no file's name"
        for name, file in places.items()
        if not isinstance(file, str) or Path(file).name != file
    ]
    if faults:
        return {}, faults
    for file in sorted(set(places.values())) or [single.name]:
        try:
            stored, _ = read_header(folder / file)
        except UserError as error:
            faults.append(str(error).splitlines()[0])
            continue
        faults += [f"{name}: in {file}, but not in the index" for name in stored if places and places.get(name) != file]
        faults += [f"{n}: missing from {file}" for n, f in places.items() if f == file and n not in stored]
        tensors |= stored
    return tensors, faults


def depths_present(source: Source) -> int:
    """Depths of multi-token prediction in the files: those that config.json tells of, or none of them.

    transformers tells of them and saves none.
    """
    model = source.model
    begun = re.compile(rf"model\.layers\.({'|'.join(str(model.num_hidden_layers + d) for d in range(99))})\.")
    told = model.num_nextn_predict_layers
    return told if any(begun.match(name) for name in source.tensors) else 0


def check_tensors(source: Source, model: ModelConfig) -> list[HfTensor]:
    """The tensors that make up `model`, after a check that the source holds exactly those of config.json.

    Args:
        model: the source's, perhaps without its multi-token prediction.

    Raises:
        UserError: naming every tensor that is missing, unknown, or has another shape or type.
    """
    told = replace(source.model, num_nextn_predict_layers=depths_present(source))
    expected = {tensor.name: tensor for tensor in hf_tensors(told)}
    found, faults = source.tensors, []
    scales: set[str] = set()
    for name, tensor in expected.items():
        stored = found.get(name)
        if stored is None:
            faults += [] if tensor.copy else [f"{name}: missing, {list(tensor.shape)} expected"]
            continue
        if stored.shape != tensor.shape:
            faults.append(f"{name}: {list(stored.shape)}, but config.json makes it {list(tensor.shape)}")
        elif stored.dtype == torch.float8_e4m3fn and tensor.quantised and source.block:
            scales.add(name + SCALE_SUFFIX)
            faults += _scale_faults(found.get(name + SCALE_SUFFIX), name, tensor.shape, source.block)
        elif stored.dtype == torch.float8_e4m3fn and tensor.quantised:
            faults.append(f"{name}: FP8, and config.json has no quantization_config")
        elif stored.dtype not in FLOATS:
            faults.append(f"{name}: {stored.dtype} is not read here")
    faults += [
        f"{name}: unknown, {list(stored.shape)}"
        for name, stored in found.items()
        if name not in expected and name not in scales and not IGNORED.fullmatch(name)
    ]
    for ours, parts in by_ours(tensor for tensor in expected.values() if not tensor.copy).items():
        dtypes = {found[part.name].dtype for part in parts if part.name in found}
        if len(dtypes) > 1:
            faults.append(f"{ours}: its parts have several types: {', '.join(sorted(map(str, dtypes)))}")
    rule = "a checkpoint holds exactly the tensors that its config.json describes"
    refuse(source.folder, faults, rule=rule, remedy="fetch those files again, or mend config.json")
    return [tensor for tensor in hf_tensors(model) if tensor.name in found]


def by_ours(tensors: Iterable[HfTensor]) -> dict[str, list[HfTensor]]:
    """The published tensors that each of ours is made of, in order."""
    grouped: dict[str, list[HfTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.ours, []).append(tensor)
    return grouped


def _scale_faults(scale: StoredTensor | None, name: str, shape: tuple[int, ...], block: int) -> list[str]:
    wanted = scale_shape(shape, block)
    if scale is None:
        return [f"{name}{SCALE_SUFFIX}: missing, {list(wanted)} expected"]
    if scale.shape != wanted or scale.dtype not in SCALES:
        return [f"{scale.name}: {scale.dtype} {list(scale.shape)}, but {list(wanted)} of FP32 or E8M0 expected"]
    return []


def import_weights(source: Source, model: ModelConfig, run_dir: Path) -> Path:
    """Write the weights as step 0 of the run; returns the checkpoint.

    Args:
        model: the source's, perhaps with fewer depths of multi-token prediction.

    Raises:
        UserError: naming every tensor that is missing, unknown, misshaped or not finite, or the disk is full. Nothing
            half-written is left behind.
    """
    parts = check_tensors(source, model)
    copies = [tensor for tensor in parts if tensor.copy]
    main = {tensor.ours: tensor.name for tensor in parts if not tensor.copy}
    differing = [f"{t.name}: differs from {main[t.ours]}" for t in copies if not _equal(source, t.name, main[t.ours])]
    rule = "multi-token prediction shares embedding and head with the model"
    refuse(source.folder, differing, rule=rule, remedy="model.num_nextn_predict_layers=0 leaves it out")
    not_finite: set[str] = set()
    outputs = list(_outputs(source, [tensor for tensor in parts if not tensor.copy], not_finite))

    def write(folder: Path) -> None:
        write_shards(folder, outputs, shard_bytes=SHARD_BYTES)
        faults = [f"{name}: holds numbers that are not finite" for name in sorted(not_finite)]
        refuse(source.folder, faults, rule="weights are finite", remedy="fetch those files again")

    quantization = source.config.get("quantization_config") or {}
    state = {"block": source.block, "scale_fmt": quantization.get("scale_fmt") or "float" if source.block else None}
    try:
        return publish_weights(run_dir, write, {**state, "imported_from": source.folder.name})
    except OSError as error:
        raise unwritable(run_dir, error) from None


def _outputs(source: Source, parts: list[HfTensor], not_finite: set[str]) -> Iterator[OutputTensor]:
    for ours, pieces in by_ours(parts).items():
        stored = [source.tensors[piece.name] for piece in pieces]
        yield _joined(f"model.{ours}", pieces, stored, not_finite)
        if stored[0].dtype == torch.float8_e4m3fn:
            scales = [source.tensors[piece.name + SCALE_SUFFIX] for piece in pieces]
            yield _joined(f"model.{ours}{SCALE_SUFFIX}", pieces, scales, not_finite)


def _joined(name: str, pieces: list[HfTensor], stored: list[StoredTensor], not_finite: set[str]) -> OutputTensor:
    """Ours is its pieces one after the other: gate, then up, expert by expert."""
    shape = (*(index + 1 for index in pieces[-1].place), *stored[0].shape)
    return OutputTensor(name, stored[0].dtype, shape, partial(_slabs, stored, not_finite))


def _slabs(stored: Iterable[StoredTensor], not_finite: set[str]) -> Iterator[torch.Tensor]:
    for tensor in stored:
        for slab in _read(tensor):
            if not finite(slab):
                not_finite.add(tensor.name)
            yield slab


def _read(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    rows = tensor.shape[0]
    for first, last in slabs_of(rows, tensor.nbytes // max(rows, 1)):
        yield read_rows(tensor, first, last)


def _equal(source: Source, name: str, other: str) -> bool:
    a, b = source.tensors[name], source.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs = zip(_read(a), _read(b), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def keep_files(source: Path, run_dir: Path) -> Path | None:
    """Keep the tokenizer and what else came with the weights in the run.

    Returns:
        RUN/tokenizer/tokenizer.json, or None where the source has no tokenizer.json.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    (run_dir / SOURCE).mkdir()
    for name in KEPT_FILES.split():
        if (source / name).is_file():
            shutil.copy(source / name, run_dir / SOURCE / name)
    if not (source / "tokenizer.json").exists():
        return None
    load_tokenizer(DataConfig(tokenizer=str(source / "tokenizer.json")), iter(())).save(run_dir / "tokenizer")
    return run_dir / "tokenizer" / "tokenizer.json"
