"""Specifies the base policy of the built-in domain: tokenizer, model shape, and guesses without a strategy.

The policy applies any techniques that a strategy names. Without a strategy it guesses: for every cue the most probable
technique is wrong and the true one is second. So sampling rarely gets five techniques right, and greedy decoding never
does: training must change 36 preferences, not just sharpen them. The true technique remains probable enough to be
learned: the KL divergence from a certain teacher, -ln p(true), is below 1.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from sgpo_async.tasks.cues_domain import CUES, DIGITS, KEYWORDS, TECHNIQUES, TRUE_TECHNIQUE

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
P_TRUE, P_FAVOURITE = 0.44, 0.50


def guess_probabilities(cue: str, *, p_true: float = P_TRUE, p_favourite: float = P_FAVOURITE) -> dict[str, float]:
    """Technique -> probability that the base policy guesses it without a strategy; the sum is 1.

    Probability that all five are right: p_true^5, 1.6 % by default.
    """
    names = list(TECHNIQUES)
    true = TRUE_TECHNIQUE[cue]
    wrong = [name for name in names if name != true]
    favourite = wrong[CUES.index(cue) % len(wrong)]
    rest = (1.0 - p_true - p_favourite) / (len(names) - 2)
    return {name: {true: p_true, favourite: p_favourite}.get(name, rest) for name in names}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; encoding and decoding leave every text of the domain unchanged."""
    words = (PAD, EOS, UNKNOWN, *KEYWORDS, *DIGITS, *TECHNIQUES, *CUES)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The model shape: 0.17 million parameters.

    The model type is qwen3, because AutoTokenizer loads Qwen's own tokenizer for every folder of type qwen2.
    """
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
