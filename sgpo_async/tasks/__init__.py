"""Problems, verifiable answers, strategies, prompts, and the small base policy that the package ships.

sources.source_of     opens the problems: generated ones (`cues`, `chains`) or a user's own (`files`)
cues*, chains*        the built-in domains: problems (`_domain`), what their base policies are trained on (`_policy`)
rows, records         a user's files, record by record; from a record to a problem
prepare, overlap      splits a user's problems into sets for warm-up, validation and RL, and removes duplicates
writing               writes these sets to files
task_sampler          maps the number of a task to its problem
prompts.build_prompt  problem and strategy -> token ids
rewards, reward_pool  completion -> reward, with limits of time and memory: verifiers (`verify`) or a user's functions
answers, tolerance    answers in other notations; numbers within a tolerance
self_check            checks of the reward before a run starts
cues_base/            builtin:cues, a base policy, rebuilt by `python -m sgpo_async.tasks.pretrain --out DIR`
"""
