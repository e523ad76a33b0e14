"""The page's paths: its files, and JSON for each of its tasks.

In: HTTP requests that the guard and the door let through. Out: JSON. What takes long runs in threads; what runs torch,
one at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fitune.commands.serve.errors import Refused
from fitune.commands.serve.guard import Guard, Rules
from fitune.commands.ui import choose, hand_over, planned, runs, talk
from fitune.commands.ui.door import Door
from fitune.commands.ui.paths import EXPORTS, LOGS, UPLOADS, Roots, keep
from fitune.commands.ui.processes import Processes
from fitune.commands.ui.settings import Wanted, inside, read
from fitune.commands.ui.talk import Talk
from fitune.core.errors import FituneError, Problems
from fitune.core.files import as_json
from fitune.engine.turns import Turns
from fitune.views import looks

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass
class Desk:
    """What the paths answer with.

    Args:
        roots: the folders of this page.
        torch: one at a time works with it; answers let others go first, token by token.
    """

    roots: Roots
    torch: Turns = field(default_factory=Turns)
    newest: int = 0

    @cached_property
    def talk(self) -> Talk:
        """The model that talks."""
        return Talk(self.torch)

    @cached_property
    def processes(self) -> Processes:
        """Processes of their own."""
        return Processes(self.roots.runs / LOGS, self.roots.work)

    async def alone(self, work: Callable[[], dict[str, object]], *, latest: bool = False) -> Response:
        """What the work gives, while nobody else works.

        Args:
            work: is called in a thread.
            latest: it is left out where another such request came while it waited; the answer says so.
        """
        self.newest += latest
        mine = self.newest

        def done() -> dict[str, object]:
            with self.torch:
                if latest and mine != self.newest:
                    return {"superseded": True}
                return work()

        return answer(await run_in_threadpool(done))


def answer(value: Mapping[str, object]) -> Response:
    """JSON, without numbers that JSON has not."""
    return Response(as_json(value), media_type="application/json")


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, with their kinds."""
    found = {}
    own = resources.files("fitune.commands.ui").joinpath("page").iterdir()
    shared = (resources.files("fitune.views.pages").joinpath(name) for name in ("chart.js", "chart.css"))
    for file in [*own, *shared]:
        kind = KINDS.get(f".{file.name.rpartition('.')[2]}")
        if kind is not None:
            found[file.name] = (file.read_bytes(), kind)
    return {**found, "looks.css": (looks.of_switch().encode(), KINDS[".css"])}


Handler = Callable[[Request], Awaitable[Response]]


def _routes(desk: Desk) -> dict[str, tuple[str, Handler]]:
    """The paths below /api/, with their methods."""
    roots = desk.roots

    async def start(request: Request) -> Response:
        bundled = {"bundled_model": choose.bundled_model(), "samples": choose.samples_of_package()}
        return answer({**bundled, "choices": planned.choices(), "exports": f"{roots.shown(roots.runs)}/{EXPORTS}"})

    async def models(request: Request) -> Response:
        return answer({"models": await run_in_threadpool(choose.models, roots)})

    async def files(request: Request) -> Response:
        path = request.query_params.get("path", "") or str(roots.work)
        return answer({"path": path, "entries": await run_in_threadpool(roots.listed, path)})

    async def upload(request: Request) -> Response:
        kept = await keep(roots.runs / UPLOADS, request.query_params.get("name", ""), request.stream())
        return answer({"path": roots.shown(kept)})

    async def rows(request: Request) -> Response:
        wanted = await read(request, choose.Rows)
        allowed = inside(wanted, roots)
        return await desk.alone(lambda: choose.rows(allowed, roots))

    async def plan(request: Request) -> Response:
        allowed = inside(await read(request, planned.Planned), roots)
        return await desk.alone(lambda: planned.plan(allowed), latest=True)

    async def advice(request: Request) -> Response:
        allowed = inside(await read(request, Wanted), roots)
        return await desk.alone(lambda: planned.advice(allowed))

    return {
        "start": ("GET", start), "models": ("GET", models), "files": ("GET", files), "upload": ("PUT", upload),
        "rows": ("POST", rows), "plan": ("POST", plan), "advice": ("POST", advice),
    }  # fmt: skip


