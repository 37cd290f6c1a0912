#!/usr/bin/env bash
# The speed figures of one machine, in order of worth, for a while; each is there as soon as it is measured.
#
#   benchmarks/measure.sh SECONDS FOLDER [flags of every call, such as --data-dir data]
#   benchmarks/measure.sh 800 speed --data-dir data
#   RESNETV2="python3 -m resnetv2_cli" benchmarks/measure.sh ...      where it is not installed
#
# Leaves JSON, picture and log of each bench in FOLDER. What is there already is not measured again. On a GPU
# DEPTHS and ARMS stay as they are; DEPTHS="8" ARMS="fused" WHOLE="" rehearses it on a CPU.
set -uo pipefail

depths=${DEPTHS:-110 164 1001}
arms=${ARMS:-fused-graphs graphs compile-graphs bf16-channels-last fused compile recompute-bn}
whole=${WHOLE---no-graphs --compile}   # of the whole command, beside none: each one alone, then together
end=$((SECONDS + ${1:?"how many seconds?"}))
out=${2:?"which folder?"}
read -ra tool <<<"${RESNETV2:-resnetv2}"
"${tool[@]}" --version || exit 2
shift 2
flags=("$@")
mkdir -p "$out"
failed=0

bench() { # NAME arguments: one figure, within what is left of the time
    local name=$1 left=$((end - SECONDS))
    shift
    [ "$left" -gt 20 ] && [ ! -e "$out/$name/$1.json" ] || return 0
    echo "== $name, $left s left"
    timeout --signal=TERM "$left" "${tool[@]}" bench "$@" "${flags[@]}" --output "$out/$name" >"$out/$name.log" 2>&1 </dev/null
    case $? in 0 | 124) ;; *) failed=1 ;; esac   # 124: the time is up
    tail -n 12 "$out/$name.log"
}

for depth in $depths; do
    for arm in $arms; do # by themselves: an arm that fails leaves the others
        bench "step-$depth-$arm" step --depth "$depth" --rounds 5 --stretch 20 --arm "$arm"
    done
    bench "train-$depth" train --depth "$depth" --rounds 3 --stretch 100
    for flag in $whole; do
        bench "train-$depth$flag" train --depth "$depth" --rounds 3 --stretch 100 "$flag"
    done
    # shellcheck disable=SC2086
    [ -z "$whole" ] || bench "train-$depth-both" train --depth "$depth" --rounds 3 --stretch 100 $whole
done
exit "$failed"
