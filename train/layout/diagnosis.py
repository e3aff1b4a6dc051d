"""What is wrong with a layout, in a sentence each, from how its first wrong step differs from one rank's. Torch-free.

That step is computed with equal weights on equal tokens, so a fault shows in its own place only; later every number is
wrong. A sum that is taken twice, or left out, gives gradients that are a multiple of the right ones, or that copies
disagree on; wrong counts show in the biases. What a loss contributes is known from one-rank runs without it.
"""

from collections.abc import Callable, Collection, Sequence
from math import isclose, isfinite, sqrt

import numpy as np

from octofold.train.layout.facts import Arrays, RankFacts, StepFacts
from octofold.train.layout.verdict import Difference, Key, ratio

GROUPS = ("expert weights", "gates", "norm weights", "embedding", "head", "attention weights", "feed-forward weights")
LEAST_EXPLAINED = 0.1
"""Share of a squared difference that must point the way of a loss's own gradient before that loss is accused: a part of
a loss points its way; in thousands of dimensions nothing else does."""
SAME = 1e-6
"""Relative: ratios that close are one number."""
LOSSES = ("MTP losses", "balance losses")

Without = Callable[[str], Arrays | None]
"""From one of `LOSSES` to one rank's gradients of the first step without it; None where the run has no such loss."""


def explain(
    found: Sequence[RankFacts],
    expected: RankFacts,
    differences: Sequence[Difference],
    tolerance: float,
    without: Without,
) -> list[str]:
    """Sentences, the most telling first; none where nothing differs.

    Args:
        differences: from `verdict.compare`.
    """
    wrong = [d for d in differences if d.error > tolerance]
    if not wrong:
        return []
    earliest = min((d.key.step for d in wrong if d.key.kind != "weight"), default=0)
    if not earliest:
        return ["losses, gradients, norms and biases are right, and the weights are not: the update itself"]
    at_once = {d.key: d for d in wrong if d.key.step == earliest and d.key.kind != "weight"}
    step = Step(found, expected, earliest, at_once, without if earliest == 1 else lambda loss: None)
    begins = [] if earliest == 1 else [f"steps before step {earliest} are right"]
    return begins + (step.lost() + step.loss() + step.gradients() + step.norm() + step.biases() or [str(wrong[0].key)])


