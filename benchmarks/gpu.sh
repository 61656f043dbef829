#!/usr/bin/env bash
# Checks and measures everything on a GPU, in one call and without a network:
#
#     bash benchmarks/gpu.sh --minutes 8 --out gpu-results [--wheels FOLDER]
#
# It installs what is missing of the wheels in a folder, runs the tests of tests/gpu, which take at most half of the
# minutes, then benchmarks/gpu.py for the rest of them. All output is in --out, in at most eight files:
# environment.txt, tests.txt, tests.xml, benchmark.txt, results.md, results.json, profile.txt. The exit status is 0 if
# every test passed and every table could be measured.
#
#     --device cpu --tiny    the same on a CPU, on small networks, to check the script: under three minutes
#     --only tests           (or benchmark) one of the two
#     --wheels FOLDER        wheels of packages that may be missing: pytest, timm, nvidia-modelopt, ...
#     --out FOLDER           gpu-results by default
#     PYTHON=...             the interpreter, python3 by default
set -uo pipefail

device=cuda tiny="" wheels="" out=gpu-results minutes=8 only=""
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --tiny) tiny=--tiny; shift ;;
    -h|--help) usage; exit 0 ;;
    *) echo "gpu.sh: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
  esac
done
case "$only" in ""|tests|benchmark) ;; *) echo "gpu.sh: --only takes tests or benchmark, not '$only'" >&2; exit 2 ;; esac

begin=$SECONDS
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || { wheels=$(cd "$wheels" && pwd) || exit 2; }
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1

if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  missing=()
  for wheel in "$wheels"/*.whl; do
    name=$(basename "$wheel"); name=${name%%-*}
    "$python" -c "import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])" "$name" 2>/dev/null \
      || missing+=("$wheel")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "${missing[@]}" || exit 2
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
fi

{
  date -u
  nvidia-smi 2>&1 || echo "no nvidia-smi"
  "$python" -c "import sys; print(sys.version)"
  "$python" -m pip list --format=freeze 2>/dev/null | cut -d' ' -f1
} > "$out/environment.txt" 2>&1

failed=""
if [ "$only" != benchmark ]; then
  # What is broken everywhere first, then what takes longer.
  tests=(tests/gpu/test_kernels.py tests/gpu/test_layers.py tests/gpu/test_waiting.py tests/gpu/test_training.py
         tests/gpu/test_files.py)
  # Most of the time is compiling: by several processes where there are processors for them.
  workers=()
  if [ "$device" != cpu ] && "$python" -c "import xdist" 2>/dev/null; then workers=(-n 4); fi
  limit=$("$python" -c "import sys; print(int(60 * float(sys.argv[1]) / (1 if sys.argv[2] else 2)))" "$minutes" "$only")
  SQAKD_GPU_TESTS=$device timeout -k 10 "$limit" "$python" -m pytest "${tests[@]}" -m gpu -p no:cacheprovider -rfEs \
    --tb=short --show-capture=no --durations=15 --junitxml="$out/tests.xml" "${workers[@]}" 2>&1 \
    | tee "$out/tests.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed="$failed tests"
fi
if [ "$only" != tests ]; then
  left=$("$python" -c "import sys; print(max(0.5, float(sys.argv[1]) - int(sys.argv[2]) / 60))" "$minutes" $((SECONDS - begin)))
  "$python" benchmarks/gpu.py --device "$device" $tiny --minutes "$left" --out "$out" 2>&1 | tee "$out/benchmark.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed="$failed benchmark"
fi

# Nothing larger than 16 MiB: a log keeps its end.
for file in "$out"/*.txt; do
  if [ "$(wc -c < "$file")" -gt 16000000 ]; then tail -c 15000000 "$file" > "$file.part" && mv "$file.part" "$file"; fi
done
echo "$((SECONDS - begin)) s; results in $out"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
