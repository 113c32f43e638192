#!/usr/bin/env bash
# Installs the TPU compiler (libtpu, about 650 MB) where `stacking-jax plan --topology` finds it and
# nothing else does: where JAX finds libtpu, it looks for TPUs.
#
#   bash launch/tpu_compiler.sh
#   stacking-jax plan --topology v5p:4x4x8 --gin_file gin/experiments/midas_8b_prop2.gin
exec bash "$(dirname "${BASH_SOURCE[0]}")/beside.sh" tpu
