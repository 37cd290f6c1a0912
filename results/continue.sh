#!/usr/bin/env bash
# Continue the reproduction of the paper's tables for a while, and keep what came of it in small files.
#
#   results/continue.sh SECONDS [flags of ablate, for every line of the plan]
#   results/continue.sh 1500 --data-dir data --jobs 3
#
# Takes results/lab, trains what is missing in the order of results/plan.txt, and leaves the new results/lab:
# each run's settings, metrics, manifest and result, and of a run under way its checkpoint in parts under 16 MB.
# LAB is where training happens (default: a temporary folder), PLAN another plan, KEPT another store.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
plan=${PLAN:-$here/plan.txt} kept=${KEPT:-$here/lab} lab=${LAB:-$(mktemp -d)}
end=$((SECONDS + ${1:?"how many seconds?"}))
shift

mkdir -p "$kept" "$lab"
# What LAB has already went on after it was kept, on a machine that was stopped before it could be kept again.
tar -C "$kept" --exclude='*.ckpt.part-*' -cf - . | tar -C "$lab" --skip-old-files -xf -
find "$kept" -name '*.ckpt.part-aa' | while read -r first; do
    whole=$lab/${first#"$kept"/}
    whole=${whole%.part-aa}
    [ ! -e "$whole" ] || continue
    cat "${first%aa}"* >"$whole.tmp" # there whole or not at all
    mv "$whole.tmp" "$whole"
done

keep() { # after each line of the plan: a machine that is taken away loses one line at most
    find "$lab" -name last.ckpt | while read -r whole; do
        run=$(dirname "$(dirname "$whole")")
        parts=$kept/${run#"$lab"/}/checkpoints/last.ckpt.part-
        rm -f "$parts"*
        [ -e "$run/result.json" ] && continue
        mkdir -p "$(dirname "$parts")"
        split -b 15M "$whole" "$parts"
    done
    (cd "$lab" && find . \( -name '*.json' -o -name '*.csv' -o -name '*.yaml' -o -name '*.jsonl' \) -print) |
        tar -C "$lab" -cf - -T - | tar -C "$kept" -xf -
    find "$kept" -name failed.json | while read -r crash; do # one that was tried again is over
        [ -e "$lab/${crash#"$kept"/}" ] || rm "$crash"
    done
}
trap keep EXIT

flags=("$@")
{ grep -v -e '^#' -e '^ *$' "$plan" || true; } | while read -r line; do
    left=$((end - SECONDS))
    [ "$left" -gt 0 ] || break
    echo "== ablate $line"
    eval "rows=($line)"
    touch "$lab/.began"
    status=0
    resnetv2 ablate "${rows[@]}" "${flags[@]}" --output "$lab" --time "${left}s" </dev/null || status=$?
    # 2: a run crashed, and the others go on; or a mistake, behind which the line has left no record.
    record=$(find "$lab" -maxdepth 1 -name 'ablation-*.json' -newer "$lab/.began")
    [ "$status" -eq 0 ] || { [ "$status" -eq 2 ] && [ -n "$record" ]; } || exit "$status"
    keep
done
