"""The model card of what leaves a run: README.md beside the weights.

In: the run's folder, what was handed over. Out: Markdown with the base, the data, the settings, the figures, the
template and the stop tokens, and the lines that run it in transformers. Files are named without their folders: where
they lay is nobody's concern. The licence is left open: it follows from those of the base and of the data.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from fitune.core.config import RunConfig, settings_only
from fitune.core.files import write_atomic
from fitune.core.records import DataReport
from fitune.data.templates.as_jinja import KINDS
from fitune.engine.checkpoint import RunFolder
from fitune.models.adapters import PEFT_CONFIG
from fitune.models.handover import Handover
from fitune.models.handover.proof import BORDER, PIECES
from fitune.models.hub import revision_of
from fitune.views.run_records import data_of, result_of, versions_of

CARD = "README.md"
Kind = Literal["model", "adapter", "saved"]  # saved: what only fitune puts on its base
FIGURES = {
    "base_held_out_loss": "held-out loss of the base model",
    "held_out_loss_before": "held-out loss before training",
    "held_out_loss_after": "held-out loss after training",
    "first_loss": "training loss, first step",
    "last_loss": "training loss, last step",
    "steps": "steps",
    "trainable_parameters": "trainable parameters",
    "total_parameters": "parameters",
}
# settings that say nothing of the model, or stand elsewhere in the card
UNSAID = ("model", "data", "eval_data", "output", "cache", "cache_size", "adapter", "device", "force", "sample_prompts")


def write(folder: Path, name: str, run: RunFolder, config: RunConfig, handed: Handover) -> None:
    """Write the card into a folder that fitune made itself."""
    kind: Kind = "adapter" if (folder / PEFT_CONFIG).is_file() else "saved"
    kind = "model" if (folder / "config.json").is_file() else kind
    write_atomic(folder / CARD, card(name, run, config, handed, kind))


def card(name: str, run: RunFolder, config: RunConfig, handed: Handover, kind: Kind = "model") -> str:
    """The text of the card.

    Args:
        name: its title.
        run: of which it speaks; what is not there is left out.
        config: the run's.
        handed: the template and the stop tokens.
        kind: a whole model, an adapter for the base in PEFT's format, or what only fitune puts on the base.
    """
    base, hub = _base(config.model)
    head = ["---", *([f"base_model: {base}"] if hub else []), "license: unknown", "pipeline_tag: text-generation"]
    head += [f"library_name: {'peft' if kind == 'adapter' else 'transformers'}", "tags:", "- fitune"]
    head += [f"- {config.method}", "---"]
    what = "Made from" if kind == "model" else "An adapter for"
    parts = [
        "\n".join(head),
        f"# {name}",
        f"{what} `{base}`{_revision(config.model)} by fine-tuning with fitune, method `{config.method}`.",
        "Licence: unknown. It follows from the licences of the base model and of the data.",
        "## Use",
        _use(handed, kind, base),
        "## Prompts",
        _prompts(handed),
        "## Data",
        _data(run, config),
        "## Settings",
        _settings(config),
        *_results(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(model: str) -> tuple[str, bool]:
    """The base by its id on the hub, else by its folder's name; is it an id."""
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", model)
    return (f"{found[1]}/{found[2]}", True) if found else (Path(model).name, False)


def _revision(model: str) -> str:
    revision = revision_of(Path(model))
    return f" (revision `{revision}`)" if revision else ""


def _use(handed: Handover, kind: Kind, base: str) -> str:
    if kind == "saved":
        return f"fitune puts it on the base model:\n\n{_shell('fitune chat RUN', 'fitune merge RUN --output DIR')}"
    load = 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter":
        lines = ["from peft import PeftModel", *lines]
        load = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), folder)'
    lines += ['folder = "."  # this folder', "tokenizer = AutoTokenizer.from_pretrained(folder)", load]
    content = '[{"type": "text", "text": "Hello"}]' if handed.parts else '"Hello"'
    messages = f'messages = [{{"role": "user", "content": {content}}}]'
    stops = "" if kind == "model" else f", eos_token_id={handed.stop_ids}"
    if handed.written:
        made = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        lines += [messages, f"inputs = tokenizer.apply_chat_template(messages, {made})"]
        lines += [f"ids = model.generate(**inputs, max_new_tokens=256{stops})", 'start = inputs["input_ids"].shape[1]']
    elif handed.pieces:
        lines += ["", *_by_pieces(), "", messages, "inputs = torch.tensor([encode(messages)])"]
        lines += [f"ids = model.generate(inputs, max_new_tokens=256{stops})", "start = inputs.shape[1]"]
        lines.insert(0, "import torch")
    else:
        talk = _shell(f"fitune chat {'RUN' if kind == 'adapter' else 'FOLDER'}")
        return f"No text renders this template's prompts, so take fitune, which makes them:\n\n{talk}"
    lines.append("print(tokenizer.decode(ids[0, start:], skip_special_tokens=True))")
    return "```python\n" + "\n".join(lines) + "\n```"


