"""The page's server: what it answers, and 200 requests that nobody may make, each of them refused."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from fitune.commands import ui
from fitune.commands.serve.errors import Refused
from fitune.commands.ui import planned, self_test
from fitune.commands.ui.paths import Roots, file_name
from fitune.commands.ui.settings import Wanted, inside
from fitune.core.errors import FituneError
from support import command, tiny
from support import page as pages
from support.page import Asked, Site, post, put

SEED, COUNT = 20, 200
SECRET = "nobody may read this"


pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and paths of POSIX")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Site]:
    work = tmp_path_factory.mktemp("work")
    outside = work.parent / "outside"
    outside.mkdir()
    (outside / "secret.jsonl").write_text(json.dumps({"prompt": SECRET, "completion": SECRET}) + "\n")
    (work / ".hidden").mkdir()
    (work / ".hidden" / "secret.jsonl").write_text((outside / "secret.jsonl").read_text())
    (work / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (work / "linked").symlink_to(outside)
    (work / "model").symlink_to(model_folder)
    tiny.write_rows(work / "rows.jsonl", 12)
    with pages.inside(work), ui.running(ui.roots_of(folders=[model_folder]), upload_mib=2) as address:
        yield Site(address, work)


# ---- what the page does ----


def test_rows_are_shown_with_their_mask_and_the_command(site: Site) -> None:
    found = site.json("api/rows", {"model": "model", "data": ["rows.jsonl"], "samples": 2})
    assert found["rows"]["read"] == 12
    assert len(found["samples"]) == 2
    tokens = found["samples"][0]["tokens"]
    assert {token["trained"] for token in tokens} == {True, False}
    assert sum(token["border"] for token in tokens) >= 1
    assert found["command"].startswith("fitune inspect rows.jsonl --model ")
    assert {one["level"] for one in found["findings"]} <= {"ok", "fixed", "warn", "refuse"}


def test_a_plan_at_once_and_the_traced_one(site: Site) -> None:
    wanted = {"model": "model", "data": ["rows.jsonl"], "settings": {"batch_size": 2, "quant": "none"}}
    quick = site.json("api/plan", {**wanted, "quick": True})
    exact = site.json("api/plan", wanted)
    assert (quick["how"], exact["how"]) == ("closed form", "trace")
    for plan in (quick, exact):
        assert plan["needed"] == sum(plan["parts"].values())
        assert set(plan["colours"]) == set(plan["parts"])
        assert all(f"fill=\"var({colour})\"" in one for one in plan["drawn"] for name, colour in plan["colours"].items()
                   if plan["parts"][name])  # fmt: skip
        assert plan["fits"] is True
    assert "--batch-size 2" in quick["commands"]["train"]


def test_more_rows_in_a_batch_take_more(site: Site) -> None:
    sizes = [
        site.json("api/plan", {"model": "llama-3.2-1b", "gpu": "24GB", "quick": True, "settings": {"batch_size": rows}})
        for rows in (1, 32)
    ]
    assert sizes[0]["parts"]["activations"] * 30 < sizes[1]["parts"]["activations"]
    assert [one["fits"] for one in sizes] == [True, False]


def test_an_upload_is_kept_beside_the_runs_and_overwrites_nothing(site: Site) -> None:
    first, second = (json.loads(site.answer(put("my rows.jsonl"))[1])["path"] for _ in range(2))
    assert (first, second) == ("runs/uploads/my rows.jsonl", "runs/uploads/my rows-2.jsonl")
    assert site.json("api/rows", {"model": "model", "data": [first], "samples": 1})["rows"]["read"] == 1
    assert not [one for one in (site.work / "runs" / "uploads").iterdir() if one.name.startswith(".")]


def test_mistakes_come_back_with_their_fix(site: Site) -> None:
    status, body = site.answer(post("api/plan", {"model": "model", "settings": {"batch_size": 0, "method": "lra"}}))
    assert status == 400
    assert "batch_size" in json.loads(body)["error"]["message"]
    status, body = site.answer(post("api/plan", {"model": "model", "settings": {"output": "/tmp/x"}}))
    assert status == 400
    assert "no setting of this page" in json.loads(body)["error"]["message"]


def test_models_and_files_that_can_be_chosen(site: Site) -> None:
    kinds = {one["kind"] for one in site.json("api/models")["models"]}
    assert {"bundled", "catalog"} <= kinds
    names = {one["name"] for one in site.json("api/files")["entries"]}
    assert "rows.jsonl" in names
    assert ".hidden" not in names


def test_the_page_holds_nothing_for_others(site: Site) -> None:
    parts = urlsplit(site.address)
    connection = HTTPConnection(str(parts.hostname), parts.port)
    connection.request("GET", parts.path)
    headers = dict(connection.getresponse().getheaders())
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


def test_the_self_test_passes_and_finds_a_planted_fault(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = self_test.passed(site.address)
    assert "passed: no token (401)" in lines
    asked = self_test.Question("a planted fault", 401, "api/start")
    monkeypatch.setattr(self_test, "questions", lambda: iter([asked]))
    with pytest.raises(FituneError, match="a planted fault is answered with status 200"):
        self_test.passed(site.address)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--check"], 0, "passed: a plan (200)"),
        (["--port", "70000"], 2, "expected: port 0 to 65535"),
        (["--folder", "nowhere"], 2, "received: nowhere"),
    ],
)
def test_the_command(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, _, error = command.run(["ui", *arguments], capsys, monkeypatch)
    assert found == code
    assert text in error
    assert list(tmp_path.iterdir()) == []  # nothing is written before somebody asks for it


# ---- what nobody may do ----

UPWARDS = ("../", "..\\", "%2e%2e/", "....//../", "./../", "a/../../")
SYSTEM = ("etc/passwd", "secret.jsonl", "proc/self/environ")


def traversal(draw: random.Random, site: Site) -> Asked:
    path = draw.choice(UPWARDS) * draw.randint(1, 8) + draw.choice(SYSTEM)
    kinds = [
        Asked("GET", f"api/files?path={quote(path)}"),
        Asked("GET", path),
        Asked("GET", f"api/{path}"),
        post("api/rows", {"model": "model", "data": [path]}),
        post("api/plan", {"model": path, "quick": True}),
    ]
    return draw.choice(kinds)


def absolute(draw: random.Random, site: Site) -> Asked:
    path = draw.choice(
        [
            "/etc/passwd",
            "/",
            "/proc/self/environ",
            str(site.work.parent / "outside"),
            str(site.work.parent / "outside" / "secret.jsonl"),
            "/root",
        ]
    )
    return draw.choice(
        [Asked("GET", f"api/files?path={quote(path)}"), post("api/rows", {"model": "model", "data": [path]})]
    )


def link(draw: random.Random, site: Site) -> Asked:
    path = draw.choice(["link.jsonl", "linked/secret.jsonl", "linked", ".hidden", ".hidden/secret.jsonl"])
    return draw.choice(
        [Asked("GET", f"api/files?path={path}"), post("api/rows", {"model": "model", "data": [path]}),
         post("api/plan", {"model": "model", "data": [path], "quick": True})]
    )  # fmt: skip


def other_host(draw: random.Random, site: Site) -> Asked:
    host = draw.choice(
        ["example.org", "127.0.0.1.example.org", "localhost.example.org:80", "", "[::2]", "0.0.0.0", "[", "a@b"]
    )
    return replace(usual(draw), headers={**usual(draw).headers, "Host": host})


def other_origin(draw: random.Random, site: Site) -> Asked:
    port = urlsplit(site.address).port
    origin = draw.choice(
        ["https://example.org", "null", "http://127.0.0.1", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port}.example.org",
         "http://localhost:3000", "http://[", "file://"]
    )  # fmt: skip
    asked = usual(draw)
    return replace(asked, headers={**asked.headers, "Origin": origin})


def other_site(draw: random.Random, site: Site) -> Asked:
    asked = usual(draw)
    return replace(asked, headers={**asked.headers, "Sec-Fetch-Site": draw.choice(["cross-site", "same-site", "x"])})


def no_token(draw: random.Random, site: Site) -> Asked:
    token = urlsplit(site.address).path
    wrong = [
        "/",
        f"/{'a' * 22}/",
        token[:-2] + "/",
        token.lower() + "x/",
        f"/{token}",
        token[:-1] + "%00/",
        "/%C3%A9/",
    ]
    return replace(usual(draw), token=draw.choice(wrong))


def huge(draw: random.Random, site: Site) -> Asked:
    asked = draw.choice([put("big.jsonl"), post("api/plan", {}), post("api/rows", {})])
    return replace(
        asked, headers={**asked.headers, "Content-Length": str(draw.choice([2**21 + 1, 2**40, 2**63]))}, body=None
    )


def bad_name(draw: random.Random, site: Site) -> Asked:
    names = [
        "../a.jsonl",
        "..",
        "a/b.jsonl",
        "..\\a.jsonl",
        ".a.jsonl",
        "/etc/a.jsonl",
        "a.py",
        "a.jsonl\0.py",
        "",
        "a.sh",
        "x\n.csv",
        "C:\\a.csv",
    ]
    return put(draw.choice(names))


def wrong_kind(draw: random.Random, site: Site) -> Asked:
    asked = draw.choice([put("a.jsonl"), post("api/plan", {"model": "model"}), post("api/rows", {"model": "model"})])
    return replace(
        asked,
        headers={
            "Content-Type": draw.choice(["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
        },
    )


def wrong_method(draw: random.Random, site: Site) -> Asked:
    return Asked(
        draw.choice(["OPTIONS", "DELETE", "PATCH", "TRACE", "CONNECTED"]), draw.choice(["", "api/start", "api/plan"])
    )


BODIES = [
    b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"model": 1}', b'{"model": "m", "more": 1}',
    b'{"model": "m", "data": "x"}', b'{"model": "model", "settings": {"output": "/tmp/x"}}',
    b'{"model": "model", "settings": {"cache": "/tmp/x"}}', b'{"model": "model", "gpu": ";ls"}',
]  # fmt: skip


def wrong_body(draw: random.Random, site: Site) -> Asked:
    body = draw.choice(BODIES)
    return Asked("POST", draw.choice(["api/plan", "api/rows"]), body, {"Content-Type": "application/json"})


def usual(draw: random.Random) -> Asked:
    """What the page itself might ask."""
    return draw.choice([Asked("GET", "api/start"), Asked("GET", "api/files"), Asked("GET", "api/models"),
                        post("api/plan", {"model": "model", "quick": True})])  # fmt: skip


def wrong_run(draw: random.Random, site: Site) -> Asked:
    """Runs that are none, and files of others as downloads."""
    path = draw.choice(
        ["../outside", "..", "/etc", "model", "../../etc/passwd", "runs", "linked", "a/../../outside", "x\0y", "."]
    )
    named = quote(path)
    kinds = [
        Asked("GET", f"api/run?run={named}"), Asked("GET", f"api/steps?run={named}&from=0"),
        Asked("GET", f"api/report?run={named}"), Asked("GET", f"api/download?path={named}"),
        Asked("GET", f"api/download?path=runs/uploads/{named}"), Asked("GET", "api/steps?run=x&from=-1"),
        post("api/act", {"run": path, "action": draw.choice(["pause", "stop", "resume", "remove"])}),
        post("api/begin", {"model": "model", "data": ["rows.jsonl"], "name": path}),
        post("api/begin", {"model": "model", "data": ["rows.jsonl"], "settings": {"output": path}}),
        post("api/export", {"run": path, "to": draw.choice(["merge", "gguf", "shell"])}),
        post("api/chat", {"run": path, "messages": [{"role": "user", "content": "x"}]}),
    ]  # fmt: skip
    return draw.choice(kinds)


KINDS: list[Callable[[random.Random, Site], Asked]] = [
    traversal, absolute, link, other_host, other_origin, other_site, no_token, huge, bad_name, wrong_kind, wrong_method,
    wrong_body, wrong_run,
]  # fmt: skip


def test_hostile_requests_are_refused(site: Site) -> None:
    draw = random.Random(SEED)
    before = sorted(site.work.rglob("*"))
    for number in range(COUNT):
        asked = KINDS[number % len(KINDS)](draw, site)
        status, body = site.answer(asked)
        assert 400 <= status < 500, (number, asked, status, body[:300])
        assert b"root:x:" not in body  # of /etc/passwd
        assert b'"tokens"' not in body  # of rows
    assert sorted(site.work.rglob("*")) == before
    assert site.json("api/start")["choices"]  # and it answers on


def test_a_door_that_stands_open_is_seen(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards one by one: without each of them a request of its kind comes through."""
    draw = random.Random(SEED)
    monkeypatch.setattr(Roots, "path", lambda self, text, *inside: Path(os.path.realpath(self.work / text)))
    tokens = site.json("api/rows", {"model": "model", "data": ["link.jsonl"]})["samples"][0]["tokens"]
    assert SECRET in "".join(token["text"] for token in tokens)
    monkeypatch.undo()
    monkeypatch.setattr("fitune.commands.ui.door.Door._check_origin", lambda self, headers, api: None)
    assert {site.answer(other_site(draw, site))[0] for _ in range(4)} == {200}
    monkeypatch.undo()
    monkeypatch.setattr("fitune.commands.ui.door.hmac.compare_digest", lambda a, b: True)
    assert site.answer(Asked("GET", "api/start", token=f"/{'a' * 22}/"))[0] == 200


