"""A run's tokenizer as transformers' AutoTokenizer loads it."""

import json
import shutil
from pathlib import Path
from typing import Any

from octofold.train.data.tokenizer import Tokenizer

END = "<|endoftext|>"
"""The byte tokenizer's end of text has no name of its own."""


def write_tokenizer(folder: Path, saved: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Args:
        saved: RUN/tokenizer.
    """
    if tokenizer.kind == "bytes":
        _byte_tokenizer().save(str(folder / "tokenizer.json"))
        eos = END
    else:
        shutil.copy(saved / "tokenizer.json", folder / "tokenizer.json")
        eos = json.loads((saved / "octofold_tokenizer.json").read_text())["eos"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_tokenizer() -> Any:
    """256 bytes and an end of text in the `tokenizers` library: byte-level BPE without merges."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return inner


def _letters() -> list[str]:
    """How byte-level tokenizers spell each byte: itself if it prints in Latin-1, else a letter from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