def _of_runs(desk: Desk) -> dict[str, tuple[str, Handler]]:
    """The paths of runs below /api/, with their methods."""
    roots, processes = desk.roots, desk.processes

    async def listed(request: Request) -> Response:
        return answer({"runs": await run_in_threadpool(runs.listed, roots, processes)})

    async def shown(request: Request) -> Response:
        return answer(await run_in_threadpool(runs.shown, request.query_params.get("run", ""), roots, processes))

    async def steps(request: Request) -> Response:
        name, start = request.query_params.get("run", ""), request.query_params.get("from", "0")
        if not start.isdecimal() or len(start) > 15:
            raise Refused(400, f"from: {start[:20]!r}; expected: a number of bytes", param="from")
        return answer(await run_in_threadpool(runs.steps, name, roots, int(start)))

    async def preview(request: Request) -> Response:
        allowed = inside(await read(request, runs.Begun), roots)
        return answer({"command": await run_in_threadpool(runs.preview, allowed, roots, processes)})

    async def begin(request: Request) -> Response:
        allowed = inside(await read(request, runs.Begun), roots)
        return answer(await run_in_threadpool(runs.begin, allowed, roots, processes))

    async def act(request: Request) -> Response:
        asked = await read(request, runs.Act)
        return answer(await run_in_threadpool(runs.act, asked, roots, processes))

    async def report(request: Request) -> Response:
        page = roots.run(request.query_params.get("run", "")) / "report.html"
        if not page.is_file():
            raise Refused(404, "this run has no report yet", param="run")
        return Response(page.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": ALONE})

    return {
        "runs": ("GET", listed), "run": ("GET", shown), "steps": ("GET", steps), "command": ("POST", preview),
        "begin": ("POST", begin), "act": ("POST", act), "report": ("GET", report),
    }  # fmt: skip


def _of_results(desk: Desk) -> dict[str, tuple[str, Handler]]:
    """The paths of what is done with finished runs below /api/, with their methods."""
    roots, processes = desk.roots, desk.processes

    async def chat(request: Request) -> Response:
        asked = await read(request, talk.Question)
        folder = roots.run(asked.run)
        return StreamingResponse(talk.stream(desk.talk, asked, folder), media_type="application/x-ndjson")

    async def drop(request: Request) -> Response:
        await run_in_threadpool(desk.talk.drop)
        return answer({})

    async def exports(request: Request) -> Response:
        return answer({"exports": await run_in_threadpool(hand_over.listed, roots, processes)})

    async def export(request: Request) -> Response:
        asked = await read(request, hand_over.Handed)
        return answer(await run_in_threadpool(hand_over.hand_over, asked, roots, processes))

    async def download(request: Request) -> Response:
        path = hand_over.downloaded(request.query_params.get("path", ""), roots)
        if path.is_file():
            return FileResponse(path, filename=path.name)
        name = f"{path.parent.name}-{path.name}" if path.name == "adapter" else path.name
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(name)}.zip"}
        return StreamingResponse(hand_over.zipped(path), media_type="application/zip", headers=headers)

    return {
        "chat": ("POST", chat), "drop": ("POST", drop), "exports": ("GET", exports), "export": ("POST", export),
        "download": ("GET", download),
    }  # fmt: skip


# a page of a run folder: it may draw, and can neither call this server nor be taken for its page
ALONE = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)


def _file(content: bytes, kind: str) -> Handler:
    async def file(request: Request) -> Response:
        return Response(content, media_type=kind)

    return file


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _problem(request: Request, error: Exception) -> Response:
    """An error of fitune's: what was received, what was expected, how to fix it."""
    problems = error.problems if isinstance(error, Problems) else [error]
    return JSONResponse({"error": {"message": "\n".join(map(str, problems)), "code": "problem"}}, 400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, f"nothing at {request.method} {request.url.path}"[:200]).response(error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return Refused(500, f"the page's server failed: {type(error).__name__}: {error}"[:500]).response()


def app_of(desk: Desk, *, token: str, rules: Rules) -> Guard:
    """The ASGI app.

    Args:
        desk: what it works with.
        token: of the address.
        rules: who may ask.
    """
    files, paths = page_files(), {**_routes(desk), **_of_runs(desk), **_of_results(desk)}
    routes = [Route(f"/{name}", _file(*file)) for name, file in files.items()]
    routes.append(Route("/", _file(*files["index.html"])))
    routes += [Route(f"/api/{path}", handler, methods=[method]) for path, (method, handler) in paths.items()]
    handlers = {Refused: _refused, FituneError: _problem, HTTPException: _http_error, Exception: _failed}
    return Guard(Door(Starlette(routes=routes, exception_handlers=handlers), token), rules)
