"""What `against.py` makes of its processes' results: parity, figures, a table, a picture.

In: the JSON of each process (`systems/meter.py`). Out: one record of a comparison, with all rounds in it; everything
printed is computed from the record, so that a table made of the file is the one that was printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from fitune.views.charts import svg_of, text_width

# Of the loss per label, in each step. In fp32 it is less than what computing in bf16 moves: a system that does so
# although fp32 was asked for is off by 4e-4 to 9e-4.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}

Run = dict[str, Any]


def new(
    setting: dict[str, Any], where: dict[str, Any], rows: dict[str, Any], systems: dict[str, dict[str, Any]]
) -> Run:
    """A comparison before its first round.

    Args:
        setting: what all systems share.
        where: commit, date, machine.
        rows: rows.json of `systems/prepare.py`.
        systems: of each its options, and what it is compared with.
    """
    steps = rows["steps"]
    return {
        **where,
        "setting": setting,
        "parameters": rows["parameters"],
        "trained": rows["trained"],
        "floors": rows["floors"],
        "tokens": [sum(len(row["ids"]) for row in step) for step in steps],
        "labels": [sum(label >= 0 for row in step for label in row["labels"][1:]) for step in steps],
        "rates": [],
        "systems": {
            name: {**one, "rounds": [], "counts": None, "versions": {}, "failed": ""} for name, one in systems.items()
        },
    }


def add(run: Run, name: str, made: dict[str, Any], *, counting: bool) -> None:
    """What a process of a system measured."""
    system = run["systems"][name]
    system["versions"] = made["versions"]
    between = list(pairwise(made["marks"]))
    if counting:
        counts = {what: [b[what] - a[what] for a, b in between] for what in ("flops", "processed")}
        system["counts"] = {**counts, "saved": [b["saved"] for _, b in between]}
        return
    spent = {what: [round(b[what] - a[what], 4) for a, b in between] for what in ("wall", "cpu")}
    kept = ("losses", "norms", "tokens", "labels", "resident_mib", "cuda")
    system["rounds"].append({**spent, "before": round(made["before"], 2), **{what: made[what] for what in kept}})


def failed(run: Run, name: str, reason: str) -> None:
    """A process of a system ended with an error."""
    run["systems"][name]["failed"] = reason


def line(name: str, made: dict[str, Any]) -> str:
    """One process in a line, while the benchmark runs."""
    marks = made["marks"]
    steps = [b["wall"] - a["wall"] for a, b in pairwise(marks)]
    speed = ", ".join(f"{count / seconds:.0f}" for count, seconds in zip(made["tokens"], steps, strict=False))
    return f"{name}: {speed} tokens/s; loss {made['losses'][0]:.4f} .. {made['losses'][-1]:.4f}"


# ---- parity ----


def judge(run: Run) -> None:
    """Say of each system whether its figures count: `counted`, `difference`, `why`."""
    for system in run["systems"].values():
        system["difference"], system["why"] = None, _broken(run, system)
        reference = run["systems"].get(system["reference"], {}).get("rounds")
        if not system["why"] and reference:
            system["difference"], step = difference(system["rounds"], reference[0]["losses"])
            if not system["difference"] <= TOLERANCE[run["setting"]["precision"]]:
                system["why"] = f"the loss of step {step} differs by {system['difference']:.2g}"
        elif not system["why"]:
            system["why"] = f"{system['reference']} did not run: nothing to compare with"
        system["counted"] = not system["why"]


def _broken(run: Run, system: dict[str, Any]) -> str:
    """What was trained on otherwise than asked; nothing where all is as it should be."""
    if system["failed"] or not system["rounds"]:
        return system["failed"] or "it did not run"
    for what in ("tokens", "labels"):
        for made in system["rounds"]:
            if made[what] != run[what]:
                return f"{what} of its steps: {made[what]}; expected {run[what]}"
    return ""


def difference(rounds: Sequence[dict[str, Any]], reference: Sequence[float]) -> tuple[float, int]:
    """The largest difference of a step's loss in any round, and the step (from 1). A step without a loss, or with one
    that is not finite, is infinitely off."""
    worst, at = 0.0, 0
    for made in rounds:
        losses = list(made["losses"]) + [math.nan] * (len(reference) - len(made["losses"]))
        for step, (loss, right) in enumerate(zip(losses, reference, strict=False), 1):
            off = abs(loss - right) if math.isfinite(loss) and math.isfinite(right) else math.inf
            if off > worst:
                worst, at = off, step
    return worst, at


# ---- figures ----


def figures(run: Run, name: str) -> dict[str, float]:
    """A system's figures over the measured steps: the median of its rounds; of memory the highest."""
    system, warm = run["systems"][name], run["setting"]["warm"]
    tokens, labels = sum(run["tokens"][warm:]), sum(run["labels"][warm:])
    wall = [sum(made["wall"][warm:]) for made in system["rounds"]]
    found = {
        "real": median(tokens / seconds for seconds in wall),
        "label": median(labels / seconds for seconds in wall),
        "cpu": median(tokens / sum(made["cpu"][warm:]) for made in system["rounds"]),
        "before": median(made["before"] for made in system["rounds"]),
        "resident": max(made["resident_mib"] for made in system["rounds"]),
    }
    for what in ("allocated", "reserved"):
        if system["rounds"][0]["cuda"]:
            found[what] = max(made["cuda"][what] for made in system["rounds"])
    if system["counts"]:
        counts = system["counts"]
        found["processed"] = sum(counts["processed"][warm:]) / tokens * found["real"]
        found["work"] = sum(counts["flops"][warm:]) / sum(run["floors"][warm:])
        found["saved"] = max(counts["saved"][warm:]) / 2**20
    return found


