"""The documentation builds strictly and works without a network, generated pages are current, and links are right both
in the site and on a code host."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sgpo_async import evaluate, load_config, train
from sgpo_async.cli.main import COMMANDS, parser_of
from sgpo_async.cli.page import page as commands_page
from sgpo_async.config import Run, by_key_path, load, to_plain
from sgpo_async.config.page import page as configuration_page
from sgpo_async.config.page import sections

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import hooks  # noqa: E402


class Loaded(HTMLParser):
    """Collects what a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.urls.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.urls.append(values.get("href") or "")


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_builds_strictly_with_every_page(site):
    names = [file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").glob("*.md")]
    missing = [
        name
        for name in map(str, [*names, *(one[:-3] + ".html" for one in hooks.PAGES.values())])
        if not (site / name).exists()
    ]
    assert not missing


def test_nothing_comes_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [url for url in loaded.urls if url.startswith(("http", "//"))], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text()), style


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](design.md#gone)", "#gone"),
        ("[gone](../sgpo_async/gone.py)", "gone.py"),
    ],
)
def test_a_broken_link_or_anchor_fails_the_build(tmp_path, text, reason):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/design.md").write_text(f"# Design\n\n{text}\n")
    settings = (
        (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0].replace("docs/hooks.py", str(ROOT / "docs/hooks.py"))
    )
    config = tmp_path / "mkdocs.yml"
    config.write_text(settings.replace("extra_css: [site.css]", ""))
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert reason in done.stderr


def test_links_outside_of_code_are_those_of_the_site():
    def linked(text, path="README.md", uri="index.md"):
        return hooks.relinked(text, path, uri)

    assert linked("[a](docs/design.md#x)") == "[a](design.md#x)"
    assert (
        linked("[a](CHANGELOG.md) [b](#here) [c](https://arxiv.org/abs/1)")
        == "[a](changelog.md) [b](#here) [c](https://arxiv.org/abs/1)"
    )
    assert linked("[a](../README.md)", "docs/gpu.md", "gpu.md") == "[a](index.md)"
    assert linked("[`a`](../sgpo_async/api.py)", "docs/gpu.md", "gpu.md") == "[`a`](source/sgpo_async/api.py.md)"
    assert linked("[n](../../examples/notebook.ipynb)", "docs/results/README.md", "results/README.md") == (
        "[n](../source/examples/notebook.ipynb)"
    )
    assert linked("[sgpo_async/config](sgpo_async/config)") == "sgpo_async/config"
    assert linked("[docs/gpu.md](docs/gpu.md)") == "[On GPUs](gpu.md)"
    assert linked("[gpu.md](docs/gpu.md#if-it-does-not-fit)") == "[If it does not fit](gpu.md#if-it-does-not-fit)"
    assert (
        linked("![p](pictures/x.svg) [gone](gone.md)", "docs/gpu.md", "gpu.md")
        == "![p](pictures/x.svg) [gone](gone.md)"
    )
    for code in ("`[a](docs/design.md)`", "```\n[a](docs/design.md)\n```", "``[a](docs/design.md) ` ``"):
        assert linked(code) == code


