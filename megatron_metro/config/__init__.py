"""What a run is: plain, frozen data and pure functions of it. Imports no torch, no numpy, no megatron."""
