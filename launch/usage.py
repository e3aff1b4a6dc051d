"""What `octofold --help` and `octofold VERB --help` print. Texts only."""

USAGE = """\
usage: octofold VERB [ARGUMENTS] [KEY=VALUE ...] [--FLAGS]

Pretrain DeepSeek-class mixture-of-experts models.

verbs:
  train       train a model, or go on with a run
  launch      start a job of several machines: over ssh, on Slurm, on Kubernetes
  sample      write text from a run's newest checkpoint
  status      how far a run is, how often it was started again, what failed last
  report      draw a run: loss, expert load, throughput
  inspect     what a checkpoint holds, and whether it is valid
  verify      prove a configuration: a layout against one rank, a resume, FP8 against BF16
  trace       what a step of a large job holds and sends, without the job
  import      begin a run from a Hugging Face checkpoint
  export      write a run's checkpoint for Hugging Face transformers, vLLM and others
  doctor      check this machine and the job's environment, and say what is wrong and the remedy
  rank-table  write HCCL's table of a job's devices from a list of servers, or check one

  octofold VERB --help          what a verb takes
  octofold --version
  eval "$(octofold -sc install=bash)"    tab completion (or zsh, fish)
"""

TRAIN_USAGE = """\
usage: octofold train [GROUP=OPTION ...] [KEY=VALUE ...] [--FLAGS]

Trains and writes one folder: config.yaml, metrics.jsonl, checkpoints/step_N, logs.

  octofold train experiment=quickstart
  octofold train model=moe_10m data=text data.path='corpus/*.txt' train.steps=2000
  octofold train launch.nproc_per_node=4 parallel.expert=4
  octofold train resume=runs/NAME train.steps=3000          go on with a run (or RUN/checkpoints/step_N)
  octofold train resume=latest                              go on with the run in runs/ that saved last
  octofold train run_dir=runs/mine resume=auto              go on if it holds a checkpoint, else begin

A resumed run is the same run: values that would change its course are refused unless allowed by name, such as
'resume_allow=[optim.lr,data.*]'.

groups: model data parallel precision optim train backend kernels engine checkpoint launch experiment

flags:
  --cfg job          print the whole configuration and stop (--package KEY: one part of it)
  --info [WHAT]      how Hydra composes it: defaults, defaults-tree, config, plugins, searchpath or all
  --multirun, -m     several values make several jobs, one after the other: train.seed=0,1,2
  --config-dir DIR   also look for group options in DIR, such as DIR/experiment/mine.yaml

Started by torchrun, Slurm or another launcher that sets RANK and WORLD_SIZE, it joins as that rank.
"""

LAUNCH_USAGE = """\
usage: octofold launch launch=torchrun|slurm|kubernetes [GROUP=OPTION ...] [KEY=VALUE ...]

Proves the job that `octofold train` would run with the same overrides, and starts it on launch.nodes machines with
launch.nproc_per_node ranks each. All find the run's folder under one path, or save to one store (checkpoint.dir).

  launch=torchrun launch.nodes=2 launch.rendezvous.endpoint=node1:29400     this node; started likewise on the other
  launch=torchrun launch.nodes=2 launch.hosts=[node1,node2] launch.ssh.enabled=true      all nodes, over ssh
  launch=slurm launch.nodes=2 launch.slurm.partition=gpu      a batch script, given to sbatch
  launch=slurm --multirun train.seed=0,1,2 ...                one array, a task for each job
  launch=kubernetes launch.nodes=2 launch.kubernetes.image=NAME@sha256:...     pods: docs/launching_kubernetes.md

  launch.dry_run=true        print what would be written and run, and check it
  launch.environment={NCCL_DEBUG:INFO}      variables of the ranks
"""

SAMPLE_USAGE = """\
usage: octofold sample RUN PROMPT [sample.KEY=VALUE ...]

Prints the prompt and what the newest checkpoint of the run makes of it.

  sample.tokens=200         how many tokens
  sample.temperature=0.8    0 always takes the likeliest token
  sample.top_k=50           draw from the k likeliest only; 0: from all
  sample.seed=0
"""