@pytest.mark.parametrize(
    "name", [*hooks.PAGES, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_are_right_on_a_code_host(name):
    """There, a link is relative to the file that has it, and nothing rewrites it."""
    for match in hooks.LINK.finditer((ROOT / name).read_text()):
        target = match["target"]
        if target and not re.match(r"[a-z]+:|#", target):
            file = (ROOT / name).parent / target.partition("#")[0]
            assert file.resolve().is_relative_to(ROOT), f"{name}: {target}"
            assert file.exists(), f"{name}: {target}"


@pytest.mark.parametrize(
    ("name", "page", "module"),
    [
        ("configuration", configuration_page, "sgpo_async.config.page"),
        ("commands", commands_page, "sgpo_async.cli.page"),
    ],
)
def test_a_generated_page_is_current(name, page, module):
    assert (ROOT / f"docs/{name}.md").read_text() == page(), f"run: make docs-pages ({module})"


def test_every_key_is_described():
    keys = {key.path: key for section in sections(Run()) for key in section.keys}
    own = (one.path for one in keys.values() if one.type.startswith("mapping"))
    assert {key for key, _ in by_key_path(to_plain(Run()))} | set(own) == set(keys)
    assert not [path for path, key in keys.items() if not key.text], "give these keys a comment in the schema"


def test_rules_are_those_of_the_checks():
    keys = {key.path: key for section in sections(Run()) for key in section.keys}
    assert keys["optim.lr"].rules == ["must be > 0"]
    assert keys["optim.beta1"].rules == ["must be in [0, 1)"]
    assert keys["rollout.top_k"].rules[0] == "must be 0 or in [2, 2048]"
    assert keys["hub.batches_in_flight"].rules == ["must be 0 or > hub.max_lag"]
    assert keys["hub.stale"].type == "one of `correct`, `mask`, `drop`"
    assert keys["algorithm.kl_correction.bound"].default == "`1.0`"
    assert keys["algorithm.eps_high"].text == "See `algorithm.eps_low`."


def test_every_command_has_a_section():
    text = commands_page()
    assert [line for line in text.splitlines() if re.match("## ", line)] == [
        f"## sgpo-async {name}" for name in COMMANDS
    ]
    assert "- `--hub tcp://HOST:PORT`: address of the hub" in text


def messages() -> list[str]:
    """The first column of every table of docs/errors.md."""
    rows = (ROOT / "docs/errors.md").read_text().splitlines()
    return [text for row in rows if row.startswith("| `") for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@cache
def texts_of_the_code() -> str:
    """Every constant text of the package, in lines; implicit concatenation is joined, and f-strings are in parts."""
    trees = (ast.parse(file.read_text()) for file in (ROOT / "sgpo_async").rglob("*.py"))
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(value for value in constants if isinstance(value, str))


@pytest.mark.parametrize("message", messages())
def test_an_error_that_is_explained_is_raised(message):
    parts = [part.strip() for part in message.split("…") if len(part.strip(" .:;,()")) > 3]
    assert parts, message
    assert not [part for part in parts if part not in texts_of_the_code()], message


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) for every command in the code blocks of the pages; continued lines are joined."""
    names = [*hooks.PAGES, *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
    found = []
    for name in names:
        if name in ("CHANGELOG.md", "docs/log.md", "docs/commands.md"):  # history, and what the parsers say themselves
            continue
        blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = re.search(r"(?:^|\s)(?:launch/(\w+)\.py|sgpo-async (\w+)|sgpo_async\.cli (\w+))(?=\s)(.*)", line)
            if words and next(filter(None, words.groups())) in COMMANDS:
                found.append((name, line.strip()))
    return found


@pytest.mark.parametrize(("name", "line"), command_lines())
def test_a_command_of_the_documentation_is_one_of_the_parsers(name, line):
    """Its options exist, and so do the keys that it overrides and the configurations that it names."""
    _, command, rest = re.split(r"(?:launch/|sgpo-async |sgpo_async\.cli )(\w+)(?:\.py)?(?=\s)", line, maxsplit=1)
    ends = re.split(r"\s(?:[&|;<]|2?>>?)\s?|\s#\s|\s{3,}(?=[a-zA-Z(])|\)$", rest, maxsplit=1)[0]
    args = parser_of(command).parse_intermixed_args(
        shlex.split(ends.replace(" ...", "").replace("[", "").replace("]", ""))
    )
    overrides = [
        word for word in getattr(args, "overrides", []) if word[:1].islower() and "=" in word and word != "key=value"
    ]
    load("", [word for word in overrides if not re.search(r"=.*[A-Z]", word)])
    if str(getattr(args, "config", "")).startswith("builtin:"):
        load(args.config)


def test_the_page_about_python_has_the_signatures_and_its_error(capsys):
    text = (ROOT / "docs/python.md").read_text()
    for function in (load_config, train, evaluate):
        row = re.search(rf"^\| `{function.__name__}\((.*?)\)` \|", text, re.MULTILINE)
        parameters = inspect.signature(function).parameters.values()
        plain = (one.replace(annotation=inspect.Parameter.empty) for one in parameters)
        keyword_only = ", *, "  # which the row leaves out after *overrides
        assert row and row[1].replace('"', "'") == ", ".join(map(str, plain)).replace(keyword_only, ", ")
    exec(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1], {})
    assert f"# {capsys.readouterr().out}" in text
