"""The documents: blocks are current, code runs, commands parse, links lead somewhere, examples are short."""

import doctest
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import types

import pytest
import yaml
from PIL import Image

import qalign
import qalign_kernels
from benchmarks import pages
from tests.project import ROOT
from tests.test_docstrings import namespace

DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
PARSERS = {
    "qalign": "qalign.__main__",
    "benchmarks": "benchmarks.__main__",
    "qalign_kernels.bench": "qalign_kernels.bench.__main__",
    "qalign_kernels.env": "qalign_kernels.env",
    "qalign_kernels.validate": "qalign_kernels.validation.command",
    "qalign.embedded.train": "qalign.embedded.train",
}


def read(page):
    """The text of a page, with the files that it includes."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r'^--8<-- "(.+)"$', lambda found: (ROOT / found[1]).read_text(), text, flags=re.MULTILINE)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def fewer_steps(source):
    """The same code with two denoising steps where it has many."""
    return re.sub(r'(num_inference_steps"?[=:] ?)\d+', r"\g<1>2", source)


def named(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def beside_the_examples(tmp_path, monkeypatch):
    """An empty folder to work in, where examples can be imported, as in their own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield tmp_path
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", pages.pages(), ids=named)
def test_generated_blocks_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert pages.filled(text) == text, "run python -m benchmarks pages"


def test_every_generated_block_has_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in pages.pages())
    assert {*re.findall(r"<!-- generated:(\w+) -->", text)} == {*pages.BLOCKS}


def test_filling_keeps_what_surrounds_a_block():
    before = "above\n<!-- generated:matches -->\nold\n<!-- end:matches -->\nbelow\n"
    after = pages.filled(before)
    assert after.startswith("above\n<!-- generated:matches -->\n| signal |")
    assert after.endswith("|\n<!-- end:matches -->\nbelow\n") and "old" not in after


@pytest.mark.parametrize(
    "text", ["<!-- generated:nothing -->\n<!-- end:nothing -->", "<!-- generated:speed -->\n"]
)
def test_bad_block_is_refused(text):
    with pytest.raises(ValueError, match="^block: expected one of results, .* got '(nothing|speed)'"):
        pages.filled(text)


def test_check_names_stale_pages_and_writes_nothing(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- generated:matches -->\nold\n<!-- end:matches -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [page])
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["pages", "--check"]) == 1 and "old" in page.read_text()
    assert main(["pages"]) == 0 and "old" not in page.read_text()
    assert main(["pages", "--check"]) == 0
    assert capsys.readouterr().out == "stale: page.md\nwrote: page.md\n"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


def test_readme_answers_on_the_first_screen():
    """The picture and the five questions stand above the first heading."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "docs/images/hero.png" in first and "is the default" in first
    assert len(re.findall(r"^\| .*\? \| ", first, re.MULTILINE)) == 5


@pytest.mark.parametrize("name", ["hero.png", "transfer.png"])
def test_pictures_are_small_files(name):
    with Image.open(DOCS / "images" / name) as picture:
        assert picture.width >= 600
    assert (DOCS / "images" / name).stat().st_size <= 400 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.glob("*.md")) if blocks(page, "python")], ids=named
)
def test_python_of_pages_runs(page, beside_the_examples, monkeypatch):
    """Block after block in one namespace, which begins with a small pipeline, a prompt, pictures, latents."""
    pytest.importorskip("diffusers")
    module = types.ModuleType("page")
    vars(module).update(namespace())
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look for it
    for block in blocks(page, "python"):
        exec(compile(fewer_steps(block), named(page), "exec"), vars(module))


@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.glob("*.md")) if blocks(page, "pycon")], ids=named
)
def test_sessions_of_pages_print_what_they_show(page):
    pytest.importorskip("diffusers")
    text, report = "\n".join(blocks(page, "pycon")), []
    test = doctest.DocTestParser().get_doctest(text, namespace(), named(page), str(page), 0)
    for example in test.examples:
        example.source = fewer_steps(example.source)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=options).run(test, out=report.append)
    assert test.examples and not report, "".join(report)


def test_troubleshooting_shows_ten_errors():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)] == [*range(1, 11)]


def commands(page):
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if commands(page)], ids=named)
def test_commands_of_documents_parse(page, beside_the_examples):
    verbs = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for words in commands(page):
        if words[1:2] == ["-m"] and words[2] in PARSERS:
            importlib.import_module(PARSERS[words[2]]).parser().parse_args(words[3:])
        elif words[0] == "make":
            assert words[1] in verbs, words
        else:
            assert words[:2] in (["pip", "install"], ["python", "-m"], [".venv/bin/python", "-m"]), words
            assert words[0] == "pip" or words[2] in ("pytest", "build"), words


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=named)
def test_links_of_pages_lead_somewhere(page):
    links = re.findall(
        r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )
    assert not [path for path, _ in links if path and not (page.parent / path).exists()]


def test_every_public_name_has_an_api_page():
    pages_of = {path.stem for path in (DOCS / "api").glob("*.md")} | {"index"}
    methods = {kind.__name__ for kind in importlib.import_module("qalign.methods").METHODS.values()}
    twins = {name for name in qalign.__all__ if name.replace("XLPipeline", "Pipeline") != name}
    names = {*qalign_kernels.__all__, *qalign.__all__} - methods - twins
    assert {*names, "index"} == pages_of
    index = (DOCS / "api" / "index.md").read_text()
    assert all(f"({name}.md)" in index for name in names)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_named(path):
    assert len(path.read_text().splitlines()) < 40
    assert any(f"examples/{path.name}" in page.read_text() for page in DOCS.glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, beside_the_examples, monkeypatch, capsys):
    """As they stand, with two denoising steps in place of many."""
    pytest.importorskip("diffusers")
    arguments = [str(beside_the_examples / name) for name in ("a.png", "b.png", "o.png")]
    if path.stem == "transfer_two_pictures":
        for name in arguments[:2]:
            Image.new("RGB", (64, 64), "teal").save(name)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    text = re.sub(r"^STEPS = .*$", "STEPS = 2", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shorter = beside_the_examples / path.name
    shorter.write_text(text.replace("TOKENS, ROUNDS = 1024, 10", "TOKENS, ROUNDS = 64, 2"), encoding="utf-8")
    try:
        runpy.run_path(str(shorter), run_name="__main__")
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_mkdocs_builds_strictly(tmp_path):
    """In a process of its own, as `make docs` does it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hero.png" in (tmp_path / "index.html").read_text(encoding="utf-8")
    page = (tmp_path / "api" / "similarity_argmax" / "index.html").read_text(encoding="utf-8")
    assert "reference_labels" in page


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == qalign_kernels.__version__
    heading = f"## [{citation['version']}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hooks_take_the_pinned_ruff():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pins = {pin for hook in local["hooks"] for pin in hook.get("additional_dependencies", [])}
    assert len(pins) == 1 and pins <= {*(ROOT / "constraints.txt").read_text().splitlines()}


def test_workflow_runs_the_verbs_of_make():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    ran = " ".join(step.get("run", "") for job in jobs for step in job["steps"])
    assert "make test " in ran and ".ci/run" in ran and "make docs" in ran


def test_bug_template_wants_the_environment():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    wanted = [field for field in form["body"] if field.get("validations", {}).get("required")]
    assert any("python -m qalign_kernels.env" in field["attributes"]["label"] for field in wanted)