class Step:
    """The first step that is wrong."""

    def __init__(
        self,
        found: Sequence[RankFacts],
        expected: RankFacts,
        number: int,
        wrong: dict[Key, Difference],
        without: Without,
    ) -> None:
        self.number, self.wrong, self.without = number, wrong, without
        self.found = {facts.rank: facts.steps[number - 1] for facts in found}
        self.before = {facts.rank: facts.steps[number - 2] for facts in found} if number > 1 else {}
        self.expected = expected.steps[number - 1]
        self.right = self.expected.gradients
        # Of several copies the first: what copies disagree on is told separately.
        self.told: Arrays = {}
        for facts in reversed(found):
            self.told |= facts.steps[number - 1].gradients
        of_gradients = {key.name: d for key, d in wrong.items() if key.kind == "gradient"}
        self.missing = {name for name, d in of_gradients.items() if d.note in ("missing on every rank", "zero")}
        self.off = sorted(name for name, d in of_gradients.items() if isfinite(d.error) and name not in self.missing)

    def has(self, *kinds: str) -> bool:
        """Whether a number of these kinds is wrong."""
        return any(key.kind in kinds for key in self.wrong)

    def lost(self) -> list[str]:
        """Parameters that the backward pass did not reach."""
        if not self.missing:
            return []
        mtp = [name for name in self.right if name.startswith("mtp.")]
        if self.missing < set(mtp):
            return [f"mtp.* gradients are missing, {len(self.missing)} of {len(mtp)}"]
        return [f"{describe(self.missing, self.right)} gradients are missing"]

    def loss(self) -> list[str]:
        """By how much the loss is off, and whether token counts explain it."""
        if not self.has("loss"):
            return []
        (key,) = (key for key in self.wrong if key.kind == "loss")
        factor, total = self.wrong[key].ratio, self.expected.own_tokens
        own = [step.own_tokens for step in self.found.values() if step.own_tokens]
        low, high, readers = total / max(own), total / min(own), total / float(np.mean(own))
        shown = f"tokens_global/tokens_local is {low:.3g}" + (f" to {high:.3g}" if high > low else "")
        if low > 1 + SAME and 0.9 * low <= factor <= 1.1 * high:
            why = "ranks divide by their own valid tokens, not by those of the whole global batch"
            return [f"loss is off by the factor {factor:.4g}, and {shown}: {why}"]
        if high > low and low / readers <= factor <= high / readers:
            why = "as if ranks divided by their own valid tokens and took the mean"
            return [f"loss is off by the factor {factor:.6g}, and {shown} ({readers:.3g} on average): {why}"]
        return [f"loss is off by the factor {factor:.6g}"]

    def gradients(self) -> list[str]:
        """Of gradients that are there and wrong; nothing where a wrong loss explains them."""
        if not self.off or self.has("loss", "MTP loss", "tokens"):
            return []
        for explanation in (self._multiples, self._whole_losses, self._copies, self._groups, self._parts_of_losses):
            if said := explanation():
                return said
        worst = max(self.off, key=lambda name: self.wrong[Key("gradient", self.number, name)].error)
        return [f"gradients of {describe(self.off, self.right)} differ, most of all {worst}"]

    def _multiples(self) -> list[str]:
        """Every wrong gradient is a multiple of the right one."""
        by_ratio: dict[float, list[str]] = {}
        for name in self.off:
            a, b = self.told[name], self.right[name]
            times = ratio(a, b)
            if not np.abs(a - times * b).max() <= SAME * np.abs(b).max():
                return []
            near = next((r for r in by_ratio if isclose(r, times, rel_tol=SAME)), times)
            by_ratio.setdefault(near, []).append(name)
        if len(by_ratio) > len(GROUPS):
            return []
        many, few = "summed once too often, or not divided", "not summed over all ranks that contribute"
        return [
            f"gradients of {describe(names, self.right)} are {times:.4g}x those of one rank: "
            f"{many if times > 1 else few}"
            for times, names in by_ratio.items()
        ]

    def _copies(self) -> list[str]:
        """Ranks that hold copies of a parameter have different gradients."""
        apart = []
        for name in self.off:
            copies = [step.gradients[name] for step in self.found.values() if name in step.gradients]
            scale = np.abs(self.right[name]).max()
            if any(np.abs(copy - copies[0]).max() > SAME * scale for copy in copies[1:]):
                apart.append(name)
        if not apart:
            return []
        return [
            f"copies of {describe(apart, self.right)} have different gradients: not summed over the ranks that copy"
        ]

    def _groups(self) -> list[str]:
        """One or two whole groups are wrong and nothing else is."""
        groups = sorted({group_of(name) for name in self.off})
        members = {name for name in self.right if group_of(name) in groups}
        if len(groups) > 2 or members != set(self.off) | (self.missing & members):
            return []
        times = [ratio(self.told[name], self.right[name]) for name in self.off]
        shown = f"unevenly {min(times):.2g}x to {max(times):.2g}x those of one rank"
        why = "contributions of some ranks are missing, or are counted more often than others"
        return [f"gradients of all {' and '.join(groups)}, and of nothing else, are {shown}: {why}"]

    def _whole_losses(self) -> list[str]:
        return self._losses(1 - SAME, "{of} are counted {times:.4g}x in the gradients of {names}")

    def _parts_of_losses(self) -> list[str]:
        return self._losses(
            LEAST_EXPLAINED, "{of} are lost, or counted twice, on some ranks: about {times:.2g}x in all"
        )

    def _losses(self, least: float, sentence: str) -> list[str]:
        """Losses whose own gradient makes up at least this share of the squared difference."""
        for loss in LOSSES:
            if (rest := self.without(loss)) is None:
                continue
            names = [name for name in self.off if name in self.right]
            apart = np.concatenate([(self.told[n] - self.right[n]).ravel() for n in names])
            own = np.concatenate([(self.right[n] - rest.get(n, 0.0)).ravel() for n in names])
            along, square = float(own @ apart), float(own @ own)
            if square and along**2 >= least * square * float(apart @ apart):
                times = 1 + along / square
                shown = sentence.format(of=loss, times=abs(round(times, 9)), names=describe(names, self.right))
                return [
                    shown
                    if abs(times) > SAME
                    else f"{loss} are missing in the gradients of {describe(names, self.right)}"
                ]
        return []

    def norm(self) -> list[str]:
        """Which parameters a wrong norm of right gradients counts how often."""
        if not self.has("gradient norm") or self.has("gradient"):
            return []
        squares = {name: float(np.square(g).sum()) for name, g in self.right.items()}
        found = self.found[min(self.found)].report["grad_norm"] ** 2
        total = sum(squares.values())
        for group in ("parameters", *GROUPS):
            part = sum(square for name, square in squares.items() if group in ("parameters", group_of(name)))
            times = (found - total + part) / part if part else 1.0
            for count in (times, 1 / times if times > 0 else 1.0):
                if round(count) > 1 and isclose(count, round(count), rel_tol=SAME):
                    return [f"gradients are right, and the norm counts {group} {times:.4g}x"]
        return [f"gradients are right, and the norm is {sqrt(found / total):.6g}x theirs"]

    def biases(self) -> list[str]:
        """Which layers' biases moved wrongly, and whether by the counts of a single rank."""
        layers = sorted(int(key.name.split()[1]) for key in self.wrong if key.kind == "bias")
        if not layers or self.has("loss"):
            return []
        local = [layer for layer in layers if any(self._moved_alone(rank, layer) for rank in self.found)]
        shown = ", ".join(map(str, local or layers))
        what = f"expert bias of layer{'s' if len(local or layers) > 1 else ''} {shown}"
        return [f"{what} moved by local counts" if local else f"{what} moved otherwise than by the counts of all ranks"]

    def _moved_alone(self, rank: int, layer: int) -> bool:
        """Whether a rank's bias moved by its own counts, and not by those of all."""
        step: StepFacts = self.found[rank]
        if layer not in step.biases or layer not in step.loads:
            return False
        moved = step.biases[layer] - (self.before[rank].biases[layer] if self.before else 0.0)
        own, right = (np.sign(loads.mean() - loads) for loads in (step.loads[layer], self.expected.loads[layer]))
        return bool((np.sign(moved) == own).all() and (own != right).any())


def group_of(name: str) -> str:
    """The kind of a parameter, one of `GROUPS`."""
    if ".mlp.experts." in name:
        return "expert weights"
    if ".mlp.gate." in name:
        return "gates"
    if "norm" in name.split(".")[-2]:
        return "norm weights"
    if name.startswith(("embed_tokens.", "lm_head.")):
        return "embedding" if name.startswith("embed") else "head"
    return "attention weights" if ".self_attn." in name else "feed-forward weights"


def describe(names: Collection[str], among: Collection[str]) -> str:
    """A few words for a set of parameters: whole groups by their name."""
    chosen, everything = set(names), set(among)
    if chosen >= everything:
        return "all parameters"
    if len(chosen) == 1:
        return next(iter(chosen))
    mtp = {name for name in everything if name.startswith("mtp.")}
    if chosen == mtp:
        return "mtp.*"
    groups = sorted({group_of(name) for name in chosen}, key=GROUPS.index)
    if all({name for name in everything if group_of(name) == group} <= chosen for group in groups):
        return f"all {' and '.join(groups)}"
    where = f" ({groups[0]})" if len(groups) == 1 else ""
    return f"{len(chosen)} parameters{where} such as {min(chosen)}"