def faster(run: Run, name: str, than: str, what: str = "wall") -> float | None:
    """How many times as fast one system is as another: the median over the rounds, each with its own neighbours."""
    warm = run["setting"]["warm"]
    pairs = zip(run["systems"][than]["rounds"], run["systems"][name]["rounds"], strict=False)
    ratios = [sum(other[what][warm:]) / sum(own[what][warm:]) for other, own in pairs]
    return median(ratios) if ratios else None


def floor_speed(run: Run) -> float | None:
    """Tokens per second if nothing but the least products ran, at the best rate that a product reached."""
    rates = [rate[run["setting"]["precision"]] for rate in run["rates"] if rate[run["setting"]["precision"]]]
    warm = run["setting"]["warm"]
    return max(rates) * sum(run["tokens"][warm:]) / sum(run["floors"][warm:]) if rates else None


# ---- table and picture ----

HEADS = {
    "en": ["", "real tokens/s", "fitune is", "labels/s", "processed/s", "tokens per CPU second", "seconds to step 1",
           "peak MiB", "FLOPs / floor", "saved for backward, MiB", "loss off by"],
    "zh": ["", "真实 token/s", "fitune 快", "标签/s", "处理/s", "每 CPU 秒 token", "到第 1 步的秒数",
           "峰值 MiB", "FLOPs / 下限", "为反向保存，MiB", "损失差"],
}  # fmt: skip
ABOVE = {
    "en": "**{title}**: {tokens:,} tokens a round, {labels:.0%} labels; {rounds} rounds, {threads} threads of "
    "{processor}, {date}, {commit}; floor {floor:,.0f} tokens/s",
    "zh": "**{title}**：每轮 {tokens:,} 个 token，{labels:.0%} 有标签；{rounds} 轮，{processor} 的 {threads} 个线程，"
    "{date}，{commit}；下限 {floor:,.0f} token/s",
}
NOT_COUNTED = {"en": "not counted", "zh": "不计"}


def lines(record: dict[str, Any], language: str = "en") -> list[str]:
    """The record as Markdown: a table for each comparison.

    Args:
        record: with its `runs`.
        language: of the heads, en or zh.
    """
    return [text for run in record["runs"] for text in _section(run, language)][:-1]


def title(run: Run) -> str:
    """Of a comparison."""
    setting = run["setting"]
    return f"{setting['shape']} {setting['precision']}"


