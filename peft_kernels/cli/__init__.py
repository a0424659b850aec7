"""The command line, `peft-kernels`: a module for each command, and what they share."""
