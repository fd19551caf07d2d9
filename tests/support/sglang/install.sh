#!/usr/bin/env bash
# Makes an environment in which SGLang serves small models on a CPU, for tests and the demo (x86-64 Linux).
#
#   tests/support/sglang/install.sh PYTHON VENV VERSION TORCH [arguments of pip install]
#
# SGLang's own requirements bring gigabytes for CUDA; here it is installed without them, and then what its CPU path
# imports. Takes a minute or two, and 2.4 GB.
set -euo pipefail
python=$1 venv=$2 version=$3 torch=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)

case $version in  # what each version of SGLang pins
  0.5.2[0-9]*) pins=(transformers==5.19.0 tokenizers==0.23.2 xgrammar==0.2.7 openai==2.8.0) ;;
  0.5.1[5-9]*) pins=(transformers==5.12.1 tokenizers==0.22.2 xgrammar==0.2.1 openai==2.6.1) ;;
  0.5.1[1-4]*) pins=(transformers==5.6.0 tokenizers==0.22.2 xgrammar==0.1.32 openai==2.6.1) ;;
  0.5.10*) pins=(transformers==5.3.0 tokenizers==0.22.2 xgrammar==0.1.32 openai==2.6.1) ;;
  0.5.9*) pins=(transformers==4.57.1 tokenizers==0.22.1 "huggingface_hub<1.0" xgrammar==0.1.27 openai==2.6.1) ;;
  *) echo "$0: nothing is known of SGLang $version" >&2; exit 1 ;;
esac
imported=(
  aiohttp fastapi "uvicorn>=0.51" uvloop orjson "pyzmq>=25.1.2" msgspec numpy psutil pillow pydantic python-multipart
  requests partial_json_parser pybase64 setproctitle sentencepiece==0.2.1 tiktoken tqdm einops IPython regex scipy
  zstandard dill compressed-tensors watchfiles distro nvidia-ml-py prometheus-client apache-tvm-ffi==0.1.11 gguf
  jsonschema soundfile==0.13.1 interegular packaging openai-harmony==0.0.4 cloudpickle
)

test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
pip install --quiet "$@" "$torch"
# Imported at module level; Triton compiles nothing here, and of torchvision no operator runs.
pip install --quiet "$@" --no-deps triton==3.7.1 torchvision==0.28.0 "sglang==$version"
pip install --quiet "$@" "$torch" "${pins[@]}" "${imported[@]}"

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# torchvision's library is built for CUDA and does not load, so its operators are missing: declare the two that it
# gives shapes for when it is imported.
meta="$site/torchvision/_meta_registrations.py"
mark="# engine_loader: declared for a torch without CUDA"
if ! grep -q "$mark" "$meta"; then
  declared='for _name in ("nms", "qnms"):  '"$mark"'\n    torch.library.define("torchvision::" + _name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n&'
  sed -i '0,/^@torch.library.register_fake("torchvision::nms")/s//'"$declared"'/' "$meta"
fi
# sgl_kernel has only a wheel for CUDA.
rm -rf "$site/sgl_kernel"
cp -R "$here/sgl_kernel" "$site/sgl_kernel"
