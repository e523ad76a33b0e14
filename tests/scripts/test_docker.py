"""The Dockerfile: read as its builder does, as far as that goes without building."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "src" / "fitune" / "constraints.txt").read_text(encoding="utf-8").splitlines()
KNOWN = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "ARG"}


@dataclass
class Stage:
    """An image of the file. below: the stage that it begins from, or None: an image of a registry."""

    name: str
    image: str
    below: Stage | None
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        """What an instruction set last, here or in a stage below."""
        own = [value for name, value in self.steps if name == instruction]
        return own[-1] if own else self.below.last(instruction) if self.below else None


def parsed(text: str) -> dict[str, Stage]:
    """The stages, by name."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, value = line.partition(" ")
        assert instruction in KNOWN, f"no instruction: {line}"
        if instruction == "FROM":
            words = value.split()
            assert len(words) == 3, value
            assert words[1] == "AS", value
            stage = stages[words[2]] = Stage(words[2], words[0], stages.get(words[0]))
            continue
        assert stage is not None, f"before the first FROM: {line}"
        stage.steps.append((instruction, value))
    return stages


def wrong(text: str) -> list[str]:
    """What a builder, or whoever runs the image, would stumble over."""
    stages = parsed(text)
    found = []
    for stage in stages.values():
        for instruction, value in stage.steps:
            words = shlex.split(value)
            if instruction == "COPY" and words[0].startswith("--from="):
                found += [] if words[0].removeprefix("--from=") in stages else [f"no stage: {value}"]
            elif instruction == "COPY":
                found += [f"not there: {one}" for one in words[:-1] if not (ROOT / one).exists()]
                found += [f"left out by .dockerignore: {one}" for one in words[:-1] if ignored(one)]
            for pinned in re.findall(r"[\w.-]+==[\w.+]+", value):
                found += [] if pinned in CONSTRAINTS else [f"not the version of constraints.txt: {pinned}"]
            if instruction == "RUN" and "pip install ." in value and "--constraint" not in value:
                found.append(f"without the constraints: {value}")
        found += [] if stage.below or re.fullmatch(r"[\w./-]+:[\w.-]+", stage.image) else [f"no tag: {stage.image}"]
    for name in ("cpu", "cuda"):
        if stages[name].last("USER") in (None, "root", "0"):
            found.append(f"{name}: runs as root")
        if json.loads(stages[name].last("ENTRYPOINT") or "null") != ["fitune"]:
            found.append(f"{name}: another entry point")
    return found if list(stages)[-1] == "cpu" else [*found, "a plain build must be the CPU's"]


def ignored(path: str) -> bool:
    """Does .dockerignore leave a path out? The last line that matches decides."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            left_out = not line.startswith("!")
    return left_out


TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_it_parses_and_nothing_in_it_is_missing() -> None:
    assert wrong(TEXT) == []
    stages = parsed(TEXT)
    images = {stage.image for stage in stages.values() if stage.below is None}
    assert len(images) == 1  # a virtual environment is of the Python that made it
    version = re.fullmatch(r"python:3\.(\d+)-slim", images.pop())
    assert version is not None
    least = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert int(version[1]) >= int(least.removeprefix(">=3."))
    assert all(any("constraints.txt" in step[1] for step in stages[f"build-{name}"].steps) for name in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("there", "planted", "what"),
    [
        ("COPY src ./src", "COPY source ./src", "not there: source"),
        ("COPY src ./src", "COPY docs ./src", "left out by .dockerignore: docs"),
        ("--from=build-cpu", "--from=build-rocm", "no stage: --from=build-rocm /opt/fitune /opt/fitune"),
        (
            "\"$(grep '^torch==' src/fitune/constraints.txt)\"\n",
            "torch==2.0.0\n",
            "not the version of constraints.txt: ",
        ),
        ("pip install . --constraint src/fitune/constraints.txt", "pip install .", "without the constraints: "),
        ("USER fitune\n", "", "cuda: runs as root"),
        ('ENTRYPOINT ["fitune"]', 'ENTRYPOINT ["sh"]', "cpu: another entry point"),
        ("python:3.12-slim", "python", "no tag: python"),
        ("AS cpu", "AS cuda", "cpu"),
    ],
)
def test_what_is_planted_is_found(there: str, planted: str, what: str) -> None:
    assert there in TEXT
    broken = TEXT.replace(there, planted)
    if what == "cpu":
        with pytest.raises(KeyError, match="cpu"):
            wrong(broken)
    else:
        assert any(one.startswith(what) for one in wrong(broken)), wrong(broken)


@pytest.mark.parametrize("text", ["FORM python:3.12-slim AS cpu", "RUN true", "FROM python:3.12-slim"])
def test_what_is_no_dockerfile_is_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        parsed(text)
