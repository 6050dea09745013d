"""How the prose reads: words a sentence, and comments for each 100 lines of code.

    python docs/prose.py                      # README, docs, and the docstrings of gnlin
    python docs/prose.py --long 25 docs/*.md  # also each sentence of more than 25 words

Code, tables, formulas, references and doctests are left out. A list item is a sentence or several.
"""

import argparse
import ast
import io
import re
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]


def paragraphs(text: str) -> list[str]:
    """The prose of a page in Markdown, or of a docstring, without what is no prose."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|^\$\$.*?\$\$\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\.\. math::[^\n]*\n(?:\s*\n)?(?:[ \t]{4,}[^\n]*\n?)*", "\n", text)
    text = re.sub(r"^(\s*>>>|\s*\.\.\. ).*$", "\n", text, flags=re.MULTILINE)
    found: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        if any(
            line.startswith(("#", "|", ":::", "![", ">>>", "References:", "Reference:", "Example:"))
            for line in lines
        ):
            continue
        item = ""
        for line in lines:
            if re.match(r"([*-]|\d+\.) |\w[\w*, `]*: ?$|`?\w+`?: ", line):  # a list, an argument
                found.append(item)
                item = re.sub(r"^([*-]|\d+\.) |^`?\w[\w*, `]*`?:", "", line)
            else:
                item += f" {line}"
        found.append(item)
    return [item.strip() for item in found if item.strip()]


def sentences(text: str) -> list[str]:
    """Sentences of the prose in a text; code, formulas and links count as one word each."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"``.+?``|`[^`]+`|\$[^$]+\$|:math:`[^`]+`", "X", paragraph)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(r"\b(e\.g|i\.e|al|vs|cf|eq|Eq|no|sec|St)\.", r"\1", plain)
        found += [
            part.strip()
            for part in re.split(r"(?<=[.!?])[)*\"]*\s+", plain)
            if len(part.split()) > 1
        ]
    return found


def docstrings(path: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)
    ]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def comments(path: Path) -> tuple[int, int]:
    """(lines with a comment, lines of code), docstrings being neither."""
    source = path.read_text("utf-8")
    with_comment, with_code = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            with_comment.update(lines)
        elif token.string.strip() and not (token.type == tokenize.STRING and '"""' in token.string):
            with_code.update(lines)
    return len(with_comment), len(with_code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--long", type=int, help="show sentences of more than so many words")
    arguments = parser.parse_args()
    default = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "gnlin").rglob("*.py")),
    ]
    files = arguments.files or default
    groups: dict[str, list[int]] = {"pages": [], "docstrings": []}
    noted, coded = 0, 0
    for path in files:
        code = path.suffix == ".py"
        found = sentences(docstrings(path) if code else path.read_text("utf-8"))
        groups["docstrings" if code else "pages"] += [len(each.split()) for each in found]
        if code:
            of_path = comments(path)
            noted, coded = noted + of_path[0], coded + of_path[1]
        for each in found if arguments.long else ():
            if len(each.split()) > arguments.long:
                print(f"{path}: {len(each.split())} words: {each}")
    for name, lengths in groups.items():
        if lengths:
            over = sum(length > 25 for length in lengths)
            print(
                f"{name}: {len(lengths)} sentences, mean {statistics.fmean(lengths):.1f} words, "
                f"{over} of more than 25"
            )
    if coded:
        print(f"comments: {100 * noted / coded:.1f} for each 100 lines of code ({coded} lines)")


if __name__ == "__main__":
    main()