@pytest.mark.parametrize("name", ["rows.jsonl", "数据 (1).csv", "a.jsonl.gz", "x.parquet"])
def test_names_of_files_that_are_kept(name: str) -> None:
    assert file_name(name) == name


def test_odd_characters_of_a_name_go(tmp_path: Path) -> None:
    assert file_name("a;b$(c)`d`.jsonl") == "a_b_(c)_d_.jsonl"
    assert len(file_name("x" * 400 + ".jsonl")) <= 120
    with pytest.raises(Refused):
        inside(Wanted(model="llama-3.2-1b", settings={"adapter": "/tmp"}), Roots(tmp_path, tmp_path / "runs"))


def test_a_command_is_what_was_asked() -> None:
    wanted = Wanted(
        model="llama-3.2-1b", data=["a b.jsonl"], gpu="24GB", settings={"quant": "nf4", "lora": {"rank": 4}}
    )
    assert planned.train_command(wanted, "runs/x") == (
        "fitune train --model llama-3.2-1b --data 'a b.jsonl' --quant nf4 --lora.rank 4 --output runs/x"
    )
    assert planned.plan_command(wanted) == (
        "fitune plan llama-3.2-1b --data 'a b.jsonl' --gpu 24GB --quant nf4 --lora.rank 4"
    )


