"""What a run measures beside its steps: the validation loss, and at the end n-gram baselines and a sample of text."""

from typing import TYPE_CHECKING, Any

from octofold.train.data.ngram import ngram_baselines
from octofold.train.evaluate import evaluate
from octofold.train.sampling import generate

if TYPE_CHECKING:
    from octofold.train.trainer import Trainer


def validate(trainer: "Trainer", sequences: int) -> dict[str, Any] | None:
    """Loss on the first `sequences` of the validation split, logged and shown; None without a split. Collective."""
    if trainer.data.validation is None:
        return None
    sequences = min(sequences, len(trainer.data.validation))
    batches = trainer.data.validation_batches(
        sequences=sequences,
        micro_batch_size=trainer.config.train.micro_batch_size,
        data_rank=trainer.meshes.data_rank,
        data_ranks=trainer.config.parallel.data,
    )
    with trainer.interval.paused(), trainer.watchdog.longer("evaluation"):
        mask = trainer.config.data.mask_documents
        loss, tokens = evaluate(
            trainer.model,
            batches,
            trainer.meshes,
            pipeline=trainer.pipeline,
            mask_documents=mask,
            device=trainer.device,
        )
    record = {
        "kind": "validation",
        "step": trainer.progress.step,
        "loss": loss,
        "loss_per_byte": loss / trainer.data.validation.bytes_per_token,
        "tokens": tokens,
    }
    trainer.log(record)
    trainer.console.validation(record)
    return record


def finish(trainer: "Trainer") -> dict[str, Any]:
    """Closing validation, n-gram baselines and a sample, as the `final` record. Collective."""
    train_s = trainer.interval.elapsed_s
    validation = validate(trainer, trainer.config.train.final_eval_sequences)
    text = ""
    if trainer.config.train.sample_tokens and not trainer.meshes.whole_model:
        trainer.console.info("no sample: no rank sees all of a sequence and a model; `octofold sample` reads the run")
    elif trainer.config.train.sample_tokens:
        text = generate(
            trainer.model,
            trainer.data.tokenizer,
            trainer.config.train.sample_prompt,
            pipeline=trainer.pipeline,
            tokens=trainer.config.train.sample_tokens,
            context=trainer.config.data.sequence_length,
            temperature=0.7,
            top_k=50,
            seed=trainer.config.train.seed,
            device=trainer.device,
        )
    record = {
        "kind": "final",
        "step": trainer.progress.step,
        "validation_loss": validation and validation["loss"],
        "validation_loss_per_byte": validation and validation["loss_per_byte"],
        "baselines": ngram_baselines(trainer.data) if validation and trainer.rank == 0 else {},
        "sample": text,
        "train_s": train_s,
    }
    trainer.log(record)
    return record
