#!/bin/bash
# Slurm: one run per file in runs/. sbatch --array=0-$(($(ls runs/*.yaml | wc -l) - 1)) slurm-array.sh
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
runs=(runs/*.yaml)
python -m lora_trainer train --config "${runs[$SLURM_ARRAY_TASK_ID]}" &
trap 'kill -TERM $!' TERM # stops and saves, as Ctrl-C does
wait $!
code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
[ "$code" != 130 ] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
exit "$code"
