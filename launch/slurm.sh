#!/usr/bin/env bash
# @{name}: @{what}. sbatch @{name}.sbatch, from the repository.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{gpus}
#SBATCH --gpus-per-node=@{gpus}
#SBATCH --cpus-per-task=@{cpus_per_task}
#SBATCH --time=@{time}
#SBATCH --partition=@{partition} #? partition
#SBATCH --account=@{account} #? account
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@@180

# Slurm signals the processes themselves, 180 s before the end or when it preempts the job, and all
# save and end with @{preempted}. This shell has to outlive that; and not through srun, which kills
# its processes when it gets a SIGTERM.
trap : TERM
cd "$SLURM_SUBMIT_DIR" || exit 2

for ((start = 0; start <= @{max_restarts}; start++)); do
  # One process a GPU; they find each other by what Slurm says. One that dies takes the rest along.
  srun --kill-on-bad-exit=1 @{python} main.py @{flags}
  code=$?
  case $code in
  0 | @{final}) exit "$code" ;;
  @{preempted}) exec scontrol requeue "$SLURM_JOB_ID" ;;
  esac
  echo "exit code $code after start $start of this job; @{max_restarts} more at most"
  sleep 10
done
exit "$code"
