#!/bin/sh
# Makes the demo's data, its model and the warm start once; a later start finds the mark and leaves at once.
# DEMO_PROMPTS: prompts to train on, 32 a step. DEMO_WARM_START: yes, or no where engines get their weights later.
set -eu
if [ -f /runs/demo/prepared ]; then
  echo "init: /runs/demo is prepared already"
  exit 0
fi
python /examples/arithmetic/make_data.py --out /runs/demo/data --train "${DEMO_PROMPTS:-2560}"
python /examples/arithmetic/make_model.py --out /runs/demo/model
if [ "${DEMO_WARM_START:-yes}" = yes ]; then
  milepost trainer sft --config /etc/milepost/milepost.toml --model_dir /runs/demo/model
fi
touch /runs/demo/prepared
