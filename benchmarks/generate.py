"""Generation speed of the quickstart's model on this CPU, beside transformers' DeepSeek-V3 with the same weights.

    .venv/bin/python benchmarks/generate.py [--prompts 32 2048] [--tokens 200] [--rounds 5] [--threads 2]

Both continue the same prompts greedily, each with its cache; ours goes token by token through the code of
`octofold sample`. They take turns, so that a drift of the machine's speed meets both. Printed for each length of
prompt: the median of new tokens per second, reading the prompt included, the median ratio, and what each cache keeps
of a token. In FP32 both texts must be the same.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from train_cpu import MODEL, peer_config
from transformers import DeepseekV3ForCausalLM

from octofold.backends.config import BackendConfig
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.train.build import COMPUTE_DTYPES, build_model
from octofold.train.config import PrecisionConfig, RunConfig, validate
from octofold.train.models.attention import LatentCache
from octofold.train.models.decoder import Decoder
from octofold.train.sampling import generate_ids

VOCAB_SIZE = 320

Write = Callable[[list[int], int], list[int]]
"""From a prompt and a number of tokens to the ids that follow."""


def octofold(precision: str, weights: dict[str, torch.Tensor]) -> tuple[Decoder, Write]:
    """Our model with the peer's weights, as `octofold sample` holds it."""
    config = validate(RunConfig(model=MODEL, precision=PrecisionConfig(precision)), 1)
    built = build_model(config, torch.device("cpu"), VOCAB_SIZE)
    assert isinstance(built.model, FSDPModule)
    built.model.set_reshard_after_forward(False)
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            parameter.to_local().copy_(weights[name if name.startswith("lm_head") else f"model.{name}"])

    def write(prompt: list[int], tokens: int) -> list[int]:
        return generate_ids(
            built.model,
            prompt,
            tokens=tokens,
            context=len(prompt) + tokens,
            vocab_size=VOCAB_SIZE,
            eos_id=None,
            temperature=0.0,
            top_k=0,
            seed=0,
            device=torch.device("cpu"),
        )

    return built.model, write


def transformers(peer: DeepseekV3ForCausalLM) -> Write:
    """The peer with its own loop and its own cache."""

    def write(prompt: list[int], tokens: int) -> list[int]:
        prompt_1S = torch.tensor([prompt])
        generated = peer.generate(
            prompt_1S,
            # Given, since the library would take the token 0 for padding.
            attention_mask=torch.ones_like(prompt_1S),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return generated[0, len(prompt) :].tolist()

    return write


@torch.no_grad()
def cache_bytes(model: Decoder, peer: DeepseekV3ForCausalLM) -> tuple[int, int]:
    """What our cache and the peer's keep of one token."""
    tokens_BS, positions_BS = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    ours = LatentCache(MODEL.num_hidden_layers, capacity=1)
    model(tokens_BS, positions_BS, cache=ours)
    layers: Any = peer(tokens_BS, use_cache=True).past_key_values.layers
    return ours.size_bytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def compare(precision: str, weights: dict[str, torch.Tensor], arguments: argparse.Namespace) -> None:
    """Print the rows of one precision."""
    peer = DeepseekV3ForCausalLM(peer_config(MODEL, VOCAB_SIZE)).eval()
    peer.load_state_dict(weights)
    peer.to(COMPUTE_DTYPES[precision])
    peer.config.max_position_embeddings = max(arguments.prompts) + arguments.tokens  # else it warns
    model, ours = octofold(precision, weights)
    contestants, kept_bytes = {"octofold": ours, "transformers": transformers(peer)}, cache_bytes(model, peer)
    for length in arguments.prompts:
        prompt = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        times_s: dict[str, list[float]] = {name: [] for name in contestants}
        texts: dict[str, list[int]] = {}
        for number in range(arguments.rounds + 1):
            for name, write in contestants.items():
                began_s = time.perf_counter()
                texts[name] = write(prompt, arguments.tokens)
                if number:  # the first warms up
                    times_s[name].append(time.perf_counter() - began_s)
        if precision == "fp32" and texts["octofold"] != texts["transformers"]:
            sys.exit("the texts differ")
        for (name, seconds), size_bytes in zip(times_s.items(), kept_bytes, strict=True):
            speed = arguments.tokens / statistics.median(seconds)
            ratio = statistics.median(theirs / own for theirs, own in zip(seconds, times_s["octofold"], strict=True))
            print(f"{precision} {length:6,} {name:12}{speed:10,.1f}{ratio:23.2f}x{size_bytes:21,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 2048], help="their lengths in tokens")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="counted texts of each prompt, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    backend = resolve("cpu")
    with joined(backend, BackendConfig(name="cpu", threads=arguments.threads), RankInfo()):
        torch.manual_seed(0)
        weights = DeepseekV3ForCausalLM(peer_config(MODEL, VOCAB_SIZE)).state_dict()
        print(backend.capabilities(0).device_name)
        print(f"     prompt {'':12}{'tokens/s':>10}{'octofold is faster by':>24}{'cache bytes a token':>21}")
        for precision in ("fp32", "bf16"):
            compare(precision, weights, arguments)


if __name__ == "__main__":
    main()
