"""The objectives: each is a pure function from the group of one task to weighted sequences.

sgpo.py    SGPO, with every variant that the paper measures       grpo.py        GRPO, without guidance
sft.py     the response of the problem                            luffy.py       the response as a member of the group
hpt.py     the response if the policy fails, else GRPO            base.py        the input and output types
opsd.py    a teacher with the context, on the policy's rollouts   kdrl.py        GRPO and OPSD together
sdpo.py    the same with a share of GRPO
rlsd.py    a teacher that weighs the tokens of GRPO; RLCSD        iw_opd.py      a teacher in place of the reward
pope.py    GRPO on guided and on plain prompts                    pi_distill.py  both from guided rollouts
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
