"""What a resume has lost, in a sentence each, from how a continued run differs from the undisturbed one. Torch-free.

Where a run is continued its standing is compared with that of the undisturbed run at the same moment, so a part that
was not saved, or not loaded, shows there and by name. A standing that is right and steps that are not point to what no
checkpoint holds.
"""

from collections.abc import Sequence

from octofold.train.layout.verdict import Difference

SHOWN = 3
"""Names in a sentence."""
STATE = {
    "loader": ("data cursor", "samples would be repeated or left out"),
    "loss_scale": ("loss scale", "it would be found again by overflows"),
    "anomalies": ("memory of anomalies", "spikes would be judged by other steps, and the bound would begin anew"),
    "placement": ("expert placement", "experts stand on other ranks than before, or the loads that move them are lost"),
    "updates": ("applied updates", "the schedules of learning rate and biases go by them"),
    "tokens_seen": ("tokens seen", "the account of tokens is wrong"),
    "step": ("step", "the run stands elsewhere"),
}
"""What a part of the state is called, and what its loss means, by the first part of its name."""
TENSORS = {
    "bias": ("expert biases", "the load would have to be balanced again"),
    "moment": ("moments of the optimiser", "AdamW would begin anew"),
    "FP8 state": ("FP8 scaling histories", "scales would come from other steps"),
    "weight": ("weights", "the model is another one"),
}


def explain(differences: Sequence[Difference], stood_at: int) -> list[str]:
    """Sentences, the most telling first; none where nothing differs.

    Args:
        differences: of the continued run from the undisturbed one, all of which count.
        stood_at: steps made when it was continued.
    """
    before = [d for d in differences if d.key.step <= stood_at and not _is_standing(d)]
    if before:
        first = min(d.key.step for d in before)
        return [f"step {first} differs, before anything was continued: the run itself is not repeatable"]
    standing = [d for d in differences if d.key.step == stood_at and _is_standing(d)]
    if standing:
        return [*_state(standing), *_tensors(standing)]
    after = [d for d in differences if d.key.step > stood_at]
    if not after:
        return []
    first = min(d.key.step for d in after)
    at_once = [d for d in after if d.key.step == first]
    if any(d.key.kind == "samples" for d in at_once):
        return [f"step {first} reads other samples, though the data cursor is the same: the order of data has changed"]
    what = ", ".join(dict.fromkeys(f"{d.key.kind} {d.key.name}".strip() for d in at_once[:SHOWN]))
    return [
        f"what a checkpoint holds is as it was, and step {first} differs ({what}): something else decides the course, "
        "such as a random state that is not derived from the step, or a cache that loading leaves as it was"
    ]


def _is_standing(difference: Difference) -> bool:
    return difference.key.kind == "state" or difference.key.kind in TENSORS


def _state(standing: Sequence[Difference]) -> list[str]:
    said = []
    for part, (what, meaning) in STATE.items():
        of_part = [d for d in standing if d.key.kind == "state" and d.key.name.split(".")[0].split("[")[0] == part]
        if of_part:
            named = "; ".join(f"{d.key.name}: {d.note}" for d in of_part[:SHOWN])
            said.append(f"{what} not as it was ({named}): {meaning}")
    known = [d for d in standing if d.key.kind == "state" and d.key.name.split(".")[0].split("[")[0] not in STATE]
    return said + [f"{d.key.name} not as it was ({d.note})" for d in known[:SHOWN]]


def _tensors(standing: Sequence[Difference]) -> list[str]:
    said = []
    for kind, (what, meaning) in TENSORS.items():
        of_kind = [d for d in standing if d.key.kind == kind]
        if not of_kind:
            continue
        how = "are zero" if all(d.note == "zero" for d in of_kind) else "differ"
        names = ", ".join(sorted(d.key.name for d in of_kind)[:SHOWN])
        more = f" and {len(of_kind) - SHOWN} more" if len(of_kind) > SHOWN else ""
        said.append(f"{what} {how} ({names}{more}): {meaning}")
    return said