STATUS_USAGE = """\
usage: octofold status RUN [--json]

Prints what a run's folder tells: whether a command trains into it, steps, speed, newest checkpoint, restarts, and the
first error of the last attempt that failed, with its rank and node.

exit status: 0 running, done or stopped by a signal; 1 failed, or ended without a word
"""

INSPECT_USAGE = """\
usage: octofold inspect CHECKPOINT|RUN|URL [--tensors] [--verify] [--config]

Prints what a checkpoint holds (of a run: the newest valid one, and the others): step, sizes, the layout and the code
that wrote it; and every folder that is no valid checkpoint, with the reason.

  --tensors    name, dtype, shape and parts of each tensor
  --verify     compare every byte with its checksum
  --config     the configuration of the run, resolved

exit status: 0 valid, 1 not
"""

REPORT_USAGE = """\
usage: octofold report RUN

Draws loss, learning rate, gradient norm, expert load and throughput of a run, as PNG files and one HTML page.
"""

VERIFY_SUBJECTS = {
    "layout": """\
layout: does the configured layout compute what one rank would? Runs the job in small on CPU ranks of this machine and
on one, and compares losses, each parameter's gradient, norm, expert loads and biases, and the weights after three
steps: worst offender first, with what is wrong. Do all ranks issue the same collectives in the same order? Writes
runs/verify-layout-TIME/ (or run_dir) with result.json.

  octofold verify layout model=deepseek_v3 parallel.expert=4 parallel.data_shard=4

  verify.precision=fp64     fp64: the proof, to 1e-9; fp32: a smoke test; fp8: is the recipe's error that of one rank?
  verify.ranks=8            most ranks; larger degrees are halved, none that is above 1 below 2
  verify.steps=null         null: 3
  verify.seeds=1            repeated from train.seed, train.seed+1, ...
""",
    "precision": """\
precision: trains what `octofold train` would in FP8, in BF16, and in BF16 that differs in rounding only, on the same
batches from the same initial weights. Compares the loss curves (does FP8 stay within the bar, and does the noise floor
of the two BF16 runs allow to tell?) and holds every product of FP8 layers to FP64 and to the reference. Writes
runs/verify-precision-TIME/ (or run_dir): the runs, result.json, curves.png. Given that run_dir again, it goes on there.

  octofold verify precision experiment=quickstart precision=fp8_block precision.arithmetic=emulate

  verify.steps=null         steps of each run; null: train.steps
  verify.bar=0.0025         mean relative error of the smoothed loss that counts as none
  verify.smoothing=0.9      weight of the past in the moving average of the losses
  verify.seeds=1            three runs each: train.seed, train.seed+1, ...
""",
    "resume": """\
resume: is a run that is killed and continued the same run? Runs the job in small on CPU ranks, and again, killing a
rank in the middle of a step and continuing from the last checkpoint. Compares losses, norms, the samples of each step
and every tensor bit for bit: weights, moments, expert biases, FP8 state; what was lost is named. Writes
runs/verify-resume-TIME/ (or run_dir) with the runs and result.json.

  octofold verify resume model=deepseek_v3 parallel.expert=2 precision=fp8_block

  verify.resume_parallel={tensor:2}   continued on another layout besides; there to 1e-9 in FP64
  verify.twin=true          false: the job's own model, data and batch, on CPU ranks
  verify.steps=null         null: 6
  verify.ranks=8            as for layout
  verify.seeds=1            repeated from train.seed, train.seed+1, ...
""",
}
"""What each verification does and takes."""


def verify_usage(*subjects: str) -> str:
    """Of `octofold verify` with these subjects."""
    takes = "[GROUP=OPTION ...] [KEY=VALUE ...] [verify.KEY=VALUE ...] [--config-dir DIR]"
    told = "\n".join(VERIFY_SUBJECTS[subject] for subject in subjects)
    return f"usage: octofold verify {'|'.join(subjects)} {takes}\n\n{told}\nexit status: 0 yes, 1 no, 3 inconclusive\n"


