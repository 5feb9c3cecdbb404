"""The objectives: each is a pure function from the group of one task to weighted sequences.

sgpo.py        SGPO, with every variant that the paper measures
grpo.py        GRPO, without guidance
sft.py         the likelihood of the problem's response
luffy.py       GRPO, with the response as a member of the group
hpt.py         the response where the policy solves too little, GRPO elsewhere
opsd.py        OPSD and SDFT: distil a teacher that has a context, on the policy's own rollouts
sdpo.py        (1 - alpha) GRPO + alpha OPSD
kdrl.py        KDRL and SDPG: GRPO + alpha OPSD
rlsd.py        RLSD and RLCSD: GRPO, with advantages of single tokens from a teacher that has a context
iw_opd.py      the teacher's log-ratios as advantages, in place of a reward
pope.py        GRPO, on guided and on plain prompts
pi_distill.py  a teacher and a student in the same weights, from guided rollouts, each drawn to the other
base.py        the types that they take and return
"""

from sgpo_async.learner.objectives.base import Objective
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.objectives.hpt import hpt
from sgpo_async.learner.objectives.iw_opd import iw_opd
from sgpo_async.learner.objectives.kdrl import kdrl
from sgpo_async.learner.objectives.luffy import luffy
from sgpo_async.learner.objectives.opsd import opsd
from sgpo_async.learner.objectives.pi_distill import pi_distill
from sgpo_async.learner.objectives.pope import pope
from sgpo_async.learner.objectives.rlsd import rlcsd, rlsd
from sgpo_async.learner.objectives.sdpo import sdpo
from sgpo_async.learner.objectives.sft import sft
from sgpo_async.learner.objectives.sgpo import sgpo

OBJECTIVES: dict[str, Objective] = {
    "sgpo": sgpo,
    "grpo": grpo,
    "sft": sft,
    "luffy": luffy,
    "hpt": hpt,
    "opsd": opsd,
    "sdpo": sdpo,
    "kdrl": kdrl,
    "rlsd": rlsd,
    "rlcsd": rlcsd,
    "iw-opd": iw_opd,
    "pi-distill": pi_distill,
    "pope": pope,
}

__all__ = ["OBJECTIVES"]
