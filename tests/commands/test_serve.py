"""A server answers OpenAI's client as `fitune chat` answers, however many ask."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

import fitune
from fitune.commands import ui
from fitune.commands.chat import Chat
from fitune.commands.serve import Place, serve
from fitune.core.records import Message
from fitune.engine.batching import Batcher, Request
from fitune.engine.drawing import Sampling
from fitune.engine.loading import load
from fitune.models.load import Tuned
from support import tiny
from support.command import run as command
from support.serving import served

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = Path(__file__).parents[2] / "src" / "fitune" / "bundled" / "model"
QUESTIONS = [
    "What is the capital of Norland?",
    "你好",
    "一加二等于几？",
    "Tell me a story.",
    "2 + 3?",
    "中国的首都是哪里？",
]


NAMES = ["run-0", "run-1", "model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the bundled model, and the model itself."""
    folder = tmp_path_factory.mktemp("runs")
    rows = tiny.write_rows(folder / "rows.jsonl", 8)
    given: dict[str, Any] = {"max_steps": 2, "lr": 0.02, "sample_prompts": 0, "val_share": 0.0, "cache": "none"}
    for n, name in enumerate(NAMES[:2]):
        fitune.train(model=MODEL, data=rows, output=folder / name, seed=n, **given)
    return [*(folder / name for name in NAMES[:2]), MODEL]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


