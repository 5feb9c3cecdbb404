"""Evaluation of one model, outside of a run: samples, verdicts, results that outlive a crash, comparison of two.

evaluation_plan.py  what is evaluated and how: all that two calls must agree on to be one evaluation
sampling.py         groups from an engine, by the bookkeeping of the actors
results.py          one folder: settings, a line for each problem, a summary
compare.py          two folders, problem by problem
run.py              the whole
chat.py             a policy tried on single problems
"""
