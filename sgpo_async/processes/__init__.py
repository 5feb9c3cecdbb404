"""Processes of the operating system. Needs no torch.

signals     Ctrl-C and SIGTERM as flags that a loop checks
watchdog    kills a command and its children when the process that started it has died
marked      finds every process of a run by a mark in its environment, and ends them all
stacks      makes processes print the stacks of their threads
progress    waits whose deadline counts the time without progress
torchrun    torchrun's command line for ranks on this machine
"""