PAGE = Path(ui.__file__).parent / "page"
TEXT = re.compile(r"(?:'([\w -]+)'|(\w+)): \['((?:[^'\\]|\\.)*)', '((?:[^'\\]|\\.)*)'\]")


def test_no_text_is_missing_in_a_language() -> None:
    source = (PAGE / "texts.js").read_text(encoding="utf-8")
    texts = {quoted or name: (english, chinese) for quoted, name, english, chinese in TEXT.findall(source)}
    assert len(texts) == source.count("['") > 150
    assert [name for name, each in texts.items() if not all(each)] == []
    assert [
        name for name, (english, _) in texts.items() if re.search("[\u4e00-\u9fff]", english) and name != "language"
    ] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir()) if path.name != "texts.js")
    used = re.findall(r"\bt\('([\w -]+)'\)|data-(?:t|label|hint)=\"(\w+)\"", sources)
    assert {one or other for one, other in used} <= set(texts)
    made = set(re.findall(r"\bt\(`(\w+_)\$\{", sources))
    assert all(any(name.startswith(start) for name in texts) for start in made)


def not_imported(source: str, helpers: str) -> set[str]:
    """Helpers of api.js that a module of the page calls without importing them."""
    exported = re.findall(r"^export (?:async )?(?:const|function|class) ([\w$]+)", helpers, re.MULTILINE)
    imported = {
        one.strip() for part in re.findall(r"^import \{([^}]*)\}", source, re.MULTILINE) for one in part.split(",")
    }
    called = {one for one in exported if re.search(rf"(?<![\w$'])(?<![^.]\.){re.escape(one)}\(", source)}
    return called - imported


def test_modules_of_the_page_import_what_they_call() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}
    helpers = sources.pop("api.js")
    assert {name: found for name, source in sources.items() if (found := not_imported(source, helpers))} == {}
    assert not_imported(sources["plan.js"].replace("during, ", ""), helpers) == {"during"}
