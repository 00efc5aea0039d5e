"""What happened, in words."""

from __future__ import annotations

from reslora_kernels.cli.demo.experiment import Results, Run
from reslora_kernels.cli.demo.settings import BASELINE


def findings(results: Results) -> list[str]:
    """What happened, in sentences, in favour of nobody."""
    lora, others = results.runs[0], results.runs[1:]
    last = lora.curve.losses[-1]
    ranking = sorted(results.runs, key=lambda run: run.curve.losses[-1])
    said = [
        "Last evaluation loss, lowest first: "
        + ", ".join(f"{run.title} {run.curve.losses[-1]:.4f}" for run in ranking)
        + f" (before fine-tuning: {results.base.python_loss:.4f})."
    ]
    for run in others:
        difference = run.curve.losses[-1] - last
        verdict = f"ended {abs(difference):.4f} {'below' if difference < 0 else 'above'} plain LoRA"
        if run.steps_to_reach_lora is None:
            said.append(f"{name(run).capitalize()} {verdict} and did not reach its last loss.")
        else:
            said.append(
                f"{name(run).capitalize()} {verdict} and reached its last loss at step {run.steps_to_reach_lora:.0f} "
                f"of {lora.curve.steps[-1]}."
            )
    for run in results.runs:
        if len(run.merges) == 1:
            said.append(f"Merging {name(run)} is exact: the loss changed by {run.merges[0].loss_added:+.1e}.")
        elif run.merges:
            costs = ", ".join(f"{merge.method} {added(merge.loss_added)}" for merge in run.merges)
            said.append(f"Merging {name(run)} added to the loss: {costs}.")
    said.append("One seed on one small model: differences of a few thousandths are no ranking of the methods.")
    return said


def name(run: Run) -> str:
    return "plain LoRA" if run.shortcut == BASELINE else f"the {run.title} shortcut"


def added(difference: float) -> str:
    """A difference of losses with its sign and four decimals, and no sign where those are all zero."""
    rounded = round(difference, 4)
    return f"{rounded:+.4f}" if rounded else "0.0000"
