"""What installing fitune downloads, and what it takes on the disk; without installing anything.

    python scripts/install_sizes.py cpu --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple
    python scripts/install_sizes.py cuda --index-url https://pypi.org/simple

In: a name for what is measured, and pip's own options. Out: the largest packages; the totals in results/install.json;
and the table in docs/install.md, in both languages. `pip install --dry-run --report` says which wheels
pip would take on this machine; of each only the list of its files is read, from the end of the wheel.
"""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "src" / "fitune" / "constraints.txt"
RESULTS = ROOT / "results" / "install.json"
PAGES = (ROOT / "docs" / "install.md", ROOT / "docs" / "install.zh-CN.md")
BEGIN, END = "<!-- scripts/install_sizes.py -->\n", "<!-- end -->"
HEADS = (
    "| | torch | packages | download | on the disk | date, Python |",
    "| | torch | 包 | 下载 | 磁盘 | 日期、Python |",
)
SHOWN = 8  # packages, the largest first


class Remote(io.RawIOBase):
    """A file on a server, of which only the parts that are read are fetched."""

    def __init__(self, address: str) -> None:
        self.address, self.at = address, 0
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.size, self.at + size)
        if end <= self.at:
            return b""
        wanted = urllib.request.Request(self.address, headers={"Range": f"bytes={self.at}-{end - 1}"})
        with urllib.request.urlopen(wanted) as answer:
            got: bytes = answer.read()
        self.at += len(got)
        return got


def sizes(address: str) -> tuple[int, int]:
    """The bytes of a wheel, and of its files once they are unpacked; of the rare source archive the second are a guess:
    as many again as its own."""
    path = Path(unquote(urlsplit(address).path))
    opened = path.open("rb") if address.startswith("file:") else Remote(address)
    size = path.stat().st_size if address.startswith("file:") else opened.seek(0, 2)
    with opened:
        if path.suffix != ".whl":
            return size, 2 * size
        with zipfile.ZipFile(opened) as wheel:
            return size, sum(one.file_size for one in wheel.infolist())


def chosen(options: list[str]) -> list[dict[str, Any]]:
    """The wheels that pip would take for the two lines of the README."""
    torch = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary", "torch"]
        asked = ["--report", str(report), "--constraint", str(CONSTRAINTS), torch, str(ROOT), *options]
        subprocess.run([*command, "--quiet", *asked], check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found


def lines(head: str) -> str:
    """The totals as a Markdown table."""
    totals = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [
        f"| `python scripts/install_sizes.py {name} {' '.join(one['options'])}`".rstrip("` ") + "` "
        f"| {one['torch']} | {one['packages']} | {one['download_mb']:,} MB | {one['disk_mb']:,} MB "
        f"| {one['date']}, {one['python']} |"
        for name, one in totals.items()
    ]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"


def replaced(page: Path, head: str) -> str:
    """A page with the table as it is now."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + lines(head) + END + rest.split(END, 1)[1]


def main() -> int:
    """See the module's text."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    rows, torch = [], ""
    for one in chosen(sys.argv[2:]):
        name, version = one["metadata"]["name"], one["metadata"]["version"]
        torch = version if name == "torch" else torch
        if "dir_info" not in one["download_info"]:  # fitune itself, which is here
            rows.append((name, version, *sizes(one["download_info"]["url"])))
    rows.sort(key=lambda row: -row[3])
    for name, version, packed, unpacked in rows[:SHOWN]:
        print(f"{name:30} {version:14} {packed / 1e6:8,.0f} MB {unpacked / 1e6:8,.0f} MB")
    total = {
        "date": f"{datetime.now():%Y-%m-%d}",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "options": sys.argv[2:],
        "torch": torch,
        "packages": len(rows),
        "download_mb": round(sum(row[2] for row in rows) / 1e6),
        "disk_mb": round(sum(row[3] for row in rows) / 1e6),
        "largest": [f"{row[0]} {row[1]}" for row in rows[:SHOWN]],
    }
    print(json.dumps(total, indent=1))
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(before | {sys.argv[1]: total}, indent=1) + "\n", encoding="utf-8")
    for page, head in zip(PAGES, HEADS, strict=True):
        page.write_text(replaced(page, head), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
