"""What the base policy of the built-in domain is to be: tokenizer, shape, and what it guesses unguided.

It carries out any techniques that a strategy names. Without a strategy it guesses: for every cue a wrong
technique is its favourite and the true one comes close behind. So it hardly ever finds five in a row and
greedy decoding finds none; learning is to change its mind on 36 facts, not to become surer of it. Yet the
true technique stays within reach: its KL from a sure teacher, -ln p(true), is below 1.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from sgpo_async.tasks.cues_domain import CUES, DIGITS, KEYWORDS, TECHNIQUES, TRUE_TECHNIQUE

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
P_TRUE, P_FAVOURITE = 0.44, 0.50


def guess_probabilities(cue: str, *, p_true: float = P_TRUE, p_favourite: float = P_FAVOURITE) -> dict[str, float]:
    """Technique -> probability that the base policy guesses it unguided; the sum is 1.

    All five right by chance: p_true^5, 1.6 % by default.
    """
    names = list(TECHNIQUES)
    true = TRUE_TECHNIQUE[cue]
    wrong = [name for name in names if name != true]
    favourite = wrong[CUES.index(cue) % len(wrong)]
    rest = (1.0 - p_true - p_favourite) / (len(names) - 2)
    return {name: {true: p_true, favourite: p_favourite}.get(name, rest) for name in names}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: every text of the domain is unchanged by encoding and decoding."""
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
    """The shape: 0.17 million parameters.

    Qwen3 and not Qwen2, because AutoTokenizer gives every folder of model type qwen2 Qwen's own tokenizer.
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
