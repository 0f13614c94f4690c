"""The command line `torch-passes`."""
