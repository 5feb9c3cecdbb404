"""What can be trained: each objective is a pure function from one task's group to weighted sequences.

sgpo.py    the paper's, with every variant that it measures       grpo.py   without any guidance
sft.py     the problem's own response                             luffy.py  the response inside the group
hpt.py     the response where the policy fails, else GRPO         base.py   what goes in and what comes out
"""

from sgpo_async.learner.objectives.base import Objective
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.objectives.hpt import hpt
from sgpo_async.learner.objectives.luffy import luffy
from sgpo_async.learner.objectives.sft import sft
from sgpo_async.learner.objectives.sgpo import sgpo

OBJECTIVES: dict[str, Objective] = {"sgpo": sgpo, "grpo": grpo, "sft": sft, "luffy": luffy, "hpt": hpt}

__all__ = ["OBJECTIVES"]
