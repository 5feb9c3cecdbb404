"""A whole run on this machine: `sgpo-async local`.

supervisor    when each process starts, and what happens when it ends
hub_process   the hub, restarted after a crash: for the supervisor, and for a learner that starts its own hub
restarts      whether and when a crashed process is started again
children      starts processes, each with a log, and ends them all
watchdog      ends the processes of a run whose supervisor has died
run_folder    hub.json, the journal, checkpoints and summary.json in the run's folder
watch         reads metrics and asks the hub for its status
show, live, display    what the user sees during the run
follow        the same for a program: a function gets the metrics of every step
"""
