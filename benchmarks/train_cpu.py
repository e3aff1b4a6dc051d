"""Training speed of the quickstart's model on this CPU, beside transformers' DeepSeek-V3 of the same dimensions.

    .venv/bin/python benchmarks/train_cpu.py [--steps 12] [--threads 2]

All start from the same weights, see the same batches of the standard library's source in the same process with the
same number of threads, and take the same AdamW steps; Octofold in BF16 and in emulated FP8 (precision=fp8_block, with
the moments of the others). The contestants take turns step by step, so that a drift of the machine's speed meets all of
them. Printed: the median tokens per second, their ratios, and the loss of the last step, which must agree for the
ratios to mean anything.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from octofold.backends.config import BackendConfig
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.train.build import build_engine, build_model
from octofold.train.config import OptimConfig, RunConfig, TrainConfig, validate
from octofold.train.data.build import build_data
from octofold.train.data.config import DataConfig
from octofold.train.loss import summed_cross_entropy
from octofold.train.models.config import BalanceConfig, ModelConfig
from octofold.train.precision.config import PrecisionConfig

SEQUENCES, LENGTH = 8, 512
MODEL = ModelConfig(name="moe_10m", balance=BalanceConfig(bias_update_rate=0.0))
FP8 = PrecisionConfig("fp8_block", arithmetic="emulate")
OPTIM = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=10)

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]


def peer_config(model: ModelConfig, vocab_size: int) -> DeepseekV3Config:
    """The same dimensions in transformers' terms."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        n_routed_experts=model.n_routed_experts,
        n_shared_experts=model.n_shared_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=model.first_k_dense_replace,
        norm_topk_prob=model.norm_topk_prob,
        routed_scaling_factor=model.routed_scaling_factor,
        rms_norm_eps=model.rms_norm_eps,
        rope_interleave=True,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )


def peer_step(peer: DeepseekV3ForCausalLM, *, autocast: bool) -> Step:
    """A training step of the peer, with torch's fused AdamW and the same clipping and warm-up."""
    matrices = [p for n, p in peer.named_parameters() if p.ndim >= 2 and "embed_tokens" not in n]
    others = [p for n, p in peer.named_parameters() if not (p.ndim >= 2 and "embed_tokens" not in n)]
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (OPTIM.beta1, OPTIM.beta2)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=betas, eps=OPTIM.eps, fused=True)
    taken = 0

    def step(tokens_BS: torch.Tensor, labels_BS: torch.Tensor, positions_BS: torch.Tensor) -> float:
        nonlocal taken
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = peer(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
        loss = summed_cross_entropy(logits, labels_BS) / labels_BS.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), OPTIM.clip_norm)
        taken += 1
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * min(1.0, taken / OPTIM.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def octofold_step(config: RunConfig, vocab_size: int, weights: dict[str, torch.Tensor]) -> Step:
    """A training step of Octofold, starting from the peer's weights."""
    model = build_model(config, torch.device("cpu"), vocab_size).model
    engine = build_engine(model, config.optim, total_updates=1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = weights[name if name.startswith("lm_head") else f"model.{name}"]
            parameter.to_local().copy_(source)

    def step(tokens_BS: torch.Tensor, labels_BS: torch.Tensor, positions_BS: torch.Tensor) -> float:
        loss = summed_cross_entropy(model(tokens_BS, positions_BS), labels_BS) / labels_BS.numel()
        engine.backward(loss, last=True)
        engine.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each, after two to warm up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    backend = resolve("cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        joined(backend, BackendConfig(name="cpu", threads=arguments.threads), RankInfo()),
    ):
        train = TrainConfig(global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES)
        config = RunConfig(model=MODEL, optim=OPTIM, train=train, data=DataConfig(sequence_length=LENGTH))
        config = validate(config, 1)
        data = build_data(config.data, seed=0, run_dir=Path(folder))
        loader = data.loader(global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES, data_rank=0, data_ranks=1)
        torch.manual_seed(0)
        vocab_size = 320
        peers = [DeepseekV3ForCausalLM(peer_config(MODEL, vocab_size)) for _ in range(2)]
        peers[1].load_state_dict(peers[0].state_dict())
        weights = {name: tensor.clone() for name, tensor in peers[0].state_dict().items()}
        contestants = {
            "octofold bf16": octofold_step(config, vocab_size, weights),
            "octofold fp8 emulated": octofold_step(replace(config, precision=FP8), vocab_size, weights),
            "transformers fp32": peer_step(peers[0], autocast=False),
            "transformers bf16 autocast": peer_step(peers[1], autocast=True),
        }
        print(backend.capabilities(0).device_name)
        times_s: dict[str, list[float]] = {name: [] for name in contestants}
        losses: dict[str, float] = {}
        for number in range(arguments.steps + 2):
            (batch,) = loader.next_step()
            for name, step in contestants.items():
                began_s = time.perf_counter()
                losses[name] = step(batch.tokens_BS, batch.labels_BS, batch.positions_BS)
                if number >= 2:
                    times_s[name].append(time.perf_counter() - began_s)
        report(times_s, losses)


def report(times_s: dict[str, list[float]], losses: dict[str, float]) -> None:
    """Print the table; ratios are medians over the rounds, each round measured back to back."""
    tokens = SEQUENCES * LENGTH
    ours = next(iter(times_s))
    print(f"{'':28}{'tokens/s':>10}{'loss':>9}{'octofold is faster by':>24}")
    for name, seconds in times_s.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(seconds, times_s[ours], strict=True))
        print(f"{name:28}{tokens / statistics.median(seconds):10,.0f}{losses[name]:9.4f}{ratio:23.2f}x")


if __name__ == "__main__":
    main()
