"""Problems, verifiable answers, strategies, prompts, and the small base policy that the package ships.

sources.source_of     the problems: generated (`cues`) or a user's own (`files`)
prepare, overlap      a user's problems -> sets for warm-up, validation and RL; what repeats others; `writing` the files
task_sampler            which problem the number of a task stands for
prompts.build_prompt  problem and strategy -> token ids
verify, reward_pool   completion -> correct or not, with a time limit
cues_base/            the base policy, rebuilt by `python -m sgpo_async.tasks.pretrain --out DIR`
"""
