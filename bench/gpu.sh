#!/usr/bin/env bash
# Builds, tests and measures all that needs a GPU, in a few minutes; leaves its output in $1.
# Needs torch, a CUDA toolkit, pybind11 and pytest; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$out"
export CL_OPTIM_REQUIRE=cpu,cuda PYTHONPATH=$PWD
python=${PYTHON:-python3}
nvidia-smi >"$out/nvidia-smi.txt"
$python setup.py build_ext --inplace >"$out/build.txt" 2>&1
tests="tests/test_ewc_adamw.py tests/test_ewc_adamw_gradients.py tests/test_drop_in.py tests/test_state_formats.py"
tests="$tests tests/test_plasticity.py tests/test_launch_plans.py"
tests="$tests tests/test_squared_grad_triton.py tests/test_gram.py tests/test_nnqp.py tests/test_gem.py tests/test_gem_project.py"
$python -m pytest $tests -m gpu -p no:cacheprovider -q 2>&1 |
  tee "$out/tests.txt"
$python bench/gpu_step.py --json "$out/step-gpu.json" | tee "$out/step-gpu.txt"
$python bench/training_step.py --device cuda --json "$out/training-gpu.json" | tee "$out/training-gpu.txt"
$python bench/gpu_gram.py --json "$out/gram-gpu.json" | tee "$out/gram-gpu.txt"
$python bench/gpu_gem.py --json "$out/gem-gpu.json" | tee "$out/gem-gpu.txt"
$python bench/gpu_fisher.py --json "$out/fisher-gpu.json" | tee "$out/fisher-gpu.txt"
$python bench/gpu_squared_grad.py --json "$out/squared-grad-gpu.json" | tee "$out/squared-grad-gpu.txt"
compute-sanitizer --error-exitcode 1 $python -m pytest $tests -m gpu -q \
  -p no:cacheprovider -k "many_tensors or unaligned or take_no_part or in_a_graph" 2>&1 | tee "$out/sanitizer.txt"
