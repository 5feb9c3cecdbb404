"""Prompts: settings of chat prompts, functions of the user, and what `check_prompt` finds before a run starts."""

import copy
from pathlib import Path
from typing import Any

import pytest

from sgpo_async.config import Run, Tasks, load
from sgpo_async.errors import CheckFailed, CheckWarning, ConfigError, DataError
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.prompts import build_prompt, chat, check_prompt, prompt_settings

TOKENIZER = load_tokenizer(model_folder("builtin:cues"))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if thinking is defined and not thinking %}no {% endif %}start"
)
WORDS = ["amber", "birch", "cedar", "delta", "ember"]
PROBLEMS = [
    Problem(id=str(i), problem=f"problem {i} {word}", answer="1", strategy=f"{word} raise")
    for i, word in enumerate(WORDS)
]
FUNCTIONS = """
count = 0

def as_text(problem, strategy, tokenizer):
    return f"{strategy or ''} {problem} from"

def as_ids(problem, strategy, tokenizer):
    import numpy
    return numpy.array(tokenizer.encode(as_text(problem, strategy, tokenizer), add_special_tokens=False))

def ignores_the_strategy(problem, strategy, tokenizer):
    return problem

def ignores_the_problem(problem, strategy, tokenizer):
    return "problem" if strategy is None else strategy

def counts(problem, strategy, tokenizer):
    global count
    count += 1
    return f"{strategy or ''} {problem} {count}"

def raises(problem, strategy, tokenizer):
    return strategy.strip()

def empty(problem, strategy, tokenizer):
    return ""

def nothing(problem, strategy, tokenizer):
    pass

def floats(problem, strategy, tokenizer):
    return [1.0, 2.0]
"""


def tokenizer(template: str | None) -> Any:
    """A tokenizer that has every character of the tests as a token of its own."""
    made = copy.deepcopy(TOKENIZER)
    made.chat_template = template
    made.encode = lambda text, **_: [ord(letter) for letter in text]
    original = made.apply_chat_template

    def apply(messages: Any, **arguments: Any) -> dict[str, list[int]]:
        arguments |= {"tokenize": False, "return_dict": False}
        return {"input_ids": made.encode(original(messages, **arguments))}

    made.apply_chat_template = apply
    return made


def shown(problem: str, strategy: str | None, template: str | None = TEMPLATE, **settings: Any) -> str:
    ids = build_prompt(problem, strategy, tasks=Tasks(**settings), tokenizer=tokenizer(template))
    return "".join(chr(one) for one in ids)


def found(template: str | None = TEMPLATE, problems: list[Problem] = PROBLEMS, **settings: Any) -> str:
    return check_prompt(Run(tasks=Tasks(**settings)), tokenizer(template), problems)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_prompts.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_default_prompts_are_those_of_earlier_releases() -> None:
    assert shown("P", None) == "P" and shown("P", "S") == "S\nP"
    assert shown("P", None, prompt="chat") == "user P start"
    assert shown("P", "S", prompt="chat") == (
        "user Solve the problem below. Follow this strategy:\n\n<strategy>\nS\n</strategy>\n\nProblem:\nP start"
    )


def test_the_settings_of_prompts() -> None:
    assert shown("P", None, suffix="\nBox it.") == "P\nBox it." and shown("P", "S", suffix="!") == "S\nP!"
    keys: dict[str, Any] = {
        "prompt": "chat",
        "system": "Be brief.",
        "suffix": "!",
        "template_args": {"thinking": False},
    }
    assert shown("P", None, **keys) == "system Be brief. user P! no start"
    assert shown("P", "S", **keys).startswith("system Be brief. user Solve the problem below. Follow this strategy:")
    assert shown("P", "S", **keys, strategy_place="system") == (
        "system Be brief.\n\nFollow this strategy:\n\n<strategy>\nS\n</strategy> user P! no start"
    )
    assert shown("P", None, prompt="chat", strategy_place="system") == "user P start", "no strategy, no system message"
    assert [message["role"] for message in chat("P", "S", Tasks(prompt="chat", strategy_place="system"))] == [
        "system",
        "user",
    ]


def test_the_settings_of_an_evaluation_have_only_what_differs_from_the_default() -> None:
    assert prompt_settings(Tasks()) == {"prompt": "plain"}
    settings = load("", ["tasks.prompt=chat", "tasks.system=Brief", "tasks.template_args={thinking: false}"]).tasks
    assert prompt_settings(settings) == {"prompt": "chat", "system": "Brief", "template_args": {"thinking": False}}


