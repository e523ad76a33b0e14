"""What a model folder needs so that it answers elsewhere as it answered here: tokenizer, chat template, stop tokens.

In: a folder with a model, the run's tokenizer and template. Out: the same folder with the tokenizer, `chat_template`
where plain transformers makes the ids of training of it, and the ids that end an answer in generation_config.json. What
is written is compared with the run's encoder, conversation by conversation, as transformers loads it from the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fitune.core.errors import FituneError
from fitune.core.files import write_atomic
from fitune.core.records import Conversation, Message, ToolCall
from fitune.core.untrusted import read_json
from fitune.data.encode import Encoder
from fitune.data.templates import ChatTemplate, PieceTemplate, Template
from fitune.data.templates.as_jinja import KINDS, Frame, as_jinja, quoted
from fitune.data.templates.base import arguments, joined, kept_date
from fitune.models import adapters
from fitune.models.weights import SAFE_INDEX, safe, stored_dtype

GENERATION = "generation_config.json"
TEMPLATE = "fitune_template.json"  # the template itself, for fitune
ANSWER_TOKENS = "fitune_answer_tokens.json"  # special tokens that answers produce: fitune shows these
PIECES = "fitune_prompt.jinja"  # the prompt with a mark between its pieces, where no chat_template can be written
BORDER = "\ue000"  # the mark: a character for private use
Jinja = str | dict[str, str]  # a chat template, or several by name
LEAST = 10  # conversations that must be the same


def _talk(*texts: str, system: str | None = None) -> Conversation:
    """Turns of a user and an assistant by turns."""
    turns = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    return Conversation((*([Message("system", system)] if system is not None else []), *turns))


_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city (城市).",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "巴黎", "days": 2}'),))
_ASKED = Message("user", "How is the weather in Paris?")
_CONTEXT = Message("user", "Translate into French.", context="Good morning, everyone.")

# Of what a template is tried on: name, what of KINDS is in it, the conversation. Those that end in an answer are
# compared whole, the others as prompts.
CONVERSATIONS: Sequence[tuple[str, frozenset[str], Conversation]] = (
    ("a question", frozenset(), _talk("What is the capital of France?")),
    ("a word", frozenset(), _talk("Hello")),
    ("a demand", frozenset(), _talk("Write a short poem about the sea.")),
    ("Chinese", frozenset(), _talk("今天天气怎么样？")),
    ("Chinese and English", frozenset(), _talk("把 'good morning' 翻译成中文")),
    ("text that looks like control tokens", frozenset(), _talk("Use <|foo|>, [BAR], {{ x }} and <b>bold</b> here")),
    ("a line break at the end", frozenset(), _talk("A line of text\n")),
    ("code", frozenset(), _talk("def f(x):\n    return x * 2\n\nprint(f(21))")),
    ("blanks, digits and pictures", frozenset(), _talk("  12,345.67 EUR  and 3 more 🙂🎉")),
    ("quotation marks", frozenset(), _talk("She said: 'It\\'s \"fine\"'...")),
    ("a list", frozenset(), _talk("Sort:\n- b\n- a (1)\n- c;")),
    ("a question with its answer", frozenset({"turns"}), _talk("1 + 1 = ?", "It is 2.")),
    ("an empty question", frozenset({"empty"}), _talk("")),
    ("a context", frozenset({"context"}), Conversation((_CONTEXT,))),
    ("three turns", frozenset({"turns"}), _talk("Hi there!", "Hello. How can I help you?", "Tell me a joke, please.")),
    ("five turns", frozenset({"turns"}), _talk("1 + 1 = ?", "2", "And 2 + 2?", "It is 4.", "Thanks (really)!")),
    ("Chinese turns", frozenset({"turns"}), _talk("你好", "你好！有什么可以帮你？", "请写一首诗。", "好的。")),
    ("a system text", frozenset({"system"}), _talk("Who are you?", system="You are a terse assistant.")),
    ("a Chinese system text", frozenset({"system"}), _talk("介绍一下你自己", system="你是一个有用的助手。")),
    ("a system text and turns", frozenset({"system", "turns"}), _talk("Hi", "Hello!", "Bye", system="Be brief.")),
    ("tools", frozenset({"tools"}), Conversation((_ASKED,), tools=(_TOOL,))),
    ("a tool's result", frozenset({"tools", "turns"}), Conversation(
        (_ASKED, _CALL, Message("tool", '{"sky": "clear"}')), tools=(_TOOL,)
    )),
)  # fmt: skip
# What people rarely write at the border to the template's own text, where it may become one token with that
EDGES = {
    "a line break at the beginning of a message": _talk("\nA line of text"),
    "a blank at the beginning of a message": _talk(" A line of text"),
    "a blank at the end of a message": _talk("A line of text "),
    "empty lines at the end of a message": _talk("A line of text\n\n"),
}


@dataclass(frozen=True)
class Proof:
    """Which conversations have the ids of training. without: kinds of conversations that the text refuses."""

    same: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """All that the text takes are the same, ten at least."""
        return not self.differing and len(self.same) >= LEAST


@dataclass(frozen=True)
class Handover:
    """What was written.

    Args:
        template: the run's template by name.
        stops: the tokens that end an answer, the trained one first; ids beside them.
        written: is there a `chat_template` that is the run's.
        proof: of it, or of the best attempt.
        reason: why none was written.
        exceptions: texts that get other ids all the same.
        date: what to know of the date that the template writes.
        pieces: is there a PIECES file, with the ids of training.
    """

    template: str
    stops: list[str]
    stop_ids: list[int]
    written: bool
    proof: Proof
    reason: str = ""
    exceptions: list[str] = field(default_factory=list)
    pieces: bool = False
    date: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should know at the end of a run: why there is no chat template, or what it refuses."""
        return self.lines() if not self.written or self.proof.without else []

    def lines(self) -> list[str]:
        """What a user should know, a line each."""
        stops, date = ", ".join(self.stops), [self.date] if self.date else []
        if not self.written:
            said = f"no chat_template written for {self.template}: {self.reason}"
            return [said, f"generation ends at {stops}", *date]
        same = f"the ids of training in {len(self.proof.same)} of {len(self.proof.same)} conversations"
        if self.proof.differing:
            tried = len(self.proof.same) + len(self.proof.differing)
            same = f"kept as it is; other ids than in training in {len(self.proof.differing)} of {tried} conversations"
        lines = [f"chat_template {self.template}: {same}; generation ends at {stops}"]
        if self.proof.without:
            refused = ", ".join(KINDS[kind] for kind in self.proof.without)
            lines.append(f"it refuses {refused}: as one text, their tokens would not be those of the training")
        return [*lines, *date]