def client_of(address: str, key: str = "none") -> OpenAI:
    """Where a test begins: to import it takes a second in each process that collects."""
    from openai import OpenAI

    return OpenAI(base_url=address, api_key=key, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def server(runs: list[Path], log: Path) -> Iterator[OpenAI]:
    with served(*runs, log=log) as address:
        yield client_of(address)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return load(MODEL, device="cpu")


def asked(client: OpenAI, question: str, tokens: int = 12, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    given: dict[str, Any] = {"temperature": 0, "extra_body": {"return_token_ids": True}, **more}
    return client.chat.completions.create(model="model", messages=messages, max_tokens=tokens, **given)


def alone(tuned: Tuned, question: str, tokens: int = 12) -> list[int]:
    """The ids of an answer that nothing else is answered beside."""
    found: list[int] = []
    with Batcher.open(tuned) as batcher:
        ids = tuned.encoder.prompt([Message("user", question)])
        batcher.add(Request(ids, Sampling(max_new_tokens=tokens), lambda token: found.append(token.id)))
        while batcher.busy:
            batcher.step()
    return found


def test_models_are_listed_by_the_names_of_their_folders(server: OpenAI) -> None:
    assert [one.id for one in server.models.list().data] == NAMES
    assert server.models.retrieve("model").id == "model"


@pytest.mark.parametrize("question", QUESTIONS[:3])
def test_an_answer_is_that_of_chat_in_text_and_ids_whole_and_streamed(
    server: OpenAI, tuned: Tuned, question: str
) -> None:
    whole = asked(server, question)
    assert whole.choices[0].message.content == Chat(tuned, Sampling(max_new_tokens=12)).say(question)
    assert whole.choices[0].token_ids == alone(tuned, question)
    assert whole.choices[0].prompt_token_ids == tuned.encoder.prompt([Message("user", question)])
    assert whole.usage.completion_tokens == len(whole.choices[0].token_ids)
    assert whole.usage.prompt_tokens == len(whole.choices[0].prompt_token_ids)
    chunks = list(asked(server, question, stream=True, stream_options={"include_usage": True}))
    streamed = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.delta.content or "" for one in streamed) == whole.choices[0].message.content
    assert [i for one in streamed for i in one.token_ids] == whole.choices[0].token_ids
    assert [one.finish_reason for one in streamed if one.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage


def test_64_clients_at_once_get_what_each_gets_alone(server: OpenAI, tuned: Tuned) -> None:
    expected = {question: alone(tuned, question) for question in QUESTIONS}
    with ThreadPoolExecutor(64) as clients:
        found = list(clients.map(lambda n: (n, asked(server, QUESTIONS[n % 6]).choices[0].token_ids), range(64)))
    assert [n for n, ids in found if ids != expected[QUESTIONS[n % 6]]] == []


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"model": "modl"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 10**6}, 400, "max_tokens"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature"),
        ({"messages": [{"role": "user", "content": "x" * 2**20}]}, 413, None),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(
    server: OpenAI, given: dict[str, Any], status: int, param: str | None
) -> None:
    from openai import APIStatusError

    request: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "x"}], **given}
    with pytest.raises(APIStatusError) as caught:
        server.chat.completions.create(**request)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert body["param"] == param
    assert body["message"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere",), "nowhere"),
        ((MODEL, "--port", "99999"), "out of range"),
        ((MODEL, "--host", "0.0.0.0"), "--api-key"),
        ((MODEL, MODEL), "the same run twice"),
    ],
)
def test_a_wrong_command_ends_with_exit_code_2(
    arguments: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command(["serve", *arguments], capsys, monkeypatch)
    assert code == 2
    assert text in err


# ---- limits, and who may ask ----


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a key and hardly any room."""
    bounds = ("--max-running", 1, "--max-waiting", 0, "--api-key", "sesame", "--max-new-tokens", 900)
    with served(MODEL, *bounds, log=tmp_path_factory.mktemp("narrow") / "log") as address:
        yield address


def raw(address: str, path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, Any]:
    """A request as anybody could send it: its status, and its body."""
    where = urlsplit(address)
    connection = HTTPConnection(where.hostname or "", where.port or 0, timeout=300)
    connection.request("POST" if body is not None else "GET", path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


KEY = {"Authorization": "Bearer sesame"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (KEY, 200),
        ({}, 401),
        ({"Authorization": "Bearer open"}, 401),
        ({**KEY, "Host": "evil.example"}, 403),
        ({**KEY, "Host": "127.0.0.1.evil.example:80"}, 403),
        ({**KEY, "Origin": "https://evil.example"}, 403),
        ({**KEY, "Host": "localhost", "Origin": "http://localhost:3000"}, 200),
    ],
)
def test_only_who_may_ask_is_answered(narrow: str, headers: dict[str, str], status: int) -> None:
    code, body = raw(narrow, "/v1/models", headers)
    assert code == status
    assert status == 200 or body["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [("text/plain", b"{}", 415), ("application/json", b"{", 400), ("application/json", b"[]", 400), ("", b"{}", 415)],
)
def test_a_body_that_is_no_json_is_refused(narrow: str, kind: str, body: bytes, status: int) -> None:
    headers = {**KEY, **({"Content-Type": kind} if kind else {})}
    code, answer = raw(narrow, "/v1/chat/completions", headers, body)
    assert (code, answer["error"]["type"]) == (status, "invalid_request_error")


def test_paths_that_are_not_there_are_refused_as_openai_does(narrow: str) -> None:
    assert raw(narrow, "/v1/embeddings", {**KEY, "Content-Type": "application/json"}, b"{}")[0] == 404
    assert raw(narrow, "/v1/chat/completions", KEY)[0] == 405


def waiting_for(address: str, requests: int) -> None:
    while raw(address, "/health", KEY)[1]["requests"] != requests:
        time.sleep(0.05)


def test_too_many_get_429_and_a_client_that_goes_away_frees_its_place(narrow: str) -> None:
    from openai import RateLimitError

    client = client_of(narrow, "sesame")
    long: dict[str, Any] = {"temperature": 1.5, "seed": 1, "extra_body": {"return_token_ids": True}}
    prompt: Any = [i % 1000 + 300 for i in range(20)]
    stream = client.completions.create(model="model", prompt=prompt, max_tokens=900, stream=True, **long)
    waiting_for(narrow, 1)
    with pytest.raises(RateLimitError) as caught:
        client.completions.create(model="model", prompt=prompt, max_tokens=2, **long)
    assert caught.value.response.headers["retry-after"]
    stream.close()
    waiting_for(narrow, 0)
    assert client.completions.create(model="model", prompt=prompt, max_tokens=2, **long).usage


# ---- how an answer is drawn, and what comes with it ----


def test_stop_texts_seeds_and_probabilities(server: OpenAI) -> None:
    whole = asked(server, QUESTIONS[0]).choices[0].message.content
    stop = whole[2:4]
    cut = asked(server, QUESTIONS[0], stop=[stop, "zzz"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = [chunk.choices[0] for chunk in asked(server, QUESTIONS[0], stop=stop, stream=True)]
    assert "".join(one.delta.content or "" for one in chunks) == cut.message.content
    drawn = [asked(server, QUESTIONS[3], temperature=1.2, seed=n).choices[0].token_ids for n in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) > 1
    named = asked(server, QUESTIONS[0], logprobs=True, top_logprobs=3).choices[0]
    assert "".join(one.token for one in named.logprobs.content) == whole
    assert all(one.logprob == one.top_logprobs[0].logprob for one in named.logprobs.content)  # greedy
    assert [len(one.top_logprobs) for one in named.logprobs.content] == [3] * len(named.token_ids)


def test_several_prompts_and_choices_of_a_text(server: OpenAI) -> None:
    several = server.completions.create(model="model", prompt=["The cat", "一"], temperature=0, max_tokens=4, n=2)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text
    for n, prompt in enumerate(["The cat", "一"]):
        alone = server.completions.create(model="model", prompt=prompt, temperature=0, max_tokens=4)
        assert alone.choices[0].text == several.choices[2 * n].text
    chunks = list(
        server.completions.create(model="model", prompt=["The cat", "一"], temperature=0, max_tokens=4, stream=True)
    )
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == n) for n in (0, 1)]
    assert texts == [several.choices[0].text, several.choices[2].text]


def test_several_runs_of_one_base_are_several_models(server: OpenAI, runs: list[Path], log: Path) -> None:
    def ask(n: int) -> str | None:
        messages: Any = [{"role": "user", "content": QUESTIONS[n // 3 % 6]}]
        made = server.chat.completions.create(model=NAMES[n % 3], messages=messages, temperature=0, max_tokens=8)
        return made.choices[0].message.content

    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(ask, range(12)))
    chats = [Chat(load(one, device="cpu"), Sampling(max_new_tokens=8)) for one in runs]
    for n, text in enumerate(found):
        chats[n % 3].reset()
        assert text == chats[n % 3].say(QUESTIONS[n // 3 % 6])
    assert len(set(found)) > 4
    held = [float(one) for one in re.findall(r"([\d.]+) MiB of it are those of the models before it", log.read_text())]
    size = (MODEL / "model.safetensors").stat().st_size / 2**20
    assert held == pytest.approx([size, size], rel=0.02)


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
@pytest.mark.parametrize("what", ["serve", "ui"])
def test_ctrl_c_before_the_event_loop_is_there_ends_the_server_and_breaks_nothing(
    what: str, model_folder: Path, tmp_path: Path
) -> None:
    """It comes while the line is written that names the address: taken in the making of the loop it left tracebacks."""
    lines = list[str]()

    def report(line: str) -> None:
        if "Ctrl-C stops" in line:
            signal.raise_signal(signal.SIGINT)
        lines.append(line)

    (tmp_path / "runs").mkdir()
    before = signal.getsignal(signal.SIGINT)
    start = {
        "serve": lambda: serve([model_folder], place=Place(port=0), report=report),
        "ui": lambda: ui.ui(port=0, runs=tmp_path / "runs", report=report),
    }
    with pytest.raises(KeyboardInterrupt):
        start[what]()
    assert "Ctrl-C stops" in lines[-1]  # the server took it, not the line
    assert signal.getsignal(signal.SIGINT) is before