@pytest.mark.usefixtures("own")
def test_a_function_returns_a_text_or_token_ids() -> None:
    assert shown("P", "S", prompt="own_prompts:as_text") == shown("P", "S", prompt="own_prompts:as_ids") == "S P from"
    assert found(prompt="own_prompts:as_ids").startswith("own_prompts:as_ids: ")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"own_prompts:raises raised AttributeError: .* at .*own_prompts.py:\d+ for the problem 'problem 0"),
        ("empty", "own_prompts:empty must return a text or token ids, at least one, got"),
        ("nothing", "own_prompts:nothing must return a text or token ids, at least one, got None"),
        ("floats", r"own_prompts:floats must return a text or token ids, at least one, got \[1.0, 2.0\]"),
        ("nosuch", "own_prompts has no function nosuch"),
        ("ignores_the_strategy", "gives the same prompt with and without a strategy"),
        ("ignores_the_problem", "gives the same prompt for different problems"),
    ],
)
def test_a_wrong_function_is_found_before_a_run_starts(name: str, message: str) -> None:
    with pytest.raises(CheckFailed, match=message) as caught:
        found(prompt=f"own_prompts:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own")
def test_a_function_that_gives_another_prompt_each_time_is_a_warning() -> None:
    with pytest.raises(CheckWarning, match="gives different prompts for the same problem at different times"):
        found(prompt="own_prompts:counts")


BROKEN = {
    "missing": (None, "tasks.prompt: chat, but the tokenizer .* has no chat template; use plain"),
    "malformed": ("{% for m in messages %}", "the chat template of .* fails .TemplateSyntaxError"),
    "raises": ("{{ raise_exception('no users') }}", "the chat template of .* fails .TemplateError: no users"),
    "undefined": ("{{ nosuch.name }}", "the chat template of .* fails .UndefinedError"),
    "without the message": ("user", "gives the same prompt for different problems"),
}


@pytest.mark.parametrize(("template", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_wrong_chat_template_is_found_before_a_run_starts(template: str | None, message: str) -> None:
    with pytest.raises(CheckFailed, match=message) as caught:
        found(template, prompt="chat")
    assert "\n" not in str(caught.value)


NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"


def test_a_template_that_refuses_or_ignores_system_messages_is_found() -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    for keys in ({"system": "Be brief."}, {"strategy_place": "system"}):
        with pytest.raises(CheckFailed, match="if it takes no system message, remove tasks.system and"):
            found(refuses, prompt="chat", **keys)
    with pytest.raises(CheckFailed, match="tasks.system: the chat template ignores the system message; put it into"):
        found(NO_SYSTEM, prompt="chat", system="Be brief.")
    with pytest.raises(CheckFailed, match="with and without a strategy; set tasks.strategy_place=user"):
        found(NO_SYSTEM, prompt="chat", strategy_place="system")
    assert found(NO_SYSTEM, prompt="chat")


def test_a_template_with_the_time_of_day_in_it_is_a_warning_and_its_remedy_works() -> None:
    """As Llama 3's templates write the date, unless they get one. A run that goes past midnight has two prompts."""
    set_date = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated = set_date + "{{ date_string }}"
    for template in (dated, "{{ strftime_now('%H') }}"):
        with pytest.raises(CheckWarning, match=r"set the date that the template writes in tasks.template_args, e.g."):
            found(template + TEMPLATE, prompt="chat")
    assert found(dated + TEMPLATE, prompt="chat", template_args={"date_string": "26 Jul 2024"})


def test_a_good_prompt_is_described() -> None:
    assert found() == "plain: 15 to 27 tokens, of 5 problems with and without strategy"
    bare = [Problem(id="1", problem="p", answer="1")]
    assert found(problems=bare, prompt="chat").startswith("chat: "), "without strategies, an invented one is used"


def test_an_error_in_a_template_names_it_during_a_run_too() -> None:
    with pytest.raises(DataError, match="no chat template"):
        shown("P", None, None, prompt="chat")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.prompt=chta"], "tasks.prompt must be plain, chat, or MODULE:FUNCTION, got 'chta'"),
        (["tasks.prompt=my module:f"], "tasks.prompt must be plain, chat, or MODULE:FUNCTION"),
        (["tasks.system=x"], "tasks.system is for tasks.prompt=chat only, got 'x'"),
        (["tasks.prompt=my:f", "tasks.template_args={a: 1}"], "tasks.template_args is for tasks.prompt=chat only"),
        (["tasks.strategy_place=system"], "tasks.strategy_place is for tasks.prompt=chat only"),
        (["tasks.path=a.jsonl"], "tasks.path is for tasks.source=file only, which is cues here, got 'a.jsonl'"),
        (["tasks.source=chains", "tasks.columns={answer: x}"], "tasks.columns is for tasks.source=file only, which is"),
        (["tasks.split=test"], "tasks.split is for tasks.source=file only"),
        (["tasks.answer_after=x"], "tasks.answer_after is for tasks.source=file only"),
        (["tasks.prompt=my:f", "tasks.suffix=x"], "tasks.suffix must be empty with tasks.prompt=MODULE:FUNCTION"),
    ],
)
def test_the_rules_of_the_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("", overrides)
