"""A whole run on this machine: `sgpo-async local`.

supervisor    when each process starts, and what happens when it ends
children      starts processes, each with a log, and ends them all
run_folder    hub.json and checkpoints in the run's folder
watch         reads metrics and asks the hub for its status
show, live, display    what the user sees during the run
"""
