"""The GPUs that kernels are compiled for, and the shared memory that a block may have there, in bytes."""

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
