"""A model for lm-eval: log-likelihoods over flat batches, without padding, and fitune's own generation.

In: lm-eval's requests. Out: what its own `hf` model gives, to rounding. Requests that begin alike, as the answers to
one question do, share what they begin with; only rows that are asked for reach the head, and no logits of a whole batch
are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fitune.core.events import Ticker, Watcher
from fitune.core.records import Batch, Layout
from fitune.data.templates.base import in_parts
from fitune.data.templates.jinja import of_tokenizer
from fitune.engine.drawing import Sampling
from fitune.engine.generation import SIDE_BY_SIDE, continued
from fitune.engine.step import label_hidden, place
from fitune.models.adapters import disabled
from fitune.models.configs import longest_row
from fitune.models.head import output_head
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned
from fitune.models.switches import computing, evaluating

TOKENS = 2048  # of a batch
ROWS = 512  # whose logits are there at once
LONGEST = 256  # of an answer, in tokens, where the task does not say
Asked = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the continuation


class FlatLM(TemplateLM):
    """See the module's text.

    Args:
        tuned: the model. layout: how documents go through it. watch: progress is reported to it.
        base: measure the base model, without what was tuned.
    """

    def __init__(self, tuned: Tuned, layout: Layout, watch: Watcher, *, base: bool = False) -> None:
        super().__init__()
        self.tuned, self.layout, self.watch, self.base = tuned, layout, watch, base
        self.tokenizer, self.model = tuned.tokenizer, tuned.model
        self.max_length = longest_row(causal_lm(tuned.model).config)
        self.share = layout == "flat"  # may a prompt stand once for several answers?

    @property
    def eot_token_id(self) -> int:
        """See TemplateLM."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """See TemplateLM."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the tokenizer's own template."""
        if of_tokenizer(self.tokenizer).in_parts:
            chat_history = [in_parts(message) for message in chat_history]
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids, as lm-eval's own model has them: a text that begins with the first token gets no second one."""
        begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        add = False if add_special_tokens is None and begun else add_special_tokens
        return list(self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add})))

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Asked], **_: object) -> list[tuple[float, bool]]:
        """Of each continuation the log-probability, and whether it is the greedy one."""
        inputs = [tuple((c + a)[-(self.max_length + 1) :][:-1]) for _, c, a in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        ticker, model = Ticker(self.watch, "log-likelihoods", len(requests)), self.model
        with disabled(model) if self.base else nullcontext(), evaluating(model):
            for some in _batches(inputs, [len(a) for _, _, a in requests], share=self.share):
                answers = [requests[document.number][2] for document in some]
                for document, result in zip(some, self._scored(some, answers), strict=True):
                    found[document.number] = result
                ticker(ticker.done + len(some))
        ticker.end()
        return found

    def _scored(self, some: Sequence[_Document], answers: Sequence[list[int]]) -> Iterator[tuple[float, bool]]:
        bounds = np.concatenate([[0], np.cumsum([len(one.ids) for one in some])]).astype(np.int32)
        rows = [np.arange(end - len(a), end) for end, a in zip(bounds[1:], answers, strict=True)]
        labels, at = np.concatenate(answers).astype(np.int64), np.concatenate(rows).astype(np.int64)
        batch = Batch(
            ids=np.concatenate([one.ids for one in some]).astype(np.int64),
            positions=np.concatenate([np.arange(one.shared, one.shared + len(one.ids)) for one in some]),
            bounds=bounds,
            label_rows=at,
            labels=labels,
            rows=tuple(range(len(some))),
            shared=np.array([one.shared for one in some], np.int32) if any(one.shared for one in some) else None,
        )
        hidden = label_hidden(self.model, batch, self.layout, place(self.model, batch, self.layout))[: len(at)]
        tokens = torch.from_numpy(labels).to(hidden.device)
        sums, best = [], []
        with computing(self.model):
            for here in range(0, len(at), ROWS):
                logits = output_head(self.model)(hidden[here : here + ROWS]).float()
                chosen = logits.gather(1, tokens[here : here + ROWS, None])[:, 0]
                sums.append((chosen - logits.logsumexp(-1)).double())
                best.append(logits.argmax(-1) == tokens[here : here + ROWS])
        parts = [len(a) for a in answers]
        each = zip(torch.cat(sums).split(parts), torch.cat(best).split(parts), strict=True)
        return ((float(one.sum()), bool(same.all())) for one, same in each)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows where one is longer than the model holds."""
        windows = [list(map(make_disjoint_window, get_rolling_token_windows(
            self.tok_encode(one.args[0]), self.prefix_token_id, self.max_length, 1))) for one in requests]  # fmt: skip
        each = iter(self._loglikelihood_tokens([(("", ""), *window) for some in windows for window in some]))
        return [sum(next(each)[0] for _ in some) for some in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of their stop texts; greedy, whatever else a task asks for."""
        found, eos = [""] * len(requests), self.tokenizer.decode(self.eot_token_id)
        each = [normalize_gen_kwargs(dict(one.args[1]), LONGEST) for one in requests]
        order = sorted(range(len(requests)), key=lambda n: each[n]["max_gen_toks"])
        for most, same in groupby(order, key=lambda n: each[n]["max_gen_toks"]):
            numbers = list(same)
            for some in (numbers[at : at + SIDE_BY_SIDE] for at in range(0, len(numbers), SIDE_BY_SIDE)):
                prompts = [self.tok_encode(requests[n].args[0])[-(self.max_length - most) :] for n in some]
                texts = continued(self.tuned, prompts, Sampling(max_new_tokens=most), base=self.base)
                for n, text in zip(some, texts, strict=True):
                    stops = [text.find(stop) for stop in handle_stop_sequences(each[n].get("until"), eos=eos) if stop]
                    found[n] = text[: min([at for at in stops if at >= 0], default=len(text))]
        return found


@dataclass(frozen=True)
class _Document:
    """The tokens of a request that are its own, behind `shared` ones of the document that it follows."""

    number: int
    ids: tuple[int, ...]
    shared: int = 0


def _batches(inputs: Sequence[tuple[int, ...]], asked: Sequence[int], *, share: bool) -> Iterator[list[_Document]]:
    """Documents of about the same length, TOKENS tokens in a batch; those that begin alike stand behind the first.

    Args:
        inputs: ids. asked: how many last rows of each are asked for: these are never shared. share: may any be?
    """
    order = sorted(range(len(inputs)), key=lambda n: (inputs[n][: len(inputs[n]) // 2], inputs[n]))
    groups: list[list[_Document]] = []
    for n in order:
        head = groups[-1][0].ids if groups else ()
        common = next((k for k, (a, b) in enumerate(zip(head, inputs[n], strict=False)) if a != b), len(head))
        common = min(common, len(head), len(inputs[n]) - asked[n])
        if share and 2 * common > len(inputs[n]):
            groups[-1].append(_Document(n, inputs[n][common:], common))
        else:
            groups.append([_Document(n, inputs[n])])
    some, tokens = list[_Document](), 0
    for group in sorted(groups, key=lambda group: -len(group[0].ids)):
        own = sum(len(one.ids) for one in group)
        if some and tokens + own > TOKENS:
            yield some
            some, tokens = [], 0
        some, tokens = some + group, tokens + own
    if some:
        yield some
