#!/usr/bin/env bash
# Builds the CPU code with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of what is C++ under them.
# Wants the test requirements in the environment's python, and GCC; takes one to two minutes. Other tests can be named:
#     bench/sanitize.sh tests/kernels/test_delta_norms.py
# With SITE=DIR the build stays in that folder, and is not made again; `build` makes it and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  set -- tests/ops/test_rows{,_refusals}.py tests/kernels/test_{delta_norms,digests}.py tests/rows/test_{tiered,cache,cache_sequences}.py tests/rows/store/test_file.py
fi
python=$(command -v python)
site=${SITE:-$(mktemp -d)}
[ -n "${SITE:-}" ] || trap 'rm -rf "$site"' EXIT

if [ ! -e "$site/learndrop_ext" ]; then
  # Of a copy: another build may be at work in the tree.
  mkdir -p "$site/source"
  cp -r csrc learndrop_ext kernels setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE "$site/source"
  # The bindings, which are not sanitized, need not be fast either.
  CMAKE_BUILD_TYPE=None LEARNDROP_CUDA=0 LEARNDROP_SANITIZE=address,undefined \
    "$python" -m pip install --quiet --no-deps --target "$site" "$site/source"
fi
[ "${1:-}" != build ] || exit 0

# Python itself frees little at its end: leaks are not looked for.
libasan=$("${CXX:-g++}" -print-file-name=libasan.so)
libstdcxx=$("${CXX:-g++}" -print-file-name=libstdc++.so)
mkdir "$site/tests"
cp "$@" tests/conftest.py tests/rows/tiered_cache.py tests/ops/rows_reference.py "$site/tests"
cd "$site"
LD_PRELOAD="$libasan $libstdcxx" PYTHONPATH="$site" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  "$python" -m pytest -q -p no:cacheprovider --rootdir "$site" -W error tests
