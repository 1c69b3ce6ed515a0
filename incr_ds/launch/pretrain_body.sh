# From here on, every script that starts a run on Slurm is the same (incr_ds/launch/pretrain_body.sh).
# The ranks meet at the first host of the allocation, at a port that follows from the job's number.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# From Slurm 22.05 on, srun does not take --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# A crash prints where each thread was.
export PYTHONFAULTHANDLER=1
# INFO prints which network NCCL has chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The GPU runs kernels in the order in which they were started, so that communication begins before what it overlaps with.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# NCCL chooses the network. If it chooses the wrong one, name the interface (`ip link` lists them):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# If InfiniBand is broken, this makes NCCL use TCP, which is slower:
# export NCCL_IB_DISABLE=1

settings=$(python launchers/pretrain.py "$@" --print-config) ||
  { echo "the run file is not valid; its message is above. Not queued again" >&2; exit 2; }
# Where the run writes, and its last step.
mapfile -d '' -t facts < <(python -c '
import sys, yaml
run = yaml.safe_load(sys.stdin)
steps = run["schedule"]
print(run["output"], steps.get("end_step") or steps["train_steps"], sep="\0", end="\0")' <<< "$settings")
output=${facts[0]} last=${facts[1]}
newest() { ls -- "$output/checkpoints" 2>/dev/null | grep -E '^step_[0-9]{8,}$' | sort -V | tail -n 1 || true; }
before=$(newest)

ranks=
pass_on() {
  echo "received $1: the ranks save and end" >&2
  [ -n "$ranks" ] || exit 75
  kill -USR1 "$ranks" 2>/dev/null || true
}
for signal in TERM INT USR1; do trap "pass_on $signal" "$signal"; done

# Consecutive ranks are on one node. After the first rank that fails, srun ends the others.
srun --distribution=block --kill-on-bad-exit=1 --wait=120 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python launchers/pretrain.py "$@"' pretrain "$@" &
ranks=$!
# A signal ends `wait` before srun has ended; then there is more to wait for.
while status=0; wait "$ranks" || status=$?; kill -0 "$ranks" 2>/dev/null; do :; done
wait "$ranks" && status=0 || status=$?

after=$(newest)
if [ "$status" -eq 0 ] && [ "$after" = "$(printf 'step_%08d' "$last")" ]; then
  echo "finished: $output/checkpoints/$after"
elif [ "$status" -eq 2 ]; then
  echo "the run file, or what it names, has to be changed first; its message is above. Not queued again" >&2
  exit 2
elif [ "$after" != "$before" ]; then
  # Only a run that got further is queued again; one that fails at once would queue itself for ever.
  echo "got from ${before:-the start} to $after (exit $status); queued again"
  scontrol requeue "$SLURM_JOB_ID" ||
    { echo "Slurm did not queue the job again; submit it by hand, and it continues from $after" >&2; exit 75; }
else
  echo "no step was saved since ${before:-the start} (exit $status); not queued again" >&2
  exit $((status ? status : 1))
fi
