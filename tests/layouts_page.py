"""Writes docs/layouts.md: what can be combined, from what the parity suite proves and what the rules refuse.

python tests/layouts_page.py        rewrites the page
"""

from functools import cache
from math import prod
from pathlib import Path

import numpy as np
from layout_cases import DEFAULT, FULL, Case
from layout_refusals import ON_RANKS, REFUSED, VERIFY_REFUSED, refusal

from octofold.launch.verify import VerifyConfig
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig
from octofold.train.layout.prove import FP8_BAR, FP8_GROUP_BAR, TOLERANCE
from octofold.train.layout.twin import smallest_world

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"
DEGREES = (*DENSE_DEGREES, "expert", "expert_tensor")
EXAMPLE = {"pipeline": 1, "data_shard": 2, "context": 2, "tensor": 2, "expert": 4}
"""Whose ranks are drawn."""
CASES = list(dict.fromkeys([*DEFAULT, *FULL]))
TEMPLATE = """\
# Layouts

A layout says which ranks hold what. It is an implementation detail: losses, gradients, norm, expert biases and weights
are those of one rank. This page is written by `tests/layouts_page.py` from the layouts that the parity suite proves
(`tests/layout_cases.py`) and from what the rules say; a test holds it to both.

## How ranks are numbered

```
world = pipeline x data_replicate x data_shard x context x tensor       outermost first: tensor ranks are neighbours
                                    data_shard x context x tensor = expert_data x expert x expert_tensor
```

| degree | ranks along it |
|---|---|
| `pipeline` | hold different layers |
| `data_replicate` | read different sequences; each replica holds the whole model |
| `data_shard` | read different sequences and hold shards of each parameter (FSDP2); -1: what others leave |
| `context` | hold different positions of the same sequences: chunk r from the front, chunk r from the back |
| `tensor` | hold different heads, widths and vocabulary entries; between products, different positions |
| `expert` | hold different experts; tokens travel to them |
| `expert_tensor` | hold different parts of each expert's width |
| `expert_data` | (follows from the others) hold shards of the same experts |

Experts see the ranks of a stage and replica a second time: they span data, context and tensor ranks alike, and never
cross a replica or a stage. With @example:

```
@picture
```

## How gradients are summed

The loss is divided by the valid tokens of the whole global batch, so gradients are summed and never divided. A
parameter's gradient is summed over every rank that computes with the same numbers on other tokens, and then over
`data_replicate`:

| parameter | split over | summed over |
|---|---|---|
| expert weights | `expert`, `expert_tensor` | `expert_data` |
| heads, widths, vocabulary | `tensor` | `data_shard` x `context` |
| all else (norms, gates, down-projections to latents) | nothing | `data_shard` x `context` x `tensor` |

The norm counts each element once, on whatever mesh it lives. Expert biases move by loads summed over all ranks.
`backend.all_reduce=hierarchical` takes the trainer's own sums over the world (losses, loads, the norm) node by node;
gradients are summed by FSDP2, which does as much for replicas (`data_replicate`) whose shards stay inside a node.

## What can be combined

Proved: tiny DeepSeek-V2, and V3 with multi-token prediction, over gloo ranks, in FP64 to @fp64 over three steps, and
that all ranks issue the same collectives in the same order. On the diagonal a degree alone. `make test` proves a part
of them, `make test-slow` a third on V3, `make test-matrix` all on V3 and V2.

@pairs

Three and more together, and with other options of `parallel`:

@several

FP8 in emulation: the error of the gradients against FP64 is at most @fp8 times that of FP8 on one rank, and at most
@kind times in any kind of parameters (experts, gates, norms, embedding, head, attention, feed-forward).

## What is refused

Before any process starts, or for FP8 blocks that ranks would cut, which depends on modules, before anything is
allocated. Every rule of the code has a line here: `tests/test_layouts_page.py` finds the rules, and the lines are what
they say of the tiny DeepSeek-V3:

@refused

The same of `octofold verify layout` and `verify resume`:

@verify

Found on the ranks, before anything is allocated, since it takes what only they have:

@ranks_find

## Proving a layout of your own

```
octofold verify layout model=deepseek_v3 parallel.expert=4 parallel.tensor=2 parallel.context=2
```

runs the job in small on CPU ranks of this machine and on one rank. Hidden width, depth, experts and vocabulary shrink;
groups of experts, low-rank projections, shared experts, multi-token prediction, balance losses, document masks and
accumulation stay. A world of more than @ranks ranks (`verify.ranks`) shrinks too, no degree that is above 1 to 1.
It compares losses, every parameter's gradient at every step, the norm, every expert's load and bias, the weights
after three steps, and the collectives that ranks issue, and prints the worst first, with what is wrong in a sentence
such as

```
gradients of all expert weights are 2x those of one rank: summed once too often, or not divided
gradients of all expert weights, and of nothing else, are unevenly 0.31x to 0.58x those of one rank: contributions ...
gradients are right, and the norm counts expert weights 2x
expert bias of layers 1, 2, 3 moved by local counts
loss is off by the factor 2.01, and tokens_global/tokens_local is 1.97 to 2.03: ranks divide by their own valid ...
MTP losses are missing in the gradients of ...
ranks issue different collectives, of all steps call 7: rank 0 issued all_reduce(...) on expert_data [0, 2], rank 2 ...
```

Exit status 0: yes, 1: no; `result.json` in the run folder has every number. `verify.precision=fp32` is a smoke test
(@fp32: Adam and the choice of experts amplify rounding); `verify.precision=fp8` holds the configured recipe's error
against FP64 to @fp8 times that on one rank.
"""


