"""A page of fitune as a picture for the documentation, as chromium draws it.

    fitune demo --output runs/demo && python scripts/picture.py runs/demo/report.html docs/report.png --height 1400
    fitune plan llama-3.1-8b --gpu 24GB --data my.jsonl --html fits.html
    python scripts/picture.py fits.html docs/fits.png --height 1560

In: a page. Out: a PNG below 200 KB, or an error that says by how much it is above.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 200_000  # bytes
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Read the arguments, draw, and look at the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100, help="pixels")
    parser.add_argument("--height", type=int, default=1500, help="pixels; what is below is cut off")
    given = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit("no browser; fix: apt-get install chromium fonts-noto-cjk")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={given.width},{given.height}"]
        command += [f"--screenshot={given.picture.resolve()}", given.page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    size = given.picture.stat().st_size
    print(f"{given.picture}: {size:,} bytes")
    if size > MOST:
        sys.exit(f"above {MOST:,} bytes; fix: a smaller --height or --width")


if __name__ == "__main__":
    main()
