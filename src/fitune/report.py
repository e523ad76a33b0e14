"""A run folder as one page: report.html, self-contained (no script, font or picture from elsewhere).

In: the files of a run folder. Out: the page. It can be made again from the folder at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fitune.charts import Series, line_chart
from fitune.checkpoint import RunFolder
from fitune.files import write_atomic
from fitune.pages import render

MIB = 2**20


def _numbers(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    def loss(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    share = result["trainable_parameters"] / result["total_parameters"]
    return [
        ("held-out loss of the base", loss(result["base_held_out_loss"])),
        ("held-out loss before", loss(result["held_out_loss_before"])),
        ("held-out loss after", loss(result["held_out_loss_after"])),
        ("trainable parameters", f"{result['trainable_parameters']:,} ({share:.2%})"),
        ("steps", f"{result['steps']:,}"),
        ("real tokens/s", f"{result['real_tokens_per_second']:,.0f}"),
        ("training time", f"{result['seconds']:,.1f} s"),
    ]


def _memory(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted beside measured by component, MiB: of the largest step, and what is there beside the tensors."""
    steps = [moment for moment in plan["phases"] if moment["phase"] in ("forward", "loss", "backward")]
    parts = max(steps or plan["phases"], key=lambda moment: moment["bytes"])["parts"]
    found = {**measured.get("parts", {}), **measured.get("at_the_end", {})}
    rows = [
        {"what": name, "predicted": parts.get(name, 0) / MIB, "measured": found.get(name, 0) / MIB if found else None}
        for name in dict.fromkeys([*parts, *found])
    ]
    beside = [{"what": name, "predicted": size / MIB, "measured": None} for name, size in plan["outside"].items()]
    return [*rows, *beside]


def write(run: RunFolder) -> None:
    """Write report.html from what lies in the run folder."""
    records, result, plan, data = run.read_steps(), run.read("result"), run.read("plan"), run.read("data")
    answers = run.read("answers") if run.has("answers") else []
    score = run.read("score") if run.has("score") else None
    config = run.read_config()
    held_out = [(float(r.step), r.held_out_loss) for r in records if r.held_out_loss is not None]
    if result["held_out_loss_before"] is not None:
        held_out = [(0.0, result["held_out_loss_before"]), *held_out]
    loss_chart = line_chart(
        [
            Series("training", [(r.step, r.loss) for r in records if r.applied], "--line1"),
            Series("held-out", held_out, "--line2", marks=True),
        ],
        x_label="step",
        y_label="loss",
    )
    lr_chart = line_chart([Series("lr", [(r.step, r.lr) for r in records])], x_label="step", y_label="learning rate")
    page = render(
        "report",
        title=f"fitune: {config.method} on {config.model.replace(chr(92), '/').rpartition('/')[2]}",
        subtitle=result["run"],
        numbers=_numbers(result),
        loss_chart=loss_chart,
        lr_chart=lr_chart,
        answers=answers,
        score=score and f"exact match {score['base_accuracy']:.0%} before, {score['tuned_accuracy']:.0%} after",
        memory=_memory(plan, run.read("measured") if run.has("measured") else {}),
        cuda=plan["device"] == "cuda",
        kept=plan.get("kept", []),
        result=result,
        findings=[*data["findings"], *(run.read("checks") if run.has("checks") else [])],
        settings=yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False),
        environment=yaml.safe_dump(run.read("environment"), allow_unicode=True, sort_keys=False),
    )
    write_atomic(run.report, page)
