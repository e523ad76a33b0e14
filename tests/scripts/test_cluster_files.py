"""The files for clusters in the docs: they are what their systems read, and their command is one that fitune takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fitune.core.config import RunConfig, build

ROOT = Path(__file__).parents[2]
PAGES = ("cluster.md", "cluster.zh-CN.md")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to parse scripts")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


def settings_of(text: str) -> RunConfig:
    """The settings that a command has after `fitune train`; refused where fitune would refuse them."""
    typed = shlex.split(text.replace("\\\n", " ").partition("fitune train")[2])
    names = [flag.removeprefix("--").replace("-", "_") for flag in typed[::2]]
    return build(dict(zip(names, typed[1::2], strict=True)))


@pytest.mark.parametrize("page", PAGES)
def test_the_slurm_file_is_a_script_with_options_of_sbatch(page: str) -> None:
    (script,) = [text for text in blocks(page, "bash") if text.startswith("#!")]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in script.splitlines() if "#SBATCH" in line)
    assert options["ntasks-per-node"] == "1"  # torchrun starts the rest
    assert f"--nproc-per-node {options['gpus-per-node']} " in script
    assert settings_of(script).output == "/shared/run"


@pytest.mark.parametrize("page", PAGES)
def test_the_kubernetes_file_is_a_service_and_a_job_of_indexed_pods(page: str) -> None:
    service, job = yaml.safe_load_all(next(text for text in blocks(page, "yaml") if "apiVersion" in text))
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    (command,) = container["args"]
    assert f"--nnodes {job['spec']['completions']} " in command
    assert f"--nproc-per-node {container['resources']['limits']['nvidia.com/gpu']} " in command
    assert f"--master-addr {job['metadata']['name']}-0.{pod['subdomain']} " in command
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert settings_of(command).output == "/shared/run"


@pytest.mark.parametrize("page", PAGES)
def test_the_skypilot_file_has_its_keys(page: str) -> None:
    task = yaml.safe_load(next(text for text in blocks(page, "yaml") if "num_nodes" in text))
    assert set(task) <= {"name", "num_nodes", "resources", "file_mounts", "setup", "run"}
    assert "$SKYPILOT_NODE_RANK" in task["run"]
    assert settings_of(task["run"]).output == "/shared/run"
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
