"""Processes of the operating system, whatever they run. Needs no torch.

signals     Ctrl-C and SIGTERM as state that a loop looks at
watchdog    ends processes whose parent has died, in whatever way
marked      finds every process that a run started, by a mark in its environment
torchrun    torchrun's command line for ranks on this machine
"""