def _shell(*commands: str) -> str:
    return "\n".join(("```bash", *commands, "```"))


def _by_pieces() -> list[str]:
    """A function that encodes a prompt as in training: its pieces apart."""
    rendered = (
        "tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)"
    )
    return [
        f'jinja = open(f"{{folder}}/{PIECES}", encoding="utf-8").read()',
        "",
        "def encode(messages):",
        f"    text = {rendered}",
        f"    pieces = text.split({BORDER!a})",
        '    return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]',
    ]


def _prompts(handed: Handover) -> str:
    stops = ", ".join(f"`{stop}` ({i})" for stop, i in zip(handed.stops, handed.stop_ids, strict=True))
    lines = [f"- Template: {handed.template}.", f"- An answer ends at {stops}; trained is the first of them."]
    lines += [f"- {line[0].upper()}{line[1:]}." for line in handed.lines()[: None if handed.proof.without else 1]]
    if handed.proof.differing:
        lines.append(f"- Other ids than in training: {'; '.join(handed.proof.differing)}.")
    if handed.written:
        lines.append(
            "- `apply_chat_template` writes BOS where there is one: encode its text with `add_special_tokens=False`."
        )
    lines += [f"- Not as in training: {text}." for text in handed.exceptions]
    if handed.pieces and handed.written:
        refused = " and ".join(KINDS[kind] for kind in handed.proof.without)
        lines += [f"- For {refused} encode the pieces of `{PIECES}` apart:", "", "```python", *_by_pieces(), "```"]
    return "\n".join(lines)


def _data(run: RunFolder, config: RunConfig) -> str:
    report = data_of(run).report if run.has("data") else DataReport()
    files: dict[str, int | None] = {Path(name).name or name: count for name, count in report.files.items()}
    if not files:
        files = {Path(source.path).name: None for source in config.sources()}
    rows = [f"| {name} | {count:,} |" if count is not None else f"| {name} | |" for name, count in files.items()]
    table = "\n".join(["| file | rows |", "|---|---:|", *rows])
    if report == DataReport():
        return table
    counts = (
        f"Trained on {report.kept:,} rows, {report.held_out:,} held out; {report.tokens:,} tokens, "
        f"{report.trained_tokens:,} of them trained. Longest sample {report.max_length:,} tokens."
    )
    return f"{table}\n\n{counts}"


def _settings(config: RunConfig) -> str:
    """What differs from the defaults, and what decides most."""
    values, plain = config.model_dump(mode="json"), settings_only({}).model_dump(mode="json")
    always = ("method", "template", "max_length", "batch_size", "epochs", "lr", "precision", "seed")
    shown = {
        name: value
        for name, value in values.items()
        if name not in UNSAID and (name in always or value != plain[name]) and value is not None
    }
    options = {"lora": "lora", "p-tuning": "p_tuning", "adapter": "bottleneck"}.get(config.method, config.method)
    for group in (options, config.objective):
        if group in values:
            shown[group] = values[group]
    rows = [f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in shown.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _results(run: RunFolder) -> list[str]:
    if not run.has("result"):
        return []
    result = result_of(run)
    figures = {name: getattr(result, name) for name in FIGURES}
    rows = [f"| {FIGURES[name]} | {_number(value)} |" for name, value in figures.items() if value is not None]
    rates = [record.lr for record in run.read_steps()]
    rows += [f"| learning rate, largest | {max(rates):g} |"] if rates else []
    made = ", ".join(f"{name} {version}" for name, version in versions_of(run).items())
    return ["## Figures", "\n".join(["| | |", "|---|---:|", *rows]), f"Made with {made}." if made else ""]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
