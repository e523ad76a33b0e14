"""Make the bundled model from nothing: write the corpus, train the tokenizer, train the model, measure, save.

    python scripts/bundled/pretrain.py --output src/fitune/bundled/model

The output folder gets a Llama model with its tokenizer and chat template, and `TRAINING.json` with the settings, the
loss curve and the held-out accuracy. Needs no network and no GPU; takes half an hour on two cores that do other work
too (TRAINING.json has the seconds).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables as t
import tokenizers
import torch
import transformers
import world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, END = "<pad>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

#: How many batches are sorted by length together: more saves padding, fewer mixes the batches better.
CHUNK = 8

#: Words with their leading space, single digits, single Chinese characters and marks, runs of white space.
PIECES = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s"

#: Text that must survive encoding and decoding unchanged.
ROUND_TRIPS = (
    "",
    " ",
    "  two leading spaces, and   three",
    "tabs\tand\r\nnewlines\n\n",
    "北山城是维洛国的首都。",
    "全角　空格、标点：【答】｜“引号”",
    "emoji 🙂👩‍👩‍👧‍👦 ✓ é ñ ß Ω ж",
    "生僻字：龘𠮷鿍",
    "don't stop , really ?",
    "x = {'a': [1, 2.50]} # 100%",
    "<0x41> is not a byte",
    "\x00\x7f\u200b\ufeff",
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the versions of the libraries."""

    seed: int = 7
    vocabulary: int = 1792
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    positions: int = 1024
    steps: int = 3600
    batch: int = 80
    rate: float = 2.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    prompt_share: float = 0.1
    packed_share: float = 0.04


# --- tokenizer -----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Train a byte-fallback BPE: known pieces are merged, everything else is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL + bytes_, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer registers the bytes as special tokens, which would match the literal text "<0x41>" and be skipped
    # in decoding; only the chat tokens are special.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def wrap_tokenizer(tokenizer: Tokenizer, positions: int) -> PreTrainedTokenizerFast:
    """Give the tokenizer its chat template and its special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
        padding_side="left",
    )


def render(talk: world.Conversation) -> str:
    """Write a conversation as the chat template does, only faster."""
    return BOS + "".join(f"<|{one['role']}|>{one['content']}{END}" for one in talk)


def check_tokenizer(tokenizer: Any) -> None:
    """Assert that any text comes back unchanged and that the template is what training used."""
    rng = random.Random(0)
    noise = [
        "".join(chr(rng.choice((rng.randint(1, 0xD7FF), rng.randint(32, 126)))) for _ in range(40)) for _ in range(200)
    ]
    for text in (*ROUND_TRIPS, *noise):
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        assert back == text, f"{text!r} came back as {back!r}"
        back = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
        assert back == text, f"{text!r} came back as {back!r} without special tokens"
    for talk in world.conversations(0, 200):
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        assert whole == render(talk)
        for index, one in enumerate(talk):
            if one["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(talk[:index], tokenize=False, add_generation_prompt=True)
                turn = tokenizer.apply_chat_template(talk[: index + 1], tokenize=False)
                assert turn.startswith(prompt) and whole.startswith(turn) and turn.endswith(tokenizer.eos_token)


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents laid end to end."""

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray

    def lengths(self) -> np.ndarray:
        """The number of tokens of each document."""
        return np.diff(self.starts)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """Encode the documents; `learned` marks what an assistant says, with its stop token, and plain statements."""
    encoded: list[list[int]] = []
    for start in range(0, len(texts), 20_000):
        encoded += [one.ids for one in tokenizer.encode_batch_fast(texts[start : start + 20_000])]
    ids = np.fromiter((token for one in encoded for token in one), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(one) for one in encoded])])
    roles = {role: _id(tokenizer, f"<|{role}|>") for role in ROLES}
    document = _id(tokenizer, BOS)
    # A token is learned when the last mark before it opened an assistant turn, or a document without turns.
    is_mark = np.isin(ids, [document, *roles.values()])
    last = np.maximum.accumulate(np.where(is_mark, np.arange(len(ids)), 0))
    learned = np.isin(ids[last], [document, roles["assistant"]]) & ~is_mark
    return Corpus(ids, learned, starts)


def _id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found


