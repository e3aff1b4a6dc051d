"""What a configuration changes of a saved run, key by key, and what that does to the run's course. Torch-free.

A resumed run is the same run, so each key that differs from what its checkpoint was saved with is one of `EFFECTS`:

    none      the course is the same to the bit: folders, logging, checkpoints, how many threads read data
    rounding  the same within what layouts promise: degrees of parallelism, micro-batches, providers of kernels, device
    length    train.steps: the run ends elsewhere, and so does its schedule; who gives it means it
    course    other numbers from here on: data, optimiser, precision, seed. Refused unless resume_allow names the key
    model     the saved tensors are those of another model: refused, whatever is allowed

A key that no rule mentions changes the course: a new one has to be shown to be harmless before it counts as such.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig

EFFECTS = {
    "none": "changes nothing of the course",
    "rounding": "the same course within rounding",
    "length": "the run, and its schedule, end elsewhere",
    "course": "changes the course",
    "model": "makes it another model",
}
RULES = [
    ("none", r"name|run_dir|resume|resume_allow|launch\..*|checkpoint\..*|model\.(name|initializer_range)"),
    ("none", r"train\.(log_every|eval_every|(final_)?eval_sequences|sample_prompt|sample_tokens|log_communication)"),
    ("none", r"train\.(hang_timeout_s|slow_rank_factor)|backend\.hccl_buffer_mb"),
    (
        "none",
        r"train\.(wandb|tensorboard)|backend\.(timeout_s|peak_.*)|precision\.(watch_every|keep_weights)",
    ),
    ("none", r"train\.(max_anomalies|anomaly_window|check_replicas_every|recheck_every)"),
    ("none", r"data\.(workers|cache_dir|max_corrupt_share)"),
    # Tokens that find no place are dropped, and sums in BF16 round more than a layout may.
    ("course", r"parallel\.(expert_capacity|reduce_dtype)"),
    ("rounding", r"parallel\..*|kernels\..*|train\.(micro_batch_size|deterministic)"),
    ("rounding", r"backend\.(name|software|threads|ranks_per_node|ranks_per_supernode|all_reduce)"),
    ("length", r"train\.steps"),
    # Names or shapes of tensors.
    (
        "model",
        r"model\.(architecture|vocab_size|hidden_size|num_hidden_layers|first_k_dense_replace|.*intermediate_size)",
    ),
    ("model", r"model\.(tie_word_embeddings|num_attention_heads|(q|kv)_lora_rank|.*_head_dim|n_routed_experts)"),
    ("model", r"model\.(n_shared_experts|scoring_func|topk_method|num_nextn_predict_layers)|data\.bpe_vocab_size"),
]
"""(effect, keys), the first that matches."""


@dataclass(frozen=True)
class Change:
    """A key whose value is not the saved one."""

    key: str
    saved: Any
    now: Any
    effect: str
    """One of `EFFECTS`."""

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.saved)} -> {shown(self.now)}"


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value) if isinstance(value, str) else json.dumps(value)


def differences(saved: JobConfig, now: JobConfig) -> list[Change]:
    """Every key whose value differs, what matters most first."""
    before, after = _flat(asdict(saved)), _flat(asdict(now))
    changes = [Change(k, before[k], after[k], effect(k, before[k], after[k])) for k in after if before[k] != after[k]]
    order = list(EFFECTS)
    return sorted(changes, key=lambda change: -order.index(change.effect))


def effect(key: str, saved: Any, now: Any) -> str:
    """What the change of a key does: one of `EFFECTS`."""
    if key == "precision.arithmetic" and {saved, now} == {"native", "emulate"}:
        return "rounding"  # emulated FP8 is computed exactly as the device would
    if key == "data.source" and now == "hub":
        return "model"  # a stream has a position of its own, which no other source has saved
    if key.startswith("kernels.") and any(":" in name for name in (saved, now)):
        return "course"  # whoever writes a provider says what it computes
    return next((found for found, keys in RULES if re.fullmatch(keys, key)), "course")


def require_allowed(changes: Sequence[Change], allowed: Sequence[str], where: str, *, begun: bool = True) -> None:
    """Raise unless a run that goes on with these changes keeps its promise, or gives it up by name.

    Args:
        allowed: names of keys, with * and ?, that may change the course.
        where: the run, as the user named it.
        begun: whether the run has made a step; before that there is no course to change.

    Raises:
        UserError: the changes, all of them, with those that are refused first.
    """
    refused = [
        c
        for c in changes
        if c.effect == "model" or (begun and c.effect == "course" and not _is_allowed(c.key, allowed))
    ]
    if not refused:
        return
    listed = "\n".join(f"  {change}  ({EFFECTS[change.effect]})" for change in changes if change.key != "resume")
    rule = "a resumed run is the same run; what changes its course is allowed by name, and its model stays"
    names = ",".join([*allowed, *(change.key for change in refused if change.effect == "course")])
    values = " ".join(f"{change.key}={shown(change.saved)}" for change in refused)
    remedies = [f"leave the values as they were: {values}", "begin a run in another run_dir"]
    if not any(change.effect == "model" for change in refused):
        remedies.insert(1, f"allow them: 'resume_allow=[{names}]'")
    remedy = f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    raise UserError(f"{where} was saved with other values\n{listed}\n  rule:   {rule}\n  remedy: {remedy}")


def check_names(allowed: Sequence[str]) -> None:
    """Raise `ConfigError` for a name in resume_allow that matches no key."""
    keys = _flat(asdict(JobConfig()))
    for name in allowed:
        if not any(fnmatchcase(key, name) for key in keys):
            rule = "names of keys, with * and ?"
            raise ConfigError("resume_allow", name, rule, "such as 'resume_allow=[optim.lr,data.*]'")


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(fnmatchcase(key, name) for name in allowed)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
