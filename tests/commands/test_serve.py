"""A server answers OpenAI's client as `fitune chat` answers, however many ask."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from fitune.commands.chat import Chat
from fitune.core.records import Message
from fitune.engine.batching import Batcher, Request
from fitune.engine.drawing import Sampling
from fitune.engine.loading import load
from fitune.models.load import Tuned
from support.command import run as command
from support.serving import served

MODEL = Path(__file__).parents[2] / "src" / "fitune" / "bundled" / "model"
QUESTIONS = [
    "What is the capital of Norland?",
    "你好",
    "一加二等于几？",
    "Tell me a story.",
    "2 + 3?",
    "中国的首都是哪里？",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with served(MODEL, log=tmp_path_factory.mktemp("serve") / "log") as address:
        yield OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)


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


def test_the_model_is_listed_by_the_name_of_its_folder(server: OpenAI) -> None:
    assert [one.id for one in server.models.list().data] == ["model"]
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
