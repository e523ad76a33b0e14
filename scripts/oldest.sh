#!/usr/bin/env bash
# Tests, plans for GPUs and the dry run of the acceptance on one, with the lowest versions that pyproject.toml allows.
#
#     scripts/oldest.sh [--torch-too] [--all] [VENV]
#
# --torch-too: the lowest torch as well, as images for GPUs have it, which is a CUDA build of some GB; without, the tested one.
# --all: every quick test, not those alone whose results depend on what other packages do.
# VENV: a folder for them, build/oldest if none is named; one that is there is used again.
# Ends with a line that says what passed; exit code 1 where something did not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=tested
tests=(
  cli readers quant packed peft methods switches kept_less contract families every_type  # what is made of a model
  trace work device recompute planning  # what it takes
  parallel gpu gpu_accept against  # several processes, and what runs on a GPU
)
venv=build/oldest
for word in "$@"; do
  case $word in
    --torch-too) torch=lowest ;;
    --all) tests=() ;;
    -*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) venv=$word ;;
  esac
done
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
low=$venv/lowest.txt
"$venv/bin/python" - "$torch" >"$low" <<'P'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tested = dict(re.findall(r"^([\w-]+)==(\S+)", open("src/fitune/constraints.txt").read(), re.M))
tools = [one for one in project["optional-dependencies"]["dev"] if one.startswith(("pytest", "hypothesis", "openai"))]
for wanted in project["dependencies"] + tools:
    name, bound = re.match(r"([\w-]+)>=([\d.]+)", wanted).groups()
    print(f"{name}=={tested[name] if name == 'torch' and sys.argv[1] == 'tested' else bound}")
P
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "$(grep '^torch==' "$low")"
pip install --quiet --requirement "$low" --editable .
"$venv/bin/python" - <<'P'
from importlib.metadata import version
names = "torch transformers peft bitsandbytes safetensors huggingface_hub numpy pydantic cyclopts pyarrow rich"
print(" ".join(f"{name} {version(name)}" for name in names.split()))
P
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
failed=()
paths=()
for name in "${tests[@]}"; do
  path=$(find tests -name "test_$name.py")
  [ -n "$path" ] || { echo "tests has no test_$name.py"; exit 2; }  # without any path pytest would run everything
  paths+=("$path")
done
"$venv/bin/python" -m pytest -q -p no:cacheprovider -n "${WORKERS:-2}" --dist worksteal "${paths[@]}" || failed+=(tests)
"$venv/bin/python" scripts/gpu_prepare.py --cases --root "$venv/gpu" || failed+=("plans for GPUs")
"$venv/bin/python" scripts/gpu_accept.py --dry-run --out "$venv/dry-run" >"$venv/dry-run.txt" || failed+=("dry run")
sed '1,/^$/d' "$venv/dry-run.txt"
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "tests, plans for GPUs and dry run passed with the lowest versions"
