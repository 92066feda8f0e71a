#!/usr/bin/env bash
# What to run on a machine with a GPU: it needs python with torch, numpy, pyyaml, safetensors and triton, and nothing else;
# transformers is timed beside where it is installed. It takes ten minutes.
# OUT: folder of the results (default runs/gpu); MEASUREMENTS: where the records are copied to (default measurements).
# Without a GPU it runs a shrunk model on the CPU, so that the script itself is tested, and copies nothing by default.
set -euo pipefail
OUT=$(realpath -m "${OUT:-$(dirname "$0")/../runs/gpu}")
MEASUREMENTS=${MEASUREMENTS:+$(realpath -m "$MEASUREMENTS")}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    options=(--device cuda --measurements "${MEASUREMENTS:-measurements}")
else
    echo "no GPU here: a small run on the CPU" >&2
    options=(--device cpu --small --threads 1 ${MEASUREMENTS:+--measurements "$MEASUREMENTS"})
fi
exec "$PYTHON" -m benchmarks.gpu --out "$OUT" "${options[@]}" "$@"
