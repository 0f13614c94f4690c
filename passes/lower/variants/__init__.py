"""The kernel variants of a workload: each written once, built as nodes by a lowering, run on tensors to be timed."""
