#!/usr/bin/env bash
# Everything that one GPU can tell about this checkout, in at most nine minutes; offline; called again, it goes on.
#
#   bench/gpu_suite.sh --out DIR [--total SECONDS] [--steps "a b c"] [--device cpu|cuda|cuda:N] [--tiny] [--retry]
#
# --retry runs what failed, was missing or had no time left once more; what was found well is kept.
# What the steps are, and what they leave in DIR, is written in bench/gpu_suite/__init__.py. PYTHON names the interpreter.
set -u

# The step and its seconds after the imports, what matters most first. "summary" is written anew by every call.
STEPS="environment:15 correctness:45 tests:70 table:120 decode:25 repeat:15 capture:35 model:40 sanitizer:50 tune:25"
SUMMARY_SECONDS=25

usage() { sed -n '2,7p' "$0" | cut -c3-; }

refuse() { echo "gpu_suite.sh: $1" >&2; exit 2; }
value() { # an option, and what follows it
    case "${2:-}" in '' | --*) refuse "$1: expected a value behind it, got '${2:-}'" ;; esac
}

out="" total=540 device=cuda tiny="" retry="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out) value "$@"; out="$2"; shift 2 ;;
        --total) value "$@"; total="$2"; shift 2 ;;
        --steps) value "$@"; only="$2"; shift 2 ;;
        --device) value "$@"; device="$2"; shift 2 ;;
        --tiny) tiny="--tiny"; shift ;;
        --retry) retry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) refuse "expected --out, --total, --steps, --device, --tiny or --retry, got $1" ;;
    esac
done
[ -n "$out" ] || { echo "gpu_suite.sh: --out: expected a directory" >&2; usage >&2; exit 2; }
case "$total" in '' | *[!0-9]*) refuse "--total: expected seconds, got '$total'" ;; esac
for step in $only; do
    case " $STEPS summary:" in *" $step:"*) ;; *) refuse "--steps: expected some of '$(sed 's/:[0-9]*//g' <<<"$STEPS")', got '$step'" ;; esac
done
case "$device" in
    cpu | cuda) ;;
    cuda:*[!0-9]* | cuda:) refuse "--device: expected cpu, cuda or cuda:N, got '$device'" ;;
    cuda:*)
        # The steps and their children see this GPU only. N counts those that are visible already.
        IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
        number="${device#cuda:}"
        if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
            number="${visible[10#$number]:-}"
            [ -n "$number" ] || refuse "--device: CUDA_VISIBLE_DEVICES lists ${#visible[@]} GPUs, got '$device'"
        fi
        export CUDA_VISIBLE_DEVICES="$number"
        device=cuda
        ;;
    *) refuse "--device: expected cpu, cuda or cuda:N, got '$device'" ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 1
mkdir -p "$out/status" "$out/logs" || exit 1
out="$(cd "$out" && pwd)" || exit 1
cd "$root" || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python" || python=python3; }

unwell() { grep -Eqs '"state": "(failed|missing|out of time)"' "$out/status/$1.json"; }
over() { grep -Eqs '"state": "(ok|failed|missing|out of time)"' "$out/status/$1.json"; }

run_step() { # step, seconds, seconds that are left, --retry or nothing
    # The step limits itself; `timeout` is for a call into the driver that never comes back. A cold start may take 60 s.
    local limit=$(($2 + 60))
    [ $limit -le $(($3 + 8)) ] || limit=$(($3 + 8))
    timeout -k 5 $limit "$python" -m omnigene_fast.bench.gpu_suite "$1" --out "$out" --device "$device" \
        --budget "$2" --deadline "$3" ${tiny:+"$tiny"} ${4:+"$4"} >>"$out/logs/$1.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || echo "$1: ended with status $code" >>"$out/logs/$1.log"
    tail -n 1 "$out/logs/$1.log"
}

for entry in $STEPS; do
    step="${entry%%:*}" seconds="${entry##*:}"
    case " ${only:-$step} " in *" $step "*) ;; *) continue ;; esac
    again=""
    if over "$step"; then
        { [ -n "$retry" ] && unwell "$step"; } || continue
        again="--retry"
    fi
    left=$((total - SUMMARY_SECONDS - SECONDS))
    [ "$left" -ge 15 ] || { echo "time is up: call again to go on with $step"; break; }
    # What the step has found stays: told --retry, it drops what it found wrong, and measures only that.
    [ -z "$again" ] || rm -f "$out/status/$step.json" "$out/status/$step.tries.json"
    run_step "$step" "$seconds" "$left" "$again"
done
rm -f "$out/status/summary.json"
run_step summary 15 45
echo "$SECONDS s; summary: $out/summary.md"