def as_model(folder: Path, model: Any, file: str) -> bool:
    """Make a folder with all weights of a model, by transformers' names, a model folder; False: it cannot be one.

    Args:
        folder: gets config.json, generation_config.json and an index that names the file.
        model: a transformers model, all of it trained.
        file: the weights in the folder.
    """
    from transformers.conversion_mapping import extract_weight_conversions_for_model

    if not type(model).__module__.startswith("transformers.") or extract_weight_conversions_for_model(model):
        return False  # the published names, or layouts, are others
    with safe.opened(folder / file) as tensors:
        names = set(tensors.keys())
    trained = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in names}
    if any(tensor.data_ptr() not in trained for tensor in model.state_dict().values()):
        return False
    model.config.save_pretrained(str(folder))
    if model.generation_config is not None:
        write_atomic(folder / GENERATION, model.generation_config.to_json_string(use_diff=True))
    index = {
        "metadata": {"total_size": (folder / file).stat().st_size},
        "weight_map": dict.fromkeys(sorted(names), file),
    }
    write_atomic(folder / SAFE_INDEX, json.dumps(index, indent=2) + "\n")
    config = {**_read(folder / "config.json"), "dtype": str(stored_dtype(folder)).removeprefix("torch.")}
    write_atomic(folder / "config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    return True


def of_run(folder: Path, model: Any, tokenizer: Any, template: Template) -> Handover:
    """What a run trained, as others load it: a model folder where all was trained (method full), else an adapter.

    Args:
        folder: the run's adapter folder.
        model: the transformers model in it.
        tokenizer: the run's.
        template: the run's.
    """
    own = (folder / adapters.OWN_CONFIG).is_file()
    if own and adapters.read_own(folder).method == "full" and not (folder / adapters.NEW_IDS).is_file():
        as_model(folder, model, adapters.WEIGHTS)
    return hand_over(folder, tokenizer, template, getattr(model.generation_config, "eos_token_id", None))


def hand_over(folder: Path, tokenizer: Any, template: Template, stops_of_base: Any = None) -> Handover:
    """Write the tokenizer, the chat template and the stop tokens into a model's folder.

    Args:
        folder: holds config.json and weights already.
        tokenizer: the run's.
        template: the run's.
        stops_of_base: the base's eos_token_id, for a folder that does not say it.
    """
    encoder = Encoder(tokenizer, template)
    own = copy.copy(tokenizer)
    own.chat_template = None
    own.save_pretrained(str(folder))
    (folder / TEMPLATE).write_text(json.dumps(template.as_dict(), ensure_ascii=False), encoding="utf-8")
    ids = write_stops(folder, encoder.stop_ids, encoder.stop_id, stops_of_base)
    stops = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    plain = _as_others_load_it(folder)
    if isinstance(plain, str):
        return Handover(template.name, stops, ids, written=False, proof=Proof(), reason=plain, date=kept_date(template))
    jinja, proof, reason = _best(encoder, plain)
    if jinja is not None:
        own.chat_template = jinja
        own.save_pretrained(str(folder))
    pieces = (jinja is None or bool(proof.without)) and _write_pieces(folder, encoder, plain)
    exceptions = _exceptions(jinja, plain, encoder) if jinja is not None else []
    return Handover(
        template.name, stops, ids, jinja is not None, proof, reason, exceptions, pieces, kept_date(template)
    )


def write_answer_tokens(folder: Path, encoder: Encoder) -> None:
    """Keep the special tokens that a run's answers produce, where there are any."""
    if encoder.marks.answers:
        (folder / ANSWER_TOKENS).write_text(json.dumps(list(encoder.marks.answers)), encoding="utf-8")


def read_answer_tokens(folder: Path) -> list[str]:
    """The special tokens that the answers of a merged model produce."""
    file = folder / ANSWER_TOKENS
    return [str(name) for name in read_json(file, kind=list)] if file.is_file() else []


def write_stops(folder: Path, trained: Sequence[int], first: int, of_base: Any = None) -> list[int]:
    """Put ids that end an answer into generation_config.json, before those of the base; all of them.

    The file is changed in place: published ones hold settings that transformers refuses to save again.
    """
    path = folder / GENERATION
    values = _read(path)
    config = _read(folder / "config.json")
    of_base = values.get("eos_token_id", config.get("eos_token_id", of_base))
    base = of_base if isinstance(of_base, list) else [of_base]
    ids = list(dict.fromkeys(i for i in (first, *trained, *base) if isinstance(i, int)))
    write_atomic(path, json.dumps({**values, "eos_token_id": ids}, ensure_ascii=False, indent=2) + "\n")
    return ids


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _as_others_load_it(folder: Path) -> Any:
    """The tokenizer as plain transformers loads it; a text: why it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many readers raise
        return f"transformers has no class for this tokenizer ({' '.join(str(error).split())[:120]})"


# ---- the proof ----


def _best(encoder: Encoder, plain: Any) -> tuple[Jinja | None, Proof, str]:
    """The Jinja text to write, or None; its proof, or that of the best attempt; why there is none."""
    template = encoder.template
    if isinstance(template, ChatTemplate):
        changed = template.date is not None or template.options
        own = template.for_others() if changed else template.jinja
        return own, prove(own, plain, encoder), ""
    if not isinstance(template, PieceTemplate):
        return None, Proof(), "its control ids are written by no text"
    attempts = []
    for space in ("", " ") if encoder.bos_id is not None else ("",):
        proof = prove(as_jinja(template, _frame(encoder, space)), plain, encoder)
        without = _to_leave_out(proof)
        text = as_jinja(template, _frame(encoder, space, without))
        again = prove(text, plain, encoder, without)
        if again.holds:
            return text, again, ""
        attempts.append(proof)
    best = max(attempts, key=lambda proof: len(proof.same))
    tried = len(best.same) + len(best.differing)
    reason = (
        f"as one text, {len(best.differing)} of {tried} conversations get other ids than in training, where prompt and "
        f"text are encoded apart (tokens merge over the border), the first: {best.differing[0]}"
    )
    return None, best, reason


def _frame(encoder: Encoder, space: str = "", without: Sequence[str] = (), border: str = "") -> Frame:
    own = str(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id))
    stop = "eos_token" if own == encoder.tokenizer.eos_token else quoted(own)
    return Frame(stop, encoder.bos_id is not None, space, border, without)


def _to_leave_out(proof: Proof) -> list[str]:
    """The kinds of conversations that are the fault: those of conversations with no other kind in them."""
    kinds = {name: kind for name, kind, _ in CONVERSATIONS}
    return sorted(
        {kind for name in proof.differing for kind in kinds[name] if len(kinds[name]) == 1 or kind == "tools"}
    )


def prove(jinja: Jinja, plain: Any, encoder: Encoder, without: Sequence[str] = ()) -> Proof:
    """Compare ids, conversation by conversation; those that the run's template has no place for are left out.

    Args:
        jinja: the Jinja text, or several by name.
        plain: the tokenizer as plain transformers loads it.
        encoder: of the run.
        without: kinds of conversations that the text must refuse.
    """
    same: list[str] = []
    differing: list[str] = []
    for name, kinds, conversation in CONVERSATIONS:
        try:
            expected = _expected(encoder, conversation)
        except FituneError:
            continue
        if expected is None:
            continue
        found = _rendered(jinja, plain, conversation, encoder)
        if kinds & set(without):
            differing += [name] if found is not None else []
        else:
            (same if found == expected else differing).append(name)
    return Proof(same, differing, list(without))


def _expected(encoder: Encoder, conversation: Conversation) -> list[int] | None:
    """The ids of training: of a prompt, or of a conversation with its answer where templates of ours end it."""
    if conversation.messages[-1].role != "assistant":
        return encoder.prompt(conversation.messages, conversation.tools)
    sample = encoder.sample(conversation) if isinstance(encoder.template, PieceTemplate) else None
    return None if sample is None else [int(i) for i in sample.ids]


def _rendered(
    jinja: Jinja, plain: Any, conversation: Conversation, encoder: Encoder, *, tokenize: bool = True, **how: Any
) -> Any:
    """What transformers makes of a conversation: ids, or a text; None: the Jinja text refuses it."""
    in_place = isinstance(encoder.template, PieceTemplate)
    plain.chat_template = jinja  # of several, transformers takes the one for tools where there are some
    try:
        return plain.apply_chat_template(
            [as_message(m, context=in_place) for m in conversation.messages],
            tools=[dict(tool) for tool in conversation.tools] or None,
            add_generation_prompt=conversation.messages[-1].role != "assistant",
            tokenize=tokenize,
            return_dict=False,
            **how,
        )
    except Exception:  # whatever a template or a tokenizer raises: these are not the same ids
        return None


def as_message(message: Message, *, context: bool) -> dict[str, Any]:
    """A message as transformers takes it. context: in a place of its own, which templates of fitune's have."""
    values: dict[str, Any] = {"role": message.role, "content": message.content if context else joined(message)}
    if context and message.context:
        values["context"] = message.context
    if message.tool_calls:
        values["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": arguments(call)}}
            for call in message.tool_calls
        ]
    return values


