"""What the base policies of the built-in domains have in common: tokenizer, shape, and what they read before a problem.

One word is one token. A problem of these domains takes a plan: the technique of each cue, the meaning of each word. The
policy follows a plan that its prompt shows, and guesses one otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from sgpo_async.tasks.contexts import beginning

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
LONGEST = 128  # tokens of prompt and completion

Kind = Literal["none", "strategy", "response", "partial-response", "answer", "other-strategy"]
KINDS: dict[Kind, float] = {
    "none": 0.35,
    "strategy": 0.30,
    "response": 0.15,
    "partial-response": 0.08,
    "answer": 0.08,
    "other-strategy": 0.04,
}
"""What stands before the problem, and in which share of the training examples."""
PLAIN: dict[Kind, float] = {"none": 0.5, "strategy": 0.5}
"""The same of a policy that knows only strategies."""

T = TypeVar("T")
Plan = Sequence[Any]


class Exercise(Protocol):
    """The content of one problem."""

    decided_after: ClassVar[int]  # number of words of a solution after which the first step of its plan is known

    def problem_text(self) -> str: ...

    def strategy_text(self, plan: Any, /) -> str: ...

    def solution_text(self, plan: Any, /) -> str: ...

    def response_text(self, plan: Any, /) -> str: ...

    def answer_text(self, plan: Any, /) -> str: ...


class InContext(NamedTuple):
    """A prompt, what stands in it before the problem, and the plan of its solution."""

    kind: Kind
    prompt: str
    plan: Plan


def guess_distribution(options: Sequence[T], known: Mapping[T, float]) -> dict[T, float]:
    """The probability of each option: that in `known`, or an equal share of the rest; the sum is 1."""
    rest = (1.0 - sum(known.values())) / (len(options) - len(known))
    return {option: known.get(option, rest) for option in options}


def draw_guesses(rng: random.Random, guesses: Iterable[Mapping[T, float]]) -> tuple[T, ...]:
    """One of the keys of each mapping, with the probability that is its value."""
    return tuple(rng.choices(list(guess), list(guess.values()))[0] for guess in guesses)


def draw_context(
    rng: random.Random,
    exercise: Exercise,
    *,
    contexts: bool,
    shown: Plan,
    guessed: Plan,
    other: tuple[Exercise, Plan],
) -> InContext:
    """A context of random kind, and the plan that follows from it.

    Args:
        contexts: whether it may be of all KINDS, or only of those in PLAIN.
        shown: the plan that a strategy or a solution shows; it says nothing about what is true.
        guessed: the plan without help, also where the answer is shown: it is then the answer of this plan.
        other: another exercise with a plan, for a strategy that does not fit.
    """
    kinds = KINDS if contexts else PLAIN
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    text, plan = "", guessed
    match kind:
        case "strategy":
            text, plan = exercise.strategy_text(shown), shown
        case "response":  # or a sibling, which the policy itself has written
            write = exercise.response_text if rng.random() < 0.5 else exercise.solution_text
            text, plan = write(shown), shown
        case "partial-response":
            begun = [*shown[:1], *guessed[1:]]
            text = beginning(exercise.response_text(begun))
            if len(text.split(" ")) >= exercise.decided_after:
                plan = begun
            else:  # it does not tell a step
                text = beginning(exercise.response_text(guessed))
        case "answer":
            text = exercise.answer_text(guessed)
        case "other-strategy":
            text = other[0].strategy_text(other[1])
    return InContext(kind, f"{text} {exercise.problem_text()}".strip(), plan)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these words; encoding and decoding leave every text of them unchanged."""
    vocabulary = {word: i for i, word in enumerate((PAD, EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
    )


def small_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
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
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
