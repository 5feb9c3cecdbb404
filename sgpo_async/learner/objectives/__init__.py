"""The objectives: each is a pure function from the group of one task to weighted sequences.

sgpo.py    SGPO, with every variant that the paper measures       grpo.py   GRPO, without guidance
sft.py     the response of the problem                            luffy.py  the response as a member of the group
hpt.py     the response if the policy fails, else GRPO            base.py   the input and output types
"""

from sgpo_async.learner.objectives.base import Objective
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.objectives.hpt import hpt
from sgpo_async.learner.objectives.luffy import luffy
from sgpo_async.learner.objectives.sft import sft
from sgpo_async.learner.objectives.sgpo import sgpo

OBJECTIVES: dict[str, Objective] = {"sgpo": sgpo, "grpo": grpo, "sft": sft, "luffy": luffy, "hpt": hpt}

__all__ = ["OBJECTIVES"]
