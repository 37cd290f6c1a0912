#!/usr/bin/env bash
# Continue the reproduction of the paper's tables for a while, and keep what came of it in small files.
#
#   results/continue.sh SECONDS [flags of ablate, for every line of the plan]
#   results/continue.sh 1500 --data-dir data --jobs 3
#
# Takes results/lab, trains what is missing in the order of results/plan.txt, and leaves the new results/lab:
# each run's settings, metrics, manifest and result, and of a run under way its checkpoint in parts under 16 MB.
# LAB is where training happens (default: a temporary folder, removed once all is kept), PLAN another plan, KEPT
# another store.
set -euo pipefail

[[ ${1:?"how many seconds?"} =~ ^[0-9]+$ ]] || { echo "error: $1 is no number of seconds" >&2 && exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
plan=${PLAN:-$here/plan.txt} kept=${KEPT:-$here/lab} lab=${LAB:-$(mktemp -d)}
end=$((SECONDS + 10#$1))
shift

clean() {
    [ -n "${LAB:-}" ] || rm -rf "$lab"
}
trap clean EXIT

# A checkpoint is kept as last.ckpt.part-SHA256-aa, -ab and so on; last.ckpt.sha256 says which of them count.
mkdir -p "$kept" "$lab"
new=$kept/.new # all is written here first: there may be no room, or the machine is taken away in the midst
rm -rf "$new"
# What LAB has already went on after it was kept, on a machine that was stopped before it could be kept again.
tar -C "$kept" --exclude='*.ckpt.part-*' --exclude='*.ckpt.sha256' -cf - . | tar -C "$lab" --skip-old-files -xf -
find "$kept" -name last.ckpt.sha256 | while read -r list; do
    whole=$lab/${list#"$kept"/}
    whole=${whole%.sha256}
    [ ! -e "$whole" ] || continue
    sum=$(cat "$list")
    cat "${list%.sha256}.part-$sum-"* >"$whole.tmp" # there whole or not at all
    [ "$(sha256sum <"$whole.tmp")" = "$sum  -" ] || {
        echo "error: the parts beside $list are not whole: copy them again, or remove it to train anew" >&2
        exit 2
    }
    mv "$whole.tmp" "$whole"
done

put() { # in the store, those of what is new that find has: renamed, and so whole or as they were
    (cd "$new" && find . -type f "$@") | while read -r file; do
        mkdir -p "$kept/$(dirname "$file")"
        mv "$new/$file" "$kept/$file"
    done
}

keep() { # after each line of the plan: a machine that is taken away loses one line at most
    rm -rf "$new"
    mkdir "$new"
    (cd "$lab" && find . \( -name '*.json' -o -name '*.csv' -o -name '*.yaml' -o -name '*.jsonl' \) -print) |
        tar -C "$lab" -cf - -T - | tar -C "$new" -xf -
    find "$lab" -name last.ckpt | while read -r whole; do
        [ ! -e "$(dirname "$(dirname "$whole")")/result.json" ] || continue
        at=${whole#"$lab"/} sum=$(sha256sum <"$whole")
        sum=${sum%  -}
        [ ! -e "$kept/$at.sha256" ] || [ "$(cat "$kept/$at.sha256")" != "$sum" ] || continue
        mkdir -p "$(dirname "$new/$at")"
        split -b 15M "$whole" "$new/$at.part-$sum-"
        echo "$sum" >"$new/$at.sha256"
    done
    sync -f "$new"
    put -name manifest.json # the order in which a run begins: it can go on from wherever this ends
    put -name config.yaml
    put ! -name '*.ckpt.sha256'
    put -name '*.ckpt.sha256'
    rm -rf "$new"
    # What is over: the checkpoint of a run with a result, parts of one before, and a crash that was tried again.
    find "$kept" -name last.ckpt.sha256 | while read -r list; do
        run=$(dirname "$(dirname "$list")")
        [ ! -e "$lab/${run#"$kept"/}/result.json" ] || rm "$list"
    done
    find "$kept" -name 'last.ckpt.part-*' | while read -r part; do
        run=$(dirname "$(dirname "$part")")
        list=${part%.part-*}.sha256
        if [ -e "$list" ]; then
            [[ $part != *.part-"$(cat "$list")"-* ]] || continue
        else
            [ -e "$lab/${run#"$kept"/}/result.json" ] || continue
        fi
        rm "$part"
    done
    find "$kept" -name failed.json | while read -r crash; do
        [ -e "$lab/${crash#"$kept"/}" ] || rm "$crash"
    done
}

keep_or_say() { # the status of this script stays as it is where all is kept
    set +e
    (set -e && keep)
    failed=$?
    [ "$failed" -eq 0 ] || {
        rm -rf "$new"
        echo "error: not all is kept in $kept; what was trained is in $lab: make room, and call again with LAB=$lab" >&2
        exit "$failed"
    }
}
trap keep_or_say EXIT # of a signal the ablation may not have heard, and train there still

flags=("$@")
train() {
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
}
set +e
(set -e && train)
status=$?
trap - EXIT
keep_or_say
clean
exit "$status"
