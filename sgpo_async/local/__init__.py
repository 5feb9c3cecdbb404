"""A whole run on this machine: `sgpo-async local`.

supervisor    which process starts when, and what the end of each means
children      starts them, each with a log, and ends them all
run_folder    hub.json and checkpoints in the run's folder
watch         reads metrics and asks the hub for its status
show, live, display    what a person sees meanwhile
"""
