"""A run that trains adapters: only they are published, and what it leaves behind is whole."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_support import assert_right_weights, real_run
from transformers import AutoModelForCausalLM

from sgpo_async.evaluation.chat import Chat, ChatSettings, find_policy
from sgpo_async.model.folder import model_folder

pytestmark = pytest.mark.process

BASE = model_folder("builtin:cues")
LORA = ["learner.lora.rank=4", "learner.lora.targets=[q_proj, v_proj, down_proj]", "optim.lr=0.01"]


@pytest.mark.slow
def test_adapters_are_trained_published_and_resumed(tmp_path: Path) -> None:
    """At lag 0 learner and engine agree to rounding errors: the engine serves exactly the policy that is trained."""
    with real_run(tmp_path, "steps=3", "hub.max_lag=0", *LORA) as run:
        first = run.local()
        assert first.wait() == 0, first.output
        lines = run.resume(steps=6)
        assert_right_weights(run.summary())
        assert all(line["mismatch_max_lag0_first"] < 1e-4 and line["grad_norm"] > 0 for line in lines)
        run.assert_cleaned_up()
        config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"] and config["r"] == 4
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        policy = AutoModelForCausalLM.from_pretrained(run.folder / "policy", dtype=torch.float32)
        ids = torch.tensor([[5, 7, 11, 3]])
        with torch.no_grad():
            plain, trained = base(ids).logits, policy(ids).logits
            adapted = PeftModel.from_pretrained(base, run.folder / "adapter")(ids).logits
        torch.testing.assert_close(adapted, trained, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(plain, trained, atol=1e-2)
        (run.folder / "policy" / "config.json").unlink()  # chat now takes the checkpoint
        found = find_policy(run.folder)
        assert found.checkpoint is not None
        chat = Chat(found, ChatSettings())
        served = dict(chat._engine._decoder.model.named_parameters())
        assert all(torch.allclose(served[name], p, atol=1e-6) for name, p in policy.named_parameters())
        chat.close()