def batches(corpus: Corpus, settings: Settings, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield `(ids, wanted, learned)` forever: documents of like length together, padded on the right.

    `wanted` marks the tokens that count, `learned` those of them that are answers. A share of the batches joins
    documents, so that later positions are trained.
    """
    rng = np.random.default_rng(settings.seed)
    lengths = corpus.lengths()
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order) - settings.batch * CHUNK + 1, settings.batch * CHUNK):
            chunk = order[start : start + settings.batch * CHUNK]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            for row in rng.permutation(CHUNK):
                group = chunk[row * settings.batch : (row + 1) * settings.batch]
                rows = [[int(one)] for one in group]
                if rng.random() < settings.packed_share:
                    rows = [
                        [int(one) for one in part]
                        for part in np.array_split(rng.permutation(group), settings.batch // 8)
                    ]
                yield _batch(corpus, rows, rng, settings.prompt_share, pad)


def _batch(
    corpus: Corpus, rows: list[list[int]], rng: np.random.Generator, prompt_share: float, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay the documents of each row side by side and choose the tokens that count."""
    spans = [[slice(corpus.starts[one], corpus.starts[one + 1]) for one in row] for row in rows]
    width = max(sum(span.stop - span.start for span in row) for row in spans)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    wanted = np.zeros((len(rows), width), dtype=bool)
    learned = np.zeros((len(rows), width), dtype=bool)
    for index, row in enumerate(spans):
        at = 0
        for span in row:
            size = span.stop - span.start
            ids[index, at : at + size] = corpus.ids[span]
            # A few of the prompts' tokens count as well: the model also learns to write questions and forms.
            learned[index, at : at + size] = corpus.learned[span]
            wanted[index, at : at + size] = corpus.learned[span] | (rng.random(size) < prompt_share)
            at += size
    wanted[:, 0] = False
    return torch.from_numpy(ids), torch.from_numpy(wanted), torch.from_numpy(learned)


# --- model ---------------------------------------------------------------------------------------------------------


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def losses_of(model: LlamaForCausalLM, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each wanted token; the vocabulary is only scored where it counts."""
    # Padding is on the right and attention is causal, so no mask is needed.
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    target = wanted[:, 1:]
    scores = functional.linear(states[:, :-1][target], model.lm_head.weight)
    return functional.cross_entropy(scores.float(), ids[:, 1:][target], reduction="none")


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: LlamaForCausalLM, tokenizer: Any, corpus: Corpus, settings: Settings, bf16: bool, output: Path
) -> list[dict[str, Any]]:
    """Train in place and return the loss curve."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    curve: list[dict[str, Any]] = []
    recent: list[tuple[float, float]] = []
    began = time.monotonic()
    for step, (ids, wanted, learned) in zip(
        range(settings.steps), batches(corpus, settings, tokenizer.pad_token_id), strict=False
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            losses = losses_of(model, ids, wanted)
            loss = losses.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer_loss = losses.detach()[learned[:, 1:][wanted[:, 1:]]].mean()
        recent.append((loss.item(), answer_loss.item()))
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            mean, answer = (round(sum(column) / len(column), 4) for column in zip(*recent, strict=True))
            curve.append({"step": step + 1, "loss": mean, "answer_loss": answer})
            recent = []
            seconds = time.monotonic() - began
            print(f"step {step + 1}/{settings.steps} loss {mean:.4f} answers {answer:.4f} {seconds:.0f}s", flush=True)
        if (step + 1) % 500 == 0 and step + 1 < settings.steps:
            accuracy = held_out_accuracy(model, tokenizer, per_language=40)
            curve[-1]["accuracy"] = {category: row["all"] for category, row in accuracy.items()}
            print(curve[-1]["accuracy"], flush=True)
            save(model, tokenizer, output)
            model.train()
    return curve


def save(model: LlamaForCausalLM, tokenizer: Any, output: Path) -> None:
    """Write the model and the tokenizer as transformers loads them."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.backend_tokenizer.no_padding()  # measuring pads, and the file would remember it
    tokenizer.save_pretrained(output)
    # The class has another name in newer releases of transformers; this one loads everywhere.
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


# --- measuring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[str], limit: int = 40, batch: int = 128) -> list[str]:
    """Greedy answers to single user messages, in the order of the prompts."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        texts = [
            tokenizer.apply_chat_template(
                [world.message("user", prompts[i])], tokenize=False, add_generation_prompt=True
            )
            for i in group
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
        )
        for index, row in zip(group, output[:, inputs["input_ids"].shape[1] :], strict=True):
            found[index] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def held_out_accuracy(
    model: Any, tokenizer: Any, per_language: int = 150, show: int = 0
) -> dict[str, dict[str, float]]:
    """Exact match of greedy answers to held-out questions, by category and language."""
    questions = world.held_out_questions(per_language)
    given = answers(model, tokenizer, [question for _, question in questions])
    result: dict[str, dict[str, float]] = {}
    for category in world.CATEGORIES:
        hits = {
            lang: [
                answer == one.plain
                for (one, _), answer in zip(questions, given, strict=True)
                if one.category == category and one.lang == lang
            ]
            for lang in world.LANGUAGES
        }
        every = [hit for row in hits.values() for hit in row]
        result[category] = {lang: round(sum(row) / len(row), 4) for lang, row in hits.items()}
        result[category] |= {"all": round(sum(every) / len(every), 4), "questions": len(every)}
    wrong = [(q, one.plain, answer) for (one, q), answer in zip(questions, given, strict=True) if answer != one.plain]
    for question, right, answer in wrong[:show]:
        print(f"wrong: {question!r} -> {answer!r}, not {right!r}", flush=True)
    return result


def demo_tokens(corpus: Corpus, tokenizer: Any) -> dict[str, int]:
    """How often pre-training writes each token of the demo's persona and form; none may be missing."""
    texts = [
        t.SELF_FRAMES[intent][lang][0].format(v=values[side])
        for intent, values in t.DEMO_PERSONA.items()
        for side, lang in enumerate(world.LANGUAGES)
    ]
    texts += [form.replace("{a}", "").replace("{k}", "") for form in t.DEMO_FORMS.values()]
    wanted = {token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)}
    counts = np.bincount(corpus.ids[corpus.learned], minlength=len(tokenizer))
    return {tokenizer.convert_ids_to_tokens(token): int(counts[token]) for token in sorted(wanted)}


def main() -> None:
    """Make the bundled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; the saved weights stay float32")
    args = parser.parse_args()
    began = time.monotonic()
    settings = Settings(seed=args.seed, steps=args.steps)
    torch.set_num_threads(args.threads)
    torch.manual_seed(settings.seed)

    world.check_unambiguous()
    talks = [render(talk) for talk in world.conversations(settings.seed, min(500_000, settings.steps * settings.batch))]
    plain = [f"{BOS}{text}{END}" for text in world.statements()]
    fast = train_tokenizer(iter([*talks[:60_000], *plain, *world.every_word()]), settings.vocabulary)
    tokenizer = wrap_tokenizer(fast, settings.positions)
    check_tokenizer(tokenizer)
    corpus = tokenize(fast, talks + plain * max(1, len(talks) // 50 // len(plain)))
    teachable = demo_tokens(corpus, tokenizer)
    rare = {token: count for token, count in teachable.items() if count < len(talks) // 5000}
    if rare:
        raise SystemExit(f"the corpus hardly writes these tokens of the demo: {rare}")
    model = build_model(settings, tokenizer)
    prepared = time.monotonic() - began
    print(
        f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters, {len(corpus.ids):,} corpus tokens, "
        f"mean length {corpus.lengths().mean():.1f}, prepared in {prepared:.0f}s; demo tokens {teachable}",
        flush=True,
    )
    curve = train(model, tokenizer, corpus, settings, args.bf16, args.output)
    trained = time.monotonic() - began - prepared

    save(model, tokenizer, args.output)
    # Measure what was saved, not what is in memory.
    loaded_tokenizer = AutoTokenizer.from_pretrained(args.output)
    check_tokenizer(loaded_tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    accuracy = held_out_accuracy(loaded, loaded_tokenizer, show=20)
    report = {
        "command": "python scripts/bundled/pretrain.py " + " ".join(_arguments(sys.argv[1:])),
        "settings": asdict(settings),
        "threads": args.threads,
        "bf16_autocast": args.bf16,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "conversations": len(talks),
        "corpus_tokens": len(corpus.ids),
        "held_out_accuracy": accuracy,
        "final_loss": curve[-1]["loss"],
        "seconds": {"prepare": round(prepared), "train": round(trained), "all": round(time.monotonic() - began)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "demo_token_counts": teachable,
        "loss_curve": curve,
    }
    (args.output / "TRAINING.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(json.dumps(accuracy, indent=1), flush=True)


def _arguments(given: list[str]) -> list[str]:
    """The command's arguments with the output folder left out of the record."""
    return ["DIR" if index and given[index - 1] == "--output" else value for index, value in enumerate(given)]


if __name__ == "__main__":
    main()