@cache
def page() -> str:
    """The whole page."""
    text = TEMPLATE
    for mark, lines in {
        "@example": [", ".join(f"`{name}={degree}`" for name, degree in EXAMPLE.items() if degree > 1)],
        "@picture": _picture(ParallelConfig(**EXAMPLE)),
        "@pairs": _pairs(),
        "@several": _several(),
        "@refused": _refusals(REFUSED),
        "@verify": _refusals(VERIFY_REFUSED),
        "@ranks_find": [f"- {text}" for text in ON_RANKS.values()],
        "@fp64": [f"{TOLERANCE['fp64']:.0e}"],
        "@fp32": [f"{TOLERANCE['fp32']:.0e}"],
        "@fp8": [f"{FP8_BAR}"],
        "@kind": [f"{FP8_GROUP_BAR}"],
        "@ranks": [f"{VerifyConfig().ranks}"],
    }.items():
        text = text.replace(mark, "\n".join(lines))
    return text


def _picture(config: ParallelConfig) -> list[str]:
    """Each rank's coordinates in both views."""
    ranks = prod(getattr(config, name) for name in DENSE_DEGREES)
    outer = ("pipeline", "data_replicate")
    views = {
        "dense view": (*outer, "data_shard", "context", "tensor"),
        "experts' view": (*outer, "expert_data", "expert", "expert_tensor"),
    }
    lines = [f"{'rank':<26}" + "".join(f"{rank:>4}" for rank in range(ranks))]
    for view, axes in views.items():
        places = np.unravel_index(np.arange(ranks), [getattr(config, name) for name in axes])
        for axis, numbers in zip(axes, places, strict=True):
            if getattr(config, axis) > 1:
                lines.append(f"{view:<15}{axis:<11}" + "".join(f"{number:>4}" for number in numbers))
                view = ""
    return lines


def _pairs() -> list[str]:
    """A triangle of every two degrees, each alone on the diagonal."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in DEGREES) + " |", "|---" * (len(DEGREES) + 1) + "|"]
    for row, first in enumerate(DEGREES):
        cells = [_cell(first, second) for second in DEGREES[: row + 1]]
        lines.append(f"| `{first}` | " + " | ".join([*cells, *[""] * (len(DEGREES) - row - 1)]) + " |")
    return lines


def _several() -> list[str]:
    """The proved layouts of three degrees and more, and those with other options."""
    listed = [case for case in CASES if len(_degrees(case)) > 2 or _has_options(case)]
    return [
        f"- {_ranks_of(case)} ranks: `{case.degrees}`" for case in sorted(listed, key=lambda c: (_ranks_of(c), str(c)))
    ]


def _has_options(case: Case) -> bool:
    return any(text.split("=")[0] not in DEGREES for text in case.degrees.split())


def _degrees(case: Case) -> dict[str, int]:
    named = (text.split("=") for text in case.degrees.split())
    return {name: int(value) for name, value in named if name in DEGREES and int(value) > 1}


def _ranks_of(case: Case) -> int:
    return smallest_world(ParallelConfig(**_degrees(case)))


def _cell(first: str, second: str) -> str:
    wanted = {first, second}
    if any(wanted == set(_degrees(case)) for case in CASES):
        return "proved"
    if any(wanted <= set(_degrees(case)) for case in CASES):
        return "proved with others"
    return "refused" if refusal(" ".join(f"parallel.{name}=2" for name in sorted(wanted))) else "not proved"


def _refusals(texts: list[str]) -> list[str]:
    lines = ["| overrides | refused | rule | remedy |", "|---|---|---|---|"]
    for text in texts:
        error = refusal(text)
        assert error is not None, f"{text} is not refused"
        cells = [f"`{text}`", f"`{str(error).splitlines()[0]}`", error.rule, error.remedy]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
