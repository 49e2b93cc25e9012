#!/bin/bash
# One run after the other on one machine. What is finished is left alone when this is started again.
for config in runs/*.yaml; do
    [ ! -e "$config.done" ] || continue
    python -m lora_trainer supervise --restarts 3 -- python -m lora_trainer train --config "$config"
    code=$?
    [ "$code" != 130 ] || exit 130 # stopped by a signal: start this again to go on
    [ "$code" != 0 ] || touch "$config.done"
done
