"""A whole run on this machine: `sgpo-async local`.

supervisor    when each process starts, and what happens when it ends
hub_process   the hub, kept alive: for the supervisor, and for a learner that starts the hub beside itself
restarts      whether and when a crashed process is started again
children      starts processes, each with a log, and ends them all
run_folder    hub.json and checkpoints in the run's folder
watch         reads metrics and asks the hub for its status
show, live, display    what the user sees during the run
"""
