"""METRO-T5, T5 and SPACTOR pretraining with 3D parallelism on Megatron-Core."""
