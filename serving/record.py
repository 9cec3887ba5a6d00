"""What each line of a model's source computed: the forward pass runs under sys.settrace, and the file stays as it is.

    recording = record(gpt2, lambda: gpt2.generate(ids, params, n_head, 1), block=0)
    recording.records[0]        # Record(line=332, call=0, values={"inputs": ..., "params": ..., ...})

Python calls a trace function before each line of a function and at each return. So what a line has assigned is known
when the next line begins: the names on the left of its `=`, whose values are then in the frame's variables. What a line
returns comes with the return. sys.settrace watches one thread, so the other threads of a server are not slowed down.

All blocks of a model run the same lines, so one of them is recorded; of the others only what enters and what leaves.
"""

import ast
import functools
import sys
from typing import Any, NamedTuple

RETURNED, CONDITION = "returned value", "condition"  # for values that have no name


class Call(NamedTuple):
    """A call of a function of the file. `parent` is the Call that it comes from (its place in the list, or None);
    `line` and `text` say where; `block` is the number of the block that it belongs to, or None."""

    function: str
    parent: int | None
    line: int | None
    text: str
    block: int | None


class Record(NamedTuple):
    """What a statement that begins at `line` made, {name: value}, in a Call (its place in the list). What the line of
    a `def` made are the arguments."""

    line: int
    call: int
    values: dict


class Recording(NamedTuple):
    calls: list
    records: list
    result: Any


def record(module, run, block=0):
    """The Recording of `run()`, of all lines of the module's functions, but of its blocks only number `block`."""
    recorder, before = Recorder(source(module.__file__), block), sys.gettrace()
    sys.settrace(recorder.enter)
    try:
        result = run()
    finally:
        sys.settrace(before)
    return Recording(recorder.calls, recorder.records, result)


class Recorder:
    """The trace functions. `running` has a frame's Call and the statement that it is at."""

    def __init__(self, source, block):
        self.source, self.block = source, block
        self.calls, self.records, self.running, self.n_blocks, self.skipped = [], [], {}, 0, None

    def enter(self, frame, event, arg):
        """Python's call of a function: returns who follows its lines, or None."""
        code = frame.f_code
        if self.skipped or code.co_filename != self.source.file or code.co_name not in self.source.functions:
            return None
        parent, line, text = self.caller(frame)
        block = None if parent is None else self.calls[parent].block
        if code.co_name == "transformer_block":
            block, self.n_blocks = self.n_blocks, self.n_blocks + 1
            if block != self.block:
                self.skipped = frame
                return self.leave_skipped
        self.running[frame] = (len(self.calls), None)
        self.calls.append(Call(code.co_name, parent, line, text, block))
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.note(self.source.functions[code.co_name], frame, {name: frame.f_locals[name] for name in names})
        return self.follow

    def leave_skipped(self, frame, event, arg):
        if event == "return":
            self.skipped = None
        return self.leave_skipped

    def follow(self, frame, event, arg):
        """Before a line, and at a return: the statement before has ended."""
        call, statement = self.running[frame]
        if event == "line":
            following = self.source.statements.get(frame.f_lineno)
            if following is not statement:
                self.finish(frame, statement, following)
                self.running[frame] = call, following
        elif event == "return":
            if isinstance(statement, ast.Return):
                self.note(statement.lineno, frame, {RETURNED: arg})
            else:
                self.finish(frame, statement, None)
            del self.running[frame]
        return self.follow

    def finish(self, frame, statement, following):
        """Notes what a statement has made, when it is known which statement follows."""
        if statement is None:
            return
        inside = following is not None and following.lineno in range(statement.lineno + 1, statement.end_lineno + 1)
        if isinstance(statement, ast.For) and not inside:
            return  # the loop has ended
        found = {name: frame.f_locals[name] for name in assigned(statement) if name in frame.f_locals}
        if isinstance(statement, ast.If):
            found[CONDITION] = inside
        self.note(statement.lineno, frame, found)

    def note(self, line, frame, values):
        values = {name: [*value] if isinstance(value, list) else value for name, value in values.items()}
        self.records.append(Record(line, self.running[frame][0], values))

    def caller(self, frame):
        """(the Call, its line, the text of the call expression) from which a frame was called. The frames in between
        are those of decorators and of generator expressions."""
        back = frame.f_back
        while back is not None and back.f_code.co_filename != self.source.file:
            back = back.f_back
        if back is None:
            return None, None, ""
        place, place_line = [*back.f_code.co_positions()][back.f_lasti // 2], back.f_lineno
        while back is not None and back not in self.running:
            back = back.f_back
        return (None if back is None else self.running[back][0]), place_line, self.source.text(*place)


# ---- The source ----


class Source:
    """The lines of a file, the functions in it and the statement at each line."""

    def __init__(self, file):
        with open(file, encoding="utf-8") as opened:
            self.code = opened.read()
        self.file, self.lines, tree = file, self.code.splitlines(), ast.parse(self.code)
        nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.functions = {node.name: node.lineno for node in nodes}
        self.docs = {node.name: ast.get_docstring(node) or "" for node in nodes}
        self.statements, self.function_of = {}, {}
        for node in nodes:
            self.function_of |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), node.name)
            for statement in ast.walk(node):  # the outer ones come first, so that an inner one has the last word
                if isinstance(statement, ast.stmt) and statement is not node:
                    self.statements |= dict.fromkeys(range(statement.lineno, statement.end_lineno + 1), statement)

    def text(self, line, end_line, column, end_column):
        """The part of the source between two places, on one line; columns count bytes."""
        if line is None or line != end_line:
            return "" if line is None else " ".join(self.lines[line - 1].split())
        return self.lines[line - 1].encode()[column:end_column].decode()

    def why(self, line):
        """The reason for a line, in the words of the source: the comments above it and at its end, else the first
        sentence of the function's docstring."""
        above, statement = [], self.statements.get(line)
        for text in reversed(self.lines[: line - 1]):
            if not text.strip().startswith("#"):
                break
            above.insert(0, text.strip("# "))
        own = self.comment(statement.end_lineno if isinstance(statement, ast.Assign | ast.Return) else line)
        own = "" if "->" in own else own  # shapes, which are shown beside the values
        return " ".join(filter(None, [*above, own])) or first_sentence(self.docs.get(self.function_of.get(line), ""))

    def comment(self, line):
        """The comment at the end of a line."""
        return self.lines[line - 1].partition("  # ")[2]


@functools.lru_cache
def source(file):
    return Source(file)


def first_sentence(text):
    """Up to the first full stop that is not inside parentheses."""
    text, depth = " ".join(text.partition("\n\n")[0].split()), 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "." and depth == 0 and text[i + 1 : i + 2] in (" ", ""):
            return text[: i + 1]
    return text


def assigned(statement):
    """The names that a statement assigns, those changed by a method (`ids.append(...)`) and by `:=` included."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    nodes = [node for target in targets if target is not None for node in ast.walk(target)]
    head = [getattr(statement, field, None) for field in ("test", "value", "iter")]
    nodes += [n.target for part in head if part is not None for n in ast.walk(part) if isinstance(n, ast.NamedExpr)]
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name() as name))):
            nodes.append(name)
    return [node.id for node in nodes if isinstance(node, ast.Name)]
