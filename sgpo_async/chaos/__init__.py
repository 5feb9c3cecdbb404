"""Attacks a run on purpose, and checks afterwards that nothing was lost and nothing counted twice.

    schedule ── faults, by seed ──▶ run ──┬─▶ processes: kill -9, SIGSTOP, a limit on file sizes ──▶ hub, ranks, actors
                                          └─▶ proxy: messages and connections of one member        senders, receivers

    actor-0, actor-1, ... ─▶ a link each ┐
                                         ├─▶ hub ── recording ──▶ history ── replay ──▶ audit ◀── metrics, summary
    learner ───────────────▶ its link ───┘

schedule    pure: which fault at which trained step, on which kind of process; the same for the same seed
proxy       relays whole messages between members and hub, one link per started process. It delays, duplicates,
            reorders, truncates and corrupts messages, resets connections, and cuts a member off. Bytes are not changed
            below ZeroMQ: its handshake and frames do not survive that, so it would only be one more reset
processes   finds the processes of each kind, kills, stops and continues them, and takes the disk away: with
            RLIMIT_FSIZE 0 every write fails at once, which needs no root and hits one process. A slow disk is a
            commit of the journal that takes long
recording   a hub whose journal keeps every event after it was saved, so that a whole run can be replayed
audit       pure: keeps a copy of the ledger from the events and effects of the replay, that is from the messages. It
            must agree with the core's state after every event, and at the end with metrics.jsonl and summary.json
run         starts hub, learner and actors, starts again what has ended, injects the faults, measures how long each
            recovery takes
attack      all of this from start to end, and the table

A fault happens when the run has trained so many steps, whatever else goes on: faults overlap. Its recovery ends when
the run has trained more steps than before it; steps that a killed learner has lost are trained again meanwhile.
"""
