"""A chat template compiled so that it counts: what its generated code does goes through `sandbox.Counting`.

In: transformers' environment and a template's text. Out: a template that renders as before, within limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Environment, Template

from fitune.data.templates.sandbox import MOST_SOURCE, WRITES, Counting, Runaway


class Unsure(Exception):
    """A template whose prompts are not its own text's alone: what is trained would not be what is served."""


READS_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class _Code(CodeGenerator):
    """Generated code that counts."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.shown(")

    def _around(self, name: str, visit: Callable[..., object], node: object, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._around("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._around("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._around("made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._around("made", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        operator = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in"}.get(node.op)
        self.write(f" {operator or 'not in'} ")
        if isinstance(node.expr, nodes.Const):
            self.visit(node.expr, frame)
        else:
            self._around("compared", self.visit, node.expr, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")


def counted(environment: Environment, source: str) -> Template:
    """A template that counts what it does.

    Args:
        environment: transformers' own, made for this template.
        source: its text.

    Raises:
        Runaway: the text is longer than any template's.
        Unsure: it reads other files, or draws at random.
        jinja2.TemplateError: it is no Jinja.
    """
    if len(source) > MOST_SOURCE:
        raise Runaway(f"a text of {len(source):,} characters, of {MOST_SOURCE:,} at most")
    made = _counting(environment, source)
    return Template.from_code(made, _code(environment, source), made.make_globals(None))


def _counting(environment: Environment, source: str) -> Any:
    """The environment, with counting laid over it."""
    made: Any = environment.overlay()
    made.__class__ = type("CountedEnvironment", (Counting, type(environment)), {"code_generator_class": _Code})
    made.filters = {
        name: made.around(name if name not in WRITES else "", f)
        for name, f in environment.filters.items()
        if name not in ("urlize",)
    }
    made.filters["_iterated"] = made.iterated
    made.tests = {name: made.around(name, function, test=True) for name, function in environment.tests.items()}
    made.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    made.begin(len(source))
    return made


@lru_cache(maxsize=64)
def _code(environment: Environment, source: str) -> CodeType:
    """What a template is compiled to: a run lays the same one over its rows, its checks and what it hands over."""
    made = _counting(environment, source)
    tree = made._parse(source, None, None)
    if (reads := tree.find(READS_FILES)) is not None:
        raise Unsure(
            f"reads another file, and a tokenizer has none ({type(reads).__name__.lower()}, line {reads.lineno})"
        )
    if any(one.name == "random" for one in tree.find_all(nodes.Filter)):
        raise Unsure("draws at random (its filter random)")
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_iterated", [], [], None, None, lineno=loop.lineno, environment=made)
    code: CodeType = made.compile(tree)
    return code