def _section(run: Run, language: str) -> Iterator[str]:
    warm, head = run["setting"]["warm"], HEADS[language]
    tokens, labels = sum(run["tokens"][warm:]), sum(run["labels"][warm:])
    there = {key: run[key] for key in ("threads", "processor", "date", "commit")}
    yield ABOVE[language].format(
        title=title(run),
        tokens=tokens,
        labels=labels / tokens,
        rounds=len(run["rates"]),
        floor=floor_speed(run) or math.nan,
        **there,
    )
    yield ""
    for cells in (head, ["---"] * len(head), *(_row(run, name, language) for name in run["systems"])):
        yield f"| {' | '.join(cells)} |"
    yield ""


def _row(run: Run, name: str, language: str) -> list[str]:
    system, width = run["systems"][name], len(HEADS[language])
    if not system["counted"]:
        return [name, NOT_COUNTED[language], system["why"].replace("|", "/"), *[""] * (width - 3)]
    found = figures(run, name)
    times = None if name == "fitune" or not _counted(run, "fitune") else faster(run, "fitune", name)
    memory = [f"{found[what]:,.0f}" for what in ("resident", "allocated", "reserved") if what in found]
    return [
        name,
        f"{found['real']:,.0f}",
        "" if times is None else f"{times:.2f}x",
        f"{found['label']:,.0f}",
        _shown(found, "processed", "{:,.0f}"),
        f"{found['cpu']:,.0f}",
        f"{found['before']:.1f}",
        " / ".join(memory),
        _shown(found, "work", "{:.2f}"),
        _shown(found, "saved", "{:,.0f}"),
        f"{system['difference']:.1e}",
    ]


BEGIN, END = "<!-- the tables of results/against.json: begin -->", "<!-- end -->"


def page(text: str, record: dict[str, Any], language: str) -> str:
    """A page with the record's tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return "\n".join([before + BEGIN, "", *lines(record, language), "", END]) + after


def _counted(run: Run, name: str) -> bool:
    return bool(run["systems"].get(name, {}).get("counted"))


def _shown(found: dict[str, float], what: str, how: str) -> str:
    return how.format(found[what]) if what in found else ""


STYLE = (
    "<style>svg{--fg:#1f2328;--muted:#59636e;--own:#0969da;--other:#8c959f;font:12px sans-serif}text{fill:var(--fg)}"
    "text.muted{fill:var(--muted)}@media(prefers-color-scheme:dark){svg{--fg:#f0f6fc;--muted:#9198a1;--own:#4493f8;"
    "--other:#656c76}}</style>"
)
WIDTH, LEFT, EACH = 760, 170, 20


def picture(record: dict[str, Any]) -> str:
    """Real tokens per second of every system that counts, a bar each, as a file of its own: SVG, in light and dark."""
    parts, y = [STYLE], 8
    for run in record["runs"]:
        y += 16
        parts.append(
            f'<text x="4" y="{y}" font-weight="bold">{title(run)}, {run["processor"]}: real tokens per second</text>'
        )
        shown = [(name, figures(run, name)["real"]) for name in run["systems"] if _counted(run, name)]
        speed = floor_speed(run)
        bars = [*shown, *([("floor", speed)] if speed is not None else [])]
        most = max((value for _, value in bars), default=1.0)
        for name, value in bars:
            y += EACH
            parts += _bar(name, value, value / most, y)
        y += 14
    drawn = svg_of(WIDTH, y + 4, "real tokens per second of each system", parts)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _bar(name: str, value: float, share: float, y: float) -> list[str]:
    room = WIDTH - LEFT - text_width("000,000") - 12
    colour = "--own" if name.startswith("fitune") else "--other"
    fill = f'fill="var({colour})"' if name != "floor" else 'fill="none" stroke="var(--muted)"'
    wide = max(1.0, share * room)
    return [
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{name}</text>',
        f'<rect x="{LEFT}" y="{y - 6}" width="{wide:.1f}" height="13" rx="2" {fill}/>',
        f'<text class="muted" x="{LEFT + wide + 6:.1f}" y="{y + 4}">{value:,.0f}</text>',
    ]
