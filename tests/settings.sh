# Sourced by run.sh and full.sh: the process environment of the tests.

# One thread per process: the tests' processes outnumber the cores, and sums are then in the same order everywhere.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing is fetched.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# Both tiers run on the CPU, also on a machine with GPUs; tests marked gpu are run with `pytest -m gpu`.
export CUDA_VISIBLE_DEVICES=
