"""What the page asks for, checked: a model, data and settings; and the command that does the same.

In: the JSON of a body. Out: records; Refused names the field that is wrong. Settings that are paths of their own are
not taken: the page names models and data, and no other files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from fitune.commands.serve.errors import Refused
from fitune.commands.ui.paths import Roots
from fitune.core import as_flags
from fitune.core.config import RunConfig, merge, parse_assignments

PATHS = ("model", "data", "eval_data", "output", "adapter", "cache", "cache_size", "template")
TAKEN = frozenset(RunConfig.model_fields) - set(PATHS)


class Form(BaseModel):
    """A body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Wanted(Form):
    """A model, data and settings, as most tasks take them. gpu: what a plan is for. more: further settings as they are
    typed behind --set; they win."""

    model: str = Field(min_length=1, max_length=4096)
    data: list[str] = Field(default=[], max_length=100)
    eval_data: list[str] = Field(default=[], max_length=100)
    gpu: str | None = Field(default=None, max_length=100)
    settings: dict[str, Any] = {}
    more: str = Field(default="", max_length=4096)


F = TypeVar("F", bound=Form)


async def read(request: Request, kind: type[F]) -> F:
    """The record of a request's body.

    Raises:
        Refused: it is no JSON, or a field is wrong.
    """
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        problems = error.errors(include_url=False, include_input=False) if isinstance(error, ValidationError) else []
        text = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in problems[:5])
        raise Refused(400, text or "the body is not JSON") from None


W = TypeVar("W", bound=Wanted)


def inside(wanted: W, roots: Roots) -> W:
    """The same with paths that the page may use.

    Raises:
        Refused: a path is outside, or a setting is none that the page takes.
        ConfigError: further settings that are no settings.
    """
    try:
        settings = merge(wanted.settings, parse_assignments(shlex.split(wanted.more)))
    except ValueError as error:
        raise Refused(400, f"further settings: {error}", param="more") from None
    for name in settings:
        if name not in TAKEN:
            raise Refused(400, f"{name[:80]}: no setting of this page", param="settings")
    return wanted.model_copy(
        update={
            "settings": settings,
            "more": "",
            "model": roots.model(wanted.model),
            "data": [roots.shown(roots.path(one)) for one in wanted.data],
            "eval_data": [roots.shown(roots.path(one)) for one in wanted.eval_data],
        }
    )


def flags(settings: Mapping[str, Any], **lists: Sequence[str]) -> list[str]:
    """Settings as arguments, those that are lists of paths first."""
    paths = [part for name, values in lists.items() if values for part in (f"--{name.replace('_', '-')}", *values)]
    return [*paths, *shlex.split(as_flags.flags(settings))]


def command(*arguments: str) -> str:
    """What one types in a shell."""
    return shlex.join(["fitune", *arguments])
