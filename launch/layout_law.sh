#!/usr/bin/env bash
# All cases of configs/layout_law.py over three seeds. Stop it and start it again at will.
# A control is clean, so its layout is none: one for each crop law and seed serves all its cases.
# 24 victims, nine of them with a clean twin; not timed as a whole.
# Usage: [DRY_RUN=1] [SEEDS="0 1 2"] bash launch/layout_law.sh FOLDER [--config.key=value ...]
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 1 ] || refuse "usage: bash launch/layout_law.sh FOLDER [--config.key=value ...]"
folder=$1
shift
set_environment
for seed in ${SEEDS:-0 1 2}; do
  for case in equal free gap_quarter gap_half off_centre corner scale_008 scale_035; do
    case $case in
      equal|scale_*) control=--config.control=True ;;
      *) control=--config.control_from=$folder/equal_$seed ;;
    esac
    attempt "configs/layout_law.py:case=$case,seed=$seed" "$folder/${case}_$seed" "$@" "$control"
  done
done
name_failed
