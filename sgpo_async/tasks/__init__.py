"""Problems, verifiable answers, strategies, prompts, and the small base policy that the package ships.

sources.source_of     opens the problems: generated ones (`cues`) or a user's own (`files`)
prepare, overlap      splits a user's problems into sets for warm-up, validation and RL, and removes duplicates
writing               writes these sets to files
task_sampler          maps the number of a task to its problem
prompts.build_prompt  problem and strategy -> token ids
verify, reward_pool   completion -> whether it is correct, with a time limit
cues_base/            the base policy, rebuilt by `python -m sgpo_async.tasks.pretrain --out DIR`
"""