def _exceptions(jinja: Jinja, plain: Any, encoder: Encoder) -> list[str]:
    """What a user may type that others encode otherwise than fitune, whatever the template."""
    found = []
    named = next((t for t in plain.all_special_tokens if plain.convert_tokens_to_ids(t) in encoder.stop_ids), None)
    typed, expected = _written(encoder, _talk(f"Say {named} now"))
    if named is not None and _rendered(jinja, plain, typed, encoder) != expected:
        literal = _rendered(jinja, plain, typed, encoder, sanitize_control_tokens=True) == expected
        unless = ", unless `sanitize_control_tokens=True` is given" if literal else ""
        found.append(
            f"the name of a control token, such as `{named}`, in a message: text in fitune, the control token in "
            f"transformers{unless}"
        )
    differing = [
        name
        for name, (edge, ids) in {name: _written(encoder, one) for name, one in EDGES.items()}.items()
        if _rendered(jinja, plain, edge, encoder) != ids
    ]
    return [
        *found,
        *([f"{', '.join(differing)}: it becomes one token with what stands beside it"] if differing else []),
    ]


def _written(encoder: Encoder, conversation: Conversation) -> tuple[Conversation, list[int] | None]:
    """A conversation and its prompt, with a tool where the template fails without one; None where it fails so too."""
    for one in (conversation, replace(conversation, tools=(_TOOL,))):
        try:
            return one, encoder.prompt(one.messages, one.tools)
        except FituneError:
            continue
    return conversation, None


def _write_pieces(folder: Path, encoder: Encoder, plain: Any) -> bool:
    """The prompt with a mark between its pieces, where encoding these apart gives the ids of training."""
    if not isinstance(encoder.template, PieceTemplate):
        return False
    jinja = as_jinja(encoder.template, _frame(encoder, border=BORDER))
    for _, _, conversation in CONVERSATIONS:
        try:
            expected = _expected(encoder, conversation)
        except FituneError:
            continue
        text = _rendered(jinja, plain, conversation, encoder, tokenize=False)
        if text is None or _by_pieces(plain, text) != expected:
            return False
    (folder / PIECES).write_text(jinja, encoding="utf-8", newline="\n")
    return True


def _by_pieces(plain: Any, text: str) -> list[int]:
    pieces = text.split(BORDER)
    return [i for piece in pieces for i in plain(piece, add_special_tokens=False)["input_ids"]]