TRACE_USAGE = """\
usage: octofold trace [GROUP=OPTION ...] [KEY=VALUE ...] [trace.KEY=VALUE ...]

Runs one training step of one rank on tensors without values, over a process group of the job's size without other
ranks: the real model, layout, kernels' shapes and optimiser. Prints what the rank holds at most and what it sends over
which class of link. Tokens choose experts at random, and all ranks are taken to choose alike.

  octofold trace model=octofold_1t data.sequence_length=4096 trace.ranks=2048 parallel.expert=64 \\
    parallel.recompute=full backend.ranks_per_node=16 train.micro_batch_size=1 train.global_batch_size=2048

  backend=ascend backend.software=true    on NPU tensors (docs/ascend.md); otherwise on CPU tensors

  trace.ranks=8        of the job
  trace.rank=0         whose step
  trace.json=false     for programs
"""

IMPORT_USAGE = """\
usage: octofold import FOLDER [GROUP=OPTION ...] [KEY=VALUE ...]

Makes a run whose step 0 holds the weights of a Hugging Face checkpoint of DeepSeek-V2, V2-Lite or V3 (BF16, FP16, FP32
or FP8 blocks, which are copied as they are), and prints its folder. Then: octofold sample RUN 'PROMPT', or
octofold train resume=RUN.

FOLDER holds config.json and model.safetensors, or its shards with model.safetensors.index.json. What follows is what
`octofold train` takes; the model comes from config.json, but for model.name, model.balance.*, model.mtp.*,
model.initializer_range and model.num_nextn_predict_layers=0.

  octofold import DeepSeek-V2-Lite run_dir=runs/lite data=text data.path='corpus/*.txt' data.sequence_length=4096
"""

EXPORT_USAGE = """\
usage: octofold export RUN [export.KEY=VALUE ...]

Writes the newest checkpoint of a run (or RUN/checkpoints/step_N) as a folder that transformers, vLLM and others load:
sharded safetensors with an index, config.json, tokenizer, model card. Prints the folder.

  export.to=FOLDER          default: RUN/export/step_N-PRECISION
  export.precision=bf16     bf16, fp32, or fp8: linear layers in E4M3 blocks, quantised from the FP32 master weights
  export.block=128          edge of the FP8 blocks
  export.scale_fmt=auto     float: FP32 scales; ue8m0: powers of two; auto: what the checkpoint holds, else float
  export.shard_gb=5         size of a file, about
  export.mtp=true           also the layers of multi-token prediction
  export.license=unknown    for the model card, such as apache-2.0
"""


DOCTOR_USAGE = """\
usage: octofold doctor [FOLDER] [--json] [backend=ascend backend.software=true]

Checks this machine and the environment that a job would have: Python, torch, CUDA and NCCL; torch_npu, CANN, the Ascend
driver and chip; ranks, rank table and HCCL's variables; interfaces and ports; processor, memory, disk, clock. What is
wrong comes with its remedy. Run it as a job would be, so that it sees what the job sees: under srun, say.

  FOLDER     where runs are to be written; default: runs
  --json     for programs: {"ok": ..., "findings": [{"status", "what", "remedy", "name"}, ...]}
  backend=ascend backend.software=true    as a run on the software NPU would find it (docs/ascend.md)

exit status: 0 nothing fails (there may be warnings), 1 something does
"""

RANK_TABLE_USAGE = """\
usage: octofold rank-table HOSTS [rank_table.KEY=VALUE ...]     prints a rank table for HCCL
       octofold rank-table TABLE.json                           checks one, of version 1.0, 1.2 or 2.0

HOSTS (a file, or - for standard input) lists a server a line, in the order of their ranks: its name or IP, then its
devices' IPs (address_0, address_1, ... of its /etc/hccn.conf) or the name of a copy of that file:

  10.0.0.1  192.168.1.8 192.168.1.9
  10.0.0.2  node2-hccn.conf

  octofold rank-table hosts.txt > rank_table.json
  export RANK_TABLE_FILE=$PWD/rank_table.json     on every server

  rank_table.devices=8                   of a server without IPs, which only a job on one server may be
  rank_table.servers_per_super_pod=0     0: version 1.0; else 1.2, with super pods (A3), where a device is written
                                         IP@SUPER_DEVICE_ID, the SDID of `npu-smi info -t spod-info -i ID -c CHIP`
"""
