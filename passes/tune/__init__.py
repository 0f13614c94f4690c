"""What is decided by the clock of this machine: timing, the tuning record of kernel variants, the speed comparison."""
