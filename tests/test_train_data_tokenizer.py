"""Tokenizers: round trips, saving, end-of-text tokens, and BPE that comes out the same every time."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.config import DataConfig
from octofold.train.data.tokenizer import ByteTokenizer, load_saved_tokenizer, load_tokenizer, train_bpe

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}  # naïve ☃\n" for i in range(60)]
BPE = train_bpe(iter(TEXTS), vocab_size=320)


def word_level(path, vocabulary):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(path))
    return DataConfig(tokenizer=str(path))


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_byte_and_bpe_round_trips(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_bytes_are_utf8_and_eos_is_256():
    tokenizer = load_tokenizer(DataConfig(), iter(()))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0x41, 256, 999]) == "\ufffdA"


def test_bpe_compresses_and_is_deterministic():
    assert BPE.vocab_size == 320
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    for text, ids in zip(TEXTS[:3], BPE.encode_batch(TEXTS[:3]), strict=True):
        assert np.array_equal(ids, BPE.encode(text))
    program = (
        "from octofold.train.data.tokenizer import train_bpe\n"
        f"print(train_bpe(iter({TEXTS!r}), vocab_size=320).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == BPE.fingerprint
    assert train_bpe(iter(TEXTS[:30]), vocab_size=320).fingerprint != BPE.fingerprint


def test_special_tokens_in_text_are_text():
    text = "a <|endoftext|> b"
    assert BPE.eos_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": BPE}[name]
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_saved_tokenizer(tmp_path / "tokenizer")
    for attribute in ("kind", "vocab_size", "eos_id", "fingerprint"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert np.array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_nothing_saved(tmp_path):
    with pytest.raises(UserError, match="no saved tokenizer"):
        load_saved_tokenizer(tmp_path)


def test_tokenizer_json(tmp_path):
    config = word_level(tmp_path / "tokenizer.json", ["[UNK]", "</s>", "one", "two", "three", "four"])
    tokenizer = load_tokenizer(config, iter(()))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("file", 6, 1)
    # Neither its truncation nor its padding applies.
    assert tokenizer.encode("four one two three six").tolist() == [5, 2, 3, 4, 0]


def test_tokenizer_json_declares_its_eos_beside_it(tmp_path):
    config = word_level(tmp_path / "tokenizer.json", ["[UNK]", "</s>", "one"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "one"}}')
    assert load_tokenizer(config, iter(())).eos_id == 2


def test_tokenizer_json_without_eos_gets_one(tmp_path, caplog):
    tokenizer = load_tokenizer(word_level(tmp_path / "t.json", ["[UNK]", "one"]), iter(()))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (3, 2)
    assert "no end-of-text token" in caplog.text
    tokenizer.save(tmp_path / "saved")
    assert load_saved_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_broken_tokenizer_json(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")), iter(()))


def test_auto_tokenizer_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path / "bpe")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "bpe" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    fast.save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "folder")), iter(()))
    assert (tokenizer.kind, tokenizer.eos_id) == ("file", BPE.eos_id)
    assert tokenizer.encode(TEXTS[5]).tolist() == fast(TEXTS[5], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[5])) == TEXTS[5]


def test_folder_that_is_no_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="AutoTokenizer cannot read it"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), iter(()))


def test_folder_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'octofold\[hf\]'"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), iter(()))
