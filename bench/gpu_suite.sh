#!/usr/bin/env bash
# Everything that one GPU can tell about this checkout, in at most nine minutes; offline; called again, it goes on.
#
#   bench/gpu_suite.sh --out DIR [--total SECONDS] [--steps "a b c"] [--device cuda|cpu] [--tiny] [--retry]
#
# What the steps are, and what they leave in DIR, is written in bench/gpu_suite/__init__.py. PYTHON names the interpreter.
set -u

# The step and its seconds after the imports, what matters most first. "summary" is written anew by every call.
STEPS="environment:15 correctness:45 tests:70 table:120 decode:25 repeat:15 capture:35 model:40 sanitizer:50 tune:25"
SUMMARY_SECONDS=25

usage() { sed -n '2,6p' "$0" | cut -c3-; }

out="" total=540 device=cuda tiny="" retry="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="${2:-}"; shift 2 ;;
        --total) total="${2:-}"; shift 2 ;;
        --steps) only="${2:-}"; shift 2 ;;
        --device) device="${2:-}"; shift 2 ;;
        --tiny) tiny="--tiny"; shift ;;
        --retry) retry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu_suite.sh: expected --out, --total, --steps, --device, --tiny or --retry, got $1" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "gpu_suite.sh: --out: expected a directory" >&2; usage >&2; exit 2; }
case "$total" in '' | *[!0-9]*) echo "gpu_suite.sh: --total: expected seconds, got '$total'" >&2; exit 2 ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 1
mkdir -p "$out/status" "$out/logs" || exit 1
out="$(cd "$out" && pwd)" || exit 1
cd "$root" || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python" || python=python3; }

over() { grep -Eqs '"state": "(ok|failed|missing|out of time)"' "$out/status/$1.json"; }

run_step() { # step, seconds, seconds that are left
    # The step limits itself; `timeout` is for a call into the driver that never comes back. A cold start may take 60 s.
    local limit=$(($2 + 60))
    [ $limit -le $(($3 + 8)) ] || limit=$(($3 + 8))
    timeout -k 5 $limit "$python" -m omnigene_fast.bench.gpu_suite "$1" --out "$out" --device "$device" \
        --budget "$2" --deadline "$3" ${tiny:+"$tiny"} >>"$out/logs/$1.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || echo "$1: ended with status $code" >>"$out/logs/$1.log"
    tail -n 1 "$out/logs/$1.log"
}

if [ -n "$retry" ]; then
    for entry in $STEPS; do
        step="${entry%%:*}"
        grep -Eqs '"state": "ok"' "$out/status/$step.json" ||
            rm -rf "$out/status/$step.json" "$out/status/$step.tries.json" "$out/$step.json" "$out/rows/$step.problems.json" \
                "${out:?}/$step" # the directories of tests and sanitizer
    done
fi
for entry in $STEPS; do
    step="${entry%%:*}" seconds="${entry##*:}"
    case " ${only:-$step} " in *" $step "*) ;; *) continue ;; esac
    over "$step" && continue
    left=$((total - SUMMARY_SECONDS - SECONDS))
    [ "$left" -ge 15 ] || { echo "time is up: call again to go on with $step"; break; }
    run_step "$step" "$seconds" "$left"
done
rm -f "$out/status/summary.json"
run_step summary 15 45
echo "$SECONDS s; summary: $out/summary.md"
