#!/usr/bin/env bash
# Compiles the extension on a machine without a GPU, for one that has little time: into prebuilt/,
# from where bench/gpu.sh takes the objects if they load there and were made of the same sources.
# Needs nvcc, a C++ compiler and the Python of that machine; its torch is installed into a folder of
# its own, several GB, which may be deleted afterwards.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${GPU_PYTHON:-python3.12} torch=${GPU_TORCH:-torch==2.11.0} archs=${GPU_ARCHS:-90}
venv=${GPU_VENV:-.venv-gpu} target=prebuilt
made_of="$(bench/gpu/sources.sh) $python $torch $archs"
if [ "$(cat $target/made-of.txt 2>/dev/null)" = "$made_of" ]; then
  echo "$target/ is of these sources."
  exit
fi
command -v "$python" >/dev/null || {
  echo "There is no $python: say where it is, as in make gpu-prebuild GPU_PYTHON=/opt/python3.12." >&2
  exit 1
}
installed="$python $torch"
if [ "$(cat "$venv/installed.txt" 2>/dev/null)" != "$installed" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet "$torch" numpy "safetensors>=0.4" "xxhash>=3" \
    "setuptools>=77"
  echo "$installed" >"$venv/installed.txt"
fi
rm -rf $target
mkdir $target
# Not in place: the objects of another Python in cl_optim/ stay what they are.
CL_OPTIM_REQUIRE=cpu,cuda CL_OPTIM_CUDA=1 CL_OPTIM_CUDA_ARCHS=$archs \
  "$venv/bin/python" setup.py build_ext --build-lib $target/lib --build-temp $target/temp
mv $target/lib/cl_optim/_C*.so $target
rm -rf $target/lib $target/temp
strip --strip-unneeded $target/_C*.so
load='import torch, sys; sys.path.insert(0, "prebuilt"); import _C, _C_cuda
print(torch.__version__, _C.build_info(), _C_cuda.build_info())'
"$venv/bin/python" -c "$load"
echo "$made_of" >$target/made-of.txt
ls -l $target
