"""Numbers that no run can work with are refused by key, before anything is built."""

from dataclasses import replace
from typing import Any

import pytest

from octofold.backends.errors import ConfigError
from octofold.train.build import model_config
from octofold.train.config import RunConfig, validate
from octofold.train.models.config import ModelConfig

REFUSED: list[tuple[str, Any]] = [
    ("optim.lr", float("inf")),
    ("optim.lr", float("nan")),
    ("optim.lr", -1.0),
    ("optim.eps", float("inf")),
    ("optim.weight_decay", -0.1),
    ("optim.clip_norm", -1.0),
    ("optim.warmup_steps", -1),
    ("optim.beta2", 1.0),
    ("train.steps", 0),
    ("train.eval_every", -1),
    ("train.eval_sequences", 0),
    ("checkpoint.every_steps", 0),
    ("checkpoint.keep", -1),
    ("backend.timeout_s", 0.0),
    ("backend.hccl_buffer_mb", -1),
    ("backend.threads", -1),
    ("backend.ranks_per_node", -1),
    ("backend.ranks_per_supernode", -8),
    ("model.q_lora_rank", 0),
    ("model.n_shared_experts", -1),
    ("model.initializer_range", -0.02),
    ("model.balance.bias_update_rate", float("nan")),
    ("model.rms_norm_eps", 0.0),
    ("model.rope_theta", -1.0),
    ("model.vocab_size", -1),
]


def _changed(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(config, **{name: _changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda part: str(part))
def test_refused(key: str, value: Any) -> None:
    changed = _changed(RunConfig(), key, value)
    with pytest.raises(ConfigError) as caught:
        validate(changed, 1)
    assert str(caught.value).startswith(f"{key}={value}")
    assert caught.value.remedy


def test_sequences_fit_the_model() -> None:
    config = RunConfig(model=ModelConfig(max_position_embeddings=256))
    with pytest.raises(ConfigError, match=r"^data\.sequence_length=512 model\.max_position_embeddings=256\n"):
        validate(config, 1)
    config = RunConfig(model=ModelConfig(num_nextn_predict_layers=512))
    with pytest.raises(ConfigError, match=r"^model\.num_nextn_predict_layers=512 data\.sequence_length=512\n"):
        validate(config, 1)


def test_a_vocabulary_has_room_for_the_tokenizer() -> None:
    assert model_config(ModelConfig(), 257).vocab_size == 320
    assert model_config(ModelConfig(vocab_size=300), 257).vocab_size == 300
    with pytest.raises(ConfigError, match=r"model\.vocab_size=100"):
        model_config(ModelConfig(vocab_size=100), 257)
