"""The page's paths: its files, and JSON for each of its tasks.

In: HTTP requests that the guard and the door let through. Out: JSON. What takes long runs in threads; what runs torch,
one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fitune.commands.serve.errors import Refused
from fitune.commands.serve.guard import Guard, Rules
from fitune.commands.ui import choose, planned
from fitune.commands.ui.door import Door
from fitune.commands.ui.paths import UPLOADS, Roots, keep
from fitune.commands.ui.settings import Wanted, inside, read
from fitune.core.errors import FituneError, Problems
from fitune.core.files import as_json

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass
class Desk:
    """What the paths answer with.

    Args:
        roots: the folders of this page.
        torch: one at a time works with it.
    """

    roots: Roots
    torch: threading.Lock = field(default_factory=threading.Lock)
    newest: int = 0

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
    for file in resources.files("fitune.commands.ui").joinpath("page").iterdir():
        kind = KINDS.get(f".{file.name.rpartition('.')[2]}")
        if kind is not None:
            found[file.name] = (file.read_bytes(), kind)
    return found


Handler = Callable[[Request], Awaitable[Response]]


def _routes(desk: Desk) -> dict[str, tuple[str, Handler]]:
    """The paths below /api/, with their methods."""
    roots = desk.roots

    async def start(request: Request) -> Response:
        bundled = {"bundled_model": choose.bundled_model(), "samples": choose.samples_of_package()}
        return answer({**bundled, "choices": planned.choices()})

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
    files = page_files()
    routes = [Route(f"/{name}", _file(*file)) for name, file in files.items()]
    routes.append(Route("/", _file(*files["index.html"])))
    routes += [Route(f"/api/{path}", handler, methods=[method]) for path, (method, handler) in _routes(desk).items()]
    handlers = {Refused: _refused, FituneError: _problem, HTTPException: _http_error, Exception: _failed}
    return Guard(Door(Starlette(routes=routes, exception_handlers=handlers), token), rules)
