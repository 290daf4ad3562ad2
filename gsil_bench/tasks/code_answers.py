"""The program in an answer: what a person would copy out of it, put under the prompt it answers.

A correct answer must not fail because of its wrapping. It may give the whole function, only its body, or helpers beside it; in
fences, several of them, one that is never closed, or none; with prose around, with its first indentation stripped, with examples
that read input. `complete` builds one program from such an answer by the text alone. It runs nothing and knows no test, so it
cannot choose the variant that happens to pass.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[ \t]*([\w+.#-]*)[^\n`]*$", re.MULTILINE)
CODE_START = re.compile(r"^[ \t]*(?:from\s+\w[\w.]*\s+import\b|import\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w)")
FUTURE = re.compile(r"^from __future__ import [^\n]*\n", re.MULTILINE)
PYTHON = ("", "python", "py", "python3", "py3", "pycon", "ipython", "python2")
LONGEST_ANSWER = 50_000
MOST_BLOCKS = 20
MOST_TRIMMED_LINES = 200
MOST_ATTEMPTS = 300
"""Texts that are tried per piece: reading an answer must not take longer than running it."""


@dataclass(frozen=True)
class FoundProgram:
    """A program and how it was found, for the score's details."""

    text: str
    format_ok: bool
    """It compiles and defines what was asked for."""


def complete(answer: str, prompt: str, entry_point: str) -> FoundProgram:
    """The program of an answer to "complete this function".

    Args:
        answer: the model's text.
        prompt: imports, helpers, and the function's signature with its docstring, which the answer may repeat or not.
        entry_point: the function's name.
    """
    text = _normal(answer)
    stub = prompt if prompt.endswith("\n") else prompt + "\n"
    for code in _candidates(text, [entry_point]):
        whole = _definition(code, [entry_point])
        if whole is not None:
            return FoundProgram(_with_futures_first(f"{_inner_imports(stub)}{stub}    pass\n\n\n", whole), True)
    for code in _candidates(text, [entry_point], bodies=True):
        body = _body(stub, code)
        if body is not None:
            return FoundProgram(body, True)
    return FoundProgram(stub + text, False)


def standalone(answer: str, names: Sequence[str]) -> FoundProgram:
    """The program of an answer to "write a function": no prompt has to be put before it.

    Args:
        answer: the model's text.
        names: what it must define.
    """
    text = _normal(answer)
    for code in _candidates(text, names):
        whole = _definition(code, names)
        if whole is not None:
            return FoundProgram(_with_futures_first("", whole), True)
    return FoundProgram(next(iter(_candidates(text, names)), text), False)


def _normal(answer: str) -> str:
    """Line ends as Python's, tabs as they are, without byte order marks; what is too long to be a program is cut."""
    text = answer[:LONGEST_ANSWER].replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\u200b", "")
    return text.replace("\u00a0", " ")


# ---------------------------------------------------------------------------------------------------------------------------
# Pieces of the text that may be code


def _candidates(text: str, names: Sequence[str], bodies: bool = False) -> list[str]:
    """Pieces of an answer that may be the code, best first.

    Fenced blocks that define what is asked for, the last one first (a correction follows what it corrects), each with what the
    other blocks define; then the text outside of fences, for an answer that goes on where an opening fence was put in its mouth.
    """
    inside, outside = _blocks(text)
    defining = [index for index, block in enumerate(inside) if _mentions(block, names)]
    pieces = [_joined(inside, index) for index in reversed(defining)]
    if bodies:
        pieces += [block for block in inside if block.strip()]
    pieces += [block for block in outside if _mentions(block, names) or (bodies and block.strip())]
    if inside and bodies:
        return [*pieces, text]
    return pieces or ([] if inside and not bodies else [text])


def _blocks(text: str) -> tuple[list[str], list[str]]:
    """The texts inside and outside of fences, in order. A fence that is not closed holds the rest."""
    inside, outside, position, opened = list[str](), list[str](), 0, ""
    for match in FENCE.finditer(text):
        mark, language = match.group(1), match.group(2).lower()
        if opened and (mark[0] != opened[0] or len(mark) < len(opened)):
            continue  # another kind of fence within a block is a part of it
        piece = text[position : match.start()]
        position = match.end() + 1
        if opened:
            inside.append(piece)
            # "```" directly followed by a language opens a new block: the last one was not closed.
            opened = mark if language else ""
        else:
            outside.append(piece)
            opened = mark
    (inside if opened else outside).append(text[position:])
    return [_unquoted(block) for block in inside if block.strip()][-MOST_BLOCKS:], outside[:MOST_BLOCKS]


def _unquoted(block: str) -> str:
    """A block without the indentation of the list it stands in, and without the prompts of a console or a quotation."""
    lines = block.split("\n")
    full = [line for line in lines if line.strip()]
    if full and all(line.lstrip().startswith(">") and not line.lstrip().startswith(">>>") for line in full):
        block = "\n".join(re.sub(r"^\s*> ?", "", line) for line in lines)
    return block


def _mentions(code: str, names: Sequence[str]) -> bool:
    return any(re.search(rf"^[ \t]*(?:(?:async\s+)?def|class)\s+{re.escape(n)}\b|^{re.escape(n)}\s*=", code, re.M) for n in names)


