"""The reader and runner of the documents' blocks: it fails where a document is wrong, and names the line."""

import re

import pytest

from flip_hf.hub.folder import prepare
from tests.helpers.documents.blocks import CONSOLE, SHELL, Block, read_blocks, read_commands
from tests.helpers.documents.commands import NOT_RUN, reason_not_to_run
from tests.helpers.documents.document import BlockError, Document
from tests.helpers.documents.pages import CARDS, GUIDES, TOP_PAGES

PAGE = """# A page

```bash
python scripts/convert.py clip openai/clip-vit-base-patch16 \\
    models/flip --mask_ratio 0.75   # a comment
cd models && TOKENS=1 python scripts/zero_shot.py models/flip "a b.jpg"; ls
```

- In a list:

  ~~~python
  one = 1
  if one:
      two = 2
  ~~~

```console
$ python scripts/plan.py \\
    vit_b16
| strategy |
```
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"

    def write(text: str) -> list[Block]:
        path.write_text(text, encoding="utf-8")
        return read_blocks(path)

    return write


@pytest.fixture
def run(page, saved, tmp_path, hub):
    """Runs all blocks of a text; what went wrong, if anything did."""
    (tmp_path / "folder").mkdir()

    def run(text: str) -> str:
        blocks = page(text)
        document = Document(blocks[0].path, tmp_path / "folder", saved, hub.endpoint)
        try:
            for block in blocks:
                document.run(block)
        except BlockError as error:
            return str(error)
        finally:
            document.close()
        return ""

    return run


def test_blocks_and_commands_are_read_with_their_lines(page):
    shell, python, console = page(PAGE)
    assert (shell.line, shell.language, python.line, python.language) == (4, SHELL, 12, "python")
    assert python.text == "one = 1\nif one:\n    two = 2\n" and console.language == CONSOLE
    commands = read_commands(shell)
    assert [command.place for command in commands] == ["page.md:4", "page.md:6", "page.md:6", "page.md:6"]
    source = ["clip", "openai/clip-vit-base-patch16", "models/flip"]
    assert commands[0].words == ["python", "scripts/convert.py", *source, "--mask_ratio", "0.75"]
    assert commands[2].environment == {"TOKENS": "1"}
    assert commands[2].words == ["python", "scripts/zero_shot.py", "models/flip", "a b.jpg"]
    assert [command.words for command in read_commands(console)] == [["python", "scripts/plan.py", "vit_b16"]]


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("bash", "make test\npython scripts/evaluate.py models/flip --lost", "page.md:3: .*--lost"),
        ("bash", "\naccelerate launch scripts/pretrain.py --batch_sice 2", "page.md:3: .*--batch_sice"),
        (
            "bash",
            "accelerate launch --number_processes 2 scripts/pretrain.py",
            "page.md:2: .*accelerate launch. does not",
        ),
        ("bash", "accelerate launch --config_file none.yaml scripts/pretrain.py", "page.md:2: .*none.yaml"),
        ("bash", "accelerate launch scripts/pretrain.py vit_b61", "page.md:2: .*no recipe 'vit_b61'"),
        (
            "bash",
            "python scripts/convert.py clip openai/clip-tiny out --decoder",
            "page.md:2: .*ended with 2(?s:.)*--decoder",
        ),
        ("bash", "python scripts/none.py", "page.md:2: .*do not know the script"),
        ("bash", "flip-hf pre-train vit_b16", "page.md:2: .*no command .pre-train."),
        ("bash", "accelerate launch -m flip_hf pretrain vit_b61", "page.md:2: .*no recipe .vit_b61."),
        ("bash", "flip-hf plan --nodez 2", "page.md:2: .*--nodez"),
        ("bash", "rm -r runs", "page.md:2: .*do not know the command 'rm'"),
        ("bash", "cp scripts/none.py here", "page.md:2: .*none.py"),
        ("bash", "make nothing", "page.md:2: .*nothing"),
        ("bash", "pip install 'flip_hf[tests]'", "page.md:2: .*no extra 'tests'"),
        ("bash", "cd 'x", "page.md:2: No closing quotation"),
        ("bash", "cd x | cd y", r"page.md:2: .*shell's '\|'"),
        ("python", "a = 1\n\nb = 2 +", "page.md:4:(?s:.)*SyntaxError"),
        ("python", "def f():\n    return x\n\nf()", "page.md:5:(?s:.)*NameError: name 'x'"),
        ("python", "import os\nos._exit(3)", "page.md:2:\nthe interpreter has ended with 3"),
        ("yaml", "batch_sice: 2", "page.md:2: .*Did you mean 'batch_size'"),
        ("console", "out", "page.md:2: no line begins with"),
        ("", "python", "page.md:1: name the block's language"),
    ],
)
def test_errors_are_named_with_their_line(run, language, text, message):
    assert re.match(message, run(f"```{language}\n{text}\n```\n"))


def test_blocks_of_python_share_their_names_and_the_folder(run, tmp_path):
    text = "```python\nname = 'a'\n```\n```bash\npython scripts/zero_shot.py --help\n```\n"
    assert run(f"{text}```python\nopen(name, 'w').write('photo.jpg')\n```") == ""
    assert (tmp_path / "folder" / "a").read_text() == "photo.jpg" and (tmp_path / "folder" / "photo.jpg").is_file()


def test_a_card_runs_on_what_it_names(run, saved, tmp_path):
    prepare(saved, tmp_path / "ready", repo_id="you/flip")
    assert run((tmp_path / "ready" / "README.md").read_text(encoding="utf-8")) == ""
    assert (tmp_path / "folder" / "you" / "flip" / "modeling_flip.py").is_file()


def test_a_block_that_does_not_end_is_an_error(page):
    with pytest.raises(ValueError, match="page.md:3: the block does not end"):
        page("\n\n```bash\nls\n")


def test_every_exception_is_used():
    blocks = [block for path in (*TOP_PAGES, *GUIDES, *CARDS) for block in read_blocks(path)]
    commands = [command for block in blocks if block.language in (SHELL, CONSOLE) for command in read_commands(block)]
    assert {reason_not_to_run(command.words) for command in commands} - {None} == set(NOT_RUN)
