#!/usr/bin/env bash
# A job that its queue stops and requeues must end with the same bits as one that was never stopped,
# with one task and with two; and a sweep must run as jobs of the queue.
#
# Run tests/stress/slurm.sh as root, on two processors, with Debian's slurm-wlm and munge installed.
# It starts its own SLURM of one node, separate from any other, and exits with status 0 if all is
# well.
set -euo pipefail
work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf OMP_NUM_THREADS=1
mkdir -m 700 "$work/munge" && mkdir "$work"/{state,spool}
end() { for f in "$work"/*.pid; do kill "$(cat "$f")" 2>/dev/null || true; done; sleep 2; rm -rf "$work"; }
trap end EXIT

head -c 128 /dev/urandom >"$work/munge/key" && chmod 600 "$work/munge/key"
munged --force --socket="$work/munge/socket" --key-file="$work/munge/key" --log-file="$work/munge/log" \
    --pid-file="$work/munged.pid" --seed-file="$work/munge/seed"
cat >"$SLURM_CONF" <<CONF
ClusterName=private
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=26817
SlurmdPort=26818
AuthInfo=socket=$work/munge/socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 30); do sinfo -h -o %t 2>/dev/null | grep -q idle && break || sleep 1; done

for tasks in 1 2; do # two tasks connect before they begin, and agree when to stop
    for run in whole requeued; do
        cat >"$work/$run-$tasks.sh" <<JOB
#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=$tasks --requeue --open-mode=append --output=$work/$run-$tasks.log
srun resnetv2 train --continue --output $work/$run-$tasks --dataset digits --depth 8 --batch-size 16 \
    --steps $((1000 / tasks)) --log-every 50 --shortcut dropout --accelerator cpu --devices $tasks
status=\$?
if [ \$status = 138 ]; then scontrol requeue \$SLURM_JOB_ID; fi
exit \$status
JOB
    done
    whole=$work/whole-$tasks requeued=$work/requeued-$tasks
    job=$(sbatch --parsable "$requeued.sh")
    sbatch "$whole.sh"
    for _ in $(seq 300); do grep -q "^200," "$requeued/metrics.csv" 2>/dev/null && break || sleep 0.5; done
    scancel --signal=USR1 "$job" # as the queue sends it before a job's time is over
    for _ in $(seq 300); do [ -f "$whole/result.json" ] && [ -f "$requeued/result.json" ] && break || sleep 2; done
    cmp "$whole/metrics.csv" "$requeued/metrics.csv" || { cat "$whole.log" "$requeued.log" && exit 1; }
    python - "$whole" "$requeued" <<'COMPARE'
import json, sys, torch
whole, requeued = sys.argv[1:]
a, b = (torch.load(f"{r}/checkpoints/last.ckpt", weights_only=True) for r in (whole, requeued))
for part in ("state_dict", "optimizer_states", "lr_schedulers"):
    torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
resumes = json.load(open(f"{requeued}/manifest.json"))["resumes"]
assert resumes, "it was never requeued"
steps = [r["step"] for r in resumes]
print(f"{requeued[-1]} tasks: requeued at iteration {steps} of {a['global_step']}: the same bits")
COMPARE
done

resnetv2 ablate --launcher slurm --jobs 2 --shortcut conv1x1 --dataset digits --depth 8 --steps 20 \
    --batch-size 64 --output "$work/lab" --format csv