def _joined(blocks: Sequence[str], chosen: int) -> str:
    """A block with the imports, functions and classes of the others before it."""
    parts = [_definitions_only(block) for index, block in enumerate(blocks) if index != chosen]
    code = textwrap.dedent(blocks[chosen])
    names = {node.name for node in _body_of(code) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    kept = [ast.unparse(node) for part in parts for node in part if getattr(node, "name", "") not in names]
    return "\n".join([*kept, code]) if kept else code


def _definitions_only(block: str) -> list[ast.stmt]:
    wanted = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return [node for node in _body_of(textwrap.dedent(block)) if isinstance(node, wanted)]


def _body_of(code: str) -> list[ast.stmt]:
    tree = _parse(code)
    return tree.body if tree else []


def _parse(code: str) -> ast.Module | None:
    """The tree of a text that compiles; None otherwise. A return outside of a function parses but does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
            compile(code, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree


# ---------------------------------------------------------------------------------------------------------------------------
# From a piece to a program


def _definition(code: str, names: Sequence[str]) -> str | None:
    """A piece that defines what is asked for, without what is not code around it and without its examples; else None."""
    if not _mentions(code, names):
        return None
    for text in itertools.islice(_trimmed(code, names), MOST_ATTEMPTS if len(code) < 10_000 else 3):
        tree = _parse(text)
        if tree is not None and all(_defines(tree, name) for name in names):
            return _without_examples(text, tree, names)
    return None


def _trimmed(code: str, names: Sequence[str]) -> Iterator[str]:
    """A text; then without its first lines up to code; then without its last lines, one after the other, up to the definition."""
    dedented = textwrap.dedent(code)
    yield dedented
    yield dedented.expandtabs(4)
    lines = dedented.split("\n")
    starts = [index for index, line in enumerate(lines) if CODE_START.match(line)]
    first = next((index for index in starts if _mentions(lines[index], names)), 0)
    for start in dict.fromkeys([*starts[:20], first]):
        if start > first:
            break
        piece = textwrap.dedent("\n".join(lines[start:])).split("\n")
        yield "\n".join(piece)
        for end in range(len(piece) - 1, max(first - start + 1, len(piece) - MOST_TRIMMED_LINES), -1):
            # Cutting inside a block gives the same text with an error in another place, so only ends of blocks are tried.
            if piece[end].strip() and not piece[end][0].isspace():
                yield "\n".join(piece[:end])
    yield from _cut_within(lines[first:])


def _cut_within(lines: Sequence[str]) -> Iterator[str]:
    """A definition that stops in the middle: without its last lines, as long as something of its body is left."""
    for end in range(len(lines) - 1, max(1, len(lines) - MOST_TRIMMED_LINES), -1):
        yield "\n".join(lines[:end])


def _defines(tree: ast.Module, name: str) -> bool:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(goal, ast.Name) and goal.id == name for goal in node.targets):
            return True
    return False


def _without_examples(text: str, tree: ast.Module, names: Sequence[str]) -> str:
    """The same program without the asserts, the printing and the reading of input at its top level: examples, not the answer."""
    kept = [node for node in tree.body if not _is_example(node, names)]
    return text if len(kept) == len(tree.body) else ast.unparse(ast.Module(kept, []))


def _is_example(node: ast.stmt, names: Sequence[str]) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
        return False
    called = {
        call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
    }
    return bool(called & {"print", "input", "main", "testmod", *names})


def _body(stub: str, code: str) -> str | None:
    """The prompt with a body under it, its indentation repaired; None if no repair makes it compile."""
    if not code.strip():
        return None
    variants = list(_indented(code))
    for body in [*variants, *filter(None, map(_before_margin, variants))]:
        program = stub + body + "\n"
        tree = _parse(program)
        if tree is not None and _does_something(tree):
            return program
    return None


def _indented(code: str) -> Iterator[str]:
    """A body with its indentation as it is, of the first line repaired, of all lines anew."""
    lines = code.strip("\n").split("\n")
    plain = lines[0].lstrip()
    first_repaired = "\n".join(["    " + plain, *lines[1:]])
    anew = textwrap.indent(textwrap.dedent("\n".join(lines)), "    ")
    # The first line lost its indentation, of two spaces or eight: the next statement of its level shows how much it was.
    levels = sorted({len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()} - {0})
    shifted = [textwrap.indent(textwrap.dedent("\n".join([" " * level + plain, *lines[1:]])), "    ") for level in levels]
    as_it_is = ["\n".join(lines), anew, first_repaired]
    variants = [*(as_it_is if lines[0][:1].isspace() else [first_repaired, anew]), *shifted]
    for variant in variants:
        yield variant
        if "\t" in variant:
            yield textwrap.indent(textwrap.dedent(variant.expandtabs(4)), "    ")


def _before_margin(text: str) -> str | None:
    """A body without what stands after it at the margin: prose, examples. None if nothing does."""
    lines = text.split("\n")
    margin = next((index for index, line in enumerate(lines[1:], 1) if line and not line[0].isspace()), None)
    return None if margin is None else "\n".join(lines[:margin])


def _does_something(tree: ast.Module) -> bool:
    """Whether a function of the program has a statement besides its docstring and what it defines: the stub's has none."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    last = next((node for node in reversed(tree.body) if isinstance(node, ast.FunctionDef)), None)
    kept = [node for node in last.body if not isinstance(node, definitions)] if last else []
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in kept)


def _inner_imports(stub: str) -> str:
    """The imports that a prompt makes within its function, where an answer that repeats the signature loses them."""
    inner = [node for function in _body_of(stub) if isinstance(function, ast.FunctionDef) for node in function.body]
    return "".join(f"{ast.unparse(node)}\n" for node in inner if isinstance(node, ast.Import | ast.ImportFrom))


def _with_futures_first(head: str, code: str) -> str:
    """Head and code with the imports of __future__ before both, where the language wants them."""
    futures = "".join(dict.fromkeys(FUTURE.findall(code)))
    return futures + head + FUTURE.sub("", code) + ("" if code.endswith("\n") else "\n")
