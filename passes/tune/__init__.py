"""Decisions that depend on the speed of this machine: timing, tuning records of kernel variants, the speed comparison."""
