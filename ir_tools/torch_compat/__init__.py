"""The one door to torch's internals: whatever torch names with an underscore, or calls experimental, is used here only.

Each door is a name of ours with a sentence on what it gives, and has a canary in `tests/ir_tools/test_torch_compat.py`: under
another torch the canary that fails names what moved. `jit` is for front ends, emission and benchmarks alone.
"""
