"""Chat templates are programs that others wrote: they run in a sandbox that counts.

In: transformers' own environment for chat templates (sandboxed, immutable). Out: the same environment, in which every
loop, call, operator and filter is counted, and what would make a text or list of absurd size is refused before it is
made. A rendering that takes more than any real template does ends with Runaway; what one may take depends on its input
and not on a clock, so it is the same on every machine (the clock is asked only for what nobody foresaw).

    steps    a step is about what a loop of Jinja's takes for one turn: a third of a microsecond
    bytes    of all texts and lists that are made while rendering
    LARGEST  characters or entries of one text or list
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import update_wrapper
from typing import Any

from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

STEPS, STEPS_PER_CHARACTER, MOST_STEPS = 300_000, 100, 4_000_000
BYTES, BYTES_PER_CHARACTER = 400 << 20, 200
LARGEST, LARGEST_PER_CHARACTER = 16 << 20, 16
SECONDS, LOOK_EVERY = 4.0, 4096  # of the processor, and steps between two looks
CHARACTERS_A_STEP = 500  # that a step copies or searches
MOST_COUNT = 100_000  # as an argument: a width, an indent, a number of columns
MOST_BITS = 8192  # of a whole number
MOST_SOURCE = 1 << 18  # characters of a template; published ones have some 20,000
DEEPEST = 100  # levels of lists and objects
SHORT = 512  # characters of a text that is not looked at closely
LARGE = "texts and lists of some hundred million bytes"
SMALL = 64  # characters of a separator of JSON, or width of its indent


class Runaway(Exception):
    """A template that would go on without an end, or make more than any template does."""


class Counting:
    """What is laid over transformers' environment; see `counted.counted`."""

    left = steps = 0
    bytes_left = 0
    largest = LARGEST
    until = 0.0
    code_generator_class: type[CodeGenerator]
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def begin(self, characters: int) -> None:
        """A new rendering, of an input of so many characters."""
        self.left = self.steps = min(MOST_STEPS, STEPS + STEPS_PER_CHARACTER * characters)
        self.bytes_left = BYTES + BYTES_PER_CHARACTER * characters
        self.largest = LARGEST + LARGEST_PER_CHARACTER * characters
        self.until = time.thread_time() + SECONDS

    # ---- counting ----

    def tick(self) -> None:
        """One more block of the template is entered."""
        self.left -= 1
        if self.left < 0 or not self.left % LOOK_EVERY:
            self._look()

    def charge(self, size: int) -> None:
        """A text or list of that size is looked through."""
        self.left -= 1 + size // CHARACTERS_A_STEP
        if self.left < 0:
            self._look()

    def _look(self) -> None:
        if self.left < 0:
            raise Runaway(f"more than {self.steps:,} steps of loops and calls")
        if self.bytes_left < 0:
            raise Runaway(LARGE)
        if time.thread_time() > self.until:
            raise Runaway(f"more than {SECONDS:g} seconds")

    def refuse_above(self, size: int) -> None:
        """Raises Runaway where something of that size would be made."""
        if size > self.largest:
            raise Runaway(f"a text or list of {size:,} characters or entries")

    def made(self, value: object) -> Any:
        """A value that was just made: its bytes count, and so does every item of one that is made bit by bit."""
        if value.__class__ is str and len(value) < SHORT:
            self.bytes_left -= SHORT
            return value
        if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)):
            self.refuse_above(len(value))
            self.charge(len(value))
            if isinstance(value, tuple):
                self.weigh(value)  # it may become a key, whose hash goes through all of it
            self.bytes_left -= sys.getsizeof(value)
            if self.bytes_left < 0:
                raise Runaway(LARGE)
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise Runaway(f"a number of {value.bit_length():,} bits")
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self._each(value)
        return value

    def _each(self, values: Iterator[object]) -> Iterator[Any]:
        for value in values:
            self.charge(0)
            yield value

    def weigh(self, value: object) -> int:
        """Characters and entries of a value as it would be written out, whatever it holds more than once."""
        size = self._weight(value, {}, 0)
        self.refuse_above(size)
        self.charge(size)
        return size

    def _weight(self, value: object, known: dict[int, int], depth: int) -> int:
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, Mapping):
            inner: Iterable[Any] = (one for pair in value.items() for one in pair)
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        elif isinstance(value, Namespace):
            inner = (value._Namespace__attrs,)
        else:
            return value.bit_length() // 3 if isinstance(value, int) else 1
        if depth > DEEPEST:
            raise Runaway("lists nested too deeply")
        if id(value) not in known:
            self.charge(0)
            known[id(value)] = 2 + sum(1 + self._weight(one, known, depth + 1) for one in inner)
        return known[id(value)]

    # ---- what generated code calls ----

    def iterated(self, values: object) -> Any:
        """What a loop goes over."""
        if hasattr(values, "__len__"):
            self.charge(10 * len(values))
            return values
        return self._each(iter(values)) if isinstance(values, Iterator) else values

    def compared(self, value: object) -> Any:
        """What is looked at by a comparison."""
        if isinstance(value, str):
            if len(value) > SHORT:
                self.charge(len(value))
        elif isinstance(value, (list, tuple, Mapping)):
            self.weigh(value)
        return value

    def shown(self, value: object) -> str:
        """What is written out, as text."""
        if value.__class__ is str:
            return str(value)
        self.weigh(value)
        return str(self.made(str(value)))

    def joined(self, parts: Iterable[object]) -> str:
        """Jinja's `~`."""
        return self.concat([part if part.__class__ is str else self.shown(part) for part in parts])

    def concat(self, parts: Iterable[str]) -> str:
        """The pieces of a rendering, or of a macro's."""
        texts = list(parts)
        self.refuse_above(sum(map(len, texts)))
        text: str = self.made("".join(texts))
        return text

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> Any:
        """Operators whose result may be larger than what goes in."""
        if operator == "+" and left.__class__ is str and right.__class__ is str and len(left) + len(right) < SHORT:
            self.bytes_left -= SHORT
            return left + right
        if operator == "%" and isinstance(left, (str, bytes)):
            self._check_percent(left, right)
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MOST_BITS:
                raise Runaway("a number of more digits than anybody writes")
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.refuse_above(len(left) + len(right))
        return self.made(super().call_binop(context, operator, left, right))  # type: ignore[misc]  # mixed into an environment

    def _check_product(self, left: object, right: object) -> None:
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "__len__") and isinstance(other, int):
                self.refuse_above(len(one) * max(0, other))
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MOST_BITS:
            raise Runaway("a number of more digits than anybody writes")

    def _check_percent(self, text: Any, values: Any) -> None:
        """`text % values`: widths, and as many values as the text has places."""
        _check_widths(str(text))
        if "*" in str(text):
            self._check_counts(values if isinstance(values, tuple) else (values,))
        self.refuse_above(len(text) + str(text).count("%") * self._largest(values))

    def _largest(self, values: object) -> int:
        inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else (values,)
        return max((self.weigh(one) for one in inner), default=0)

    def _check_counts(self, values: Iterable[object]) -> None:
        """Whole numbers that a function takes for a width, an indent or a number of columns."""
        for value in values:
            if isinstance(value, int) and abs(value) > MOST_COUNT:
                raise Runaway(f"a width or count of {value:,}")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call of a function, a macro or a method."""
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            args = __self._check_method(owner, __obj.__name__, args)
        elif isinstance(owner, int):
            __self._check_counts((*args, *kwargs.values()))
        elif isinstance(owner, (list, tuple)):
            __self.weigh(owner)
        elif isinstance(owner, Mapping):
            __self.charge(len(owner))
        elif isinstance(__obj, LoopContext):
            args = tuple(__self.iterated(value) for value in args)
        return __self.made(super().call(__context, __obj, *args, **kwargs))  # type: ignore[misc]  # mixed into an environment

    def _check_method(self, text: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A method of a text: what it would give may not be too large. Returns its arguments, iterators as lists."""
        self.charge(len(text))
        if name == "join" and args:
            args = (self._listed(args[0]), *args[1:])
            self.refuse_above(self._weight(args[0], {}, 0) + len(text) * len(args[0]))
        elif name == "replace" and len(args) > 1:
            self._check_replace(text, *args[:2])
        elif name == "translate" and args:
            longest = (
                max(map(len, filter(_is_text, args[0].values())), default=1) if isinstance(args[0], Mapping) else 1
            )
            self.refuse_above(len(text) * longest)
        elif name == "expandtabs":
            self.refuse_above(text.count("\t" if isinstance(text, str) else b"\t") * (args[0] if args else 8))
        self._check_counts(args)
        return args

    def _listed(self, values: Any) -> list[Any]:
        return list(values if hasattr(values, "__len__") else self._each(iter(values)))

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        if _is_text(old) and _is_text(new) and type(old) is type(text):
            self.refuse_above(len(text) + text.count(old) * len(new))

    def wrap_str_format(self, value: Any) -> Any:
        """`text.format`: its widths, and its values as often as it has places."""
        inner = super().wrap_str_format(value)  # type: ignore[misc]  # mixed into an environment
        if inner is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> Any:
            text = str(value.__self__)
            _check_widths(text)
            self._check_counts((*args, *kwargs.values()) if re.search(r":[^}]*\{", text) else ())
            largest = max((self.weigh(one) for one in (*args, *kwargs.values())), default=0)
            self.refuse_above(len(text) + text.count("{") * largest)
            return inner(*args, **kwargs)

        return update_wrapper(formatted, value)

    # ---- filters and tests ----

    def around(self, name: str, function: Callable[..., object], *, test: bool = False) -> Callable[..., object]:
        """A filter or test that counts, and looks at its arguments before it does anything."""
        skipped = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
        guard = GUARDS.get(name)
        structural = name in STRUCTURAL

        def wrapper(*args: object, **kwargs: object) -> Any:
            given = args[skipped:]
            if given:
                value = given[0]
                if isinstance(value, (str, bytes)):
                    if len(value) > SHORT:
                        self.charge(len(value))
                elif structural:
                    self.charge(10 * len(value) if hasattr(value, "__len__") else 0)
                elif name in COMPARES and isinstance(value, Iterator):
                    value = self._listed(value)
                    self.weigh(value)
                    args = (*args[:skipped], value, *args[skipped + 1 :])
                elif not isinstance(value, Iterator):
                    self.weigh(value)
                for other in given[1:] if test else ():
                    self.compared(other)
                if name in COUNTED:
                    self._check_counts((*given[1:], *kwargs.values()))
                if guard is not None:
                    args = (*args[:skipped], *guard(self, *given, **kwargs), *args[skipped + 1 :])
            return self.made(function(*args, **kwargs))

        return update_wrapper(wrapper, function)


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes))


def _check_widths(text: str) -> None:
    """Raises Runaway for a format with a width or precision of six digits or more."""
    if found := re.search(r"\d{6,}", text):
        raise Runaway(f"a width of {found[0][:12]}")


# ---- what single filters could be made to do; each returns its (possibly listed) value ----


def _of_join(env: Counting, value: object, d: object = "", *rest: object, **more: object) -> tuple[object]:
    listed = value if isinstance(value, str) else env._listed(value)
    env.refuse_above(env._weight(listed, {}, 0) + env.weigh(d) * len(listed))
    return (listed,)


def _of_replace(
    env: Counting, value: object, old: object = "", new: object = "", *rest: object, **more: object
) -> tuple[object]:
    env._check_replace(str(value), str(old), str(more.get("new", new)))
    return (value,)


def _of_indent(env: Counting, value: Any, width: Any = 4, *rest: Any, **more: Any) -> tuple[Any]:
    width = more.get("width", width)
    env._check_counts((width,))
    env.refuse_above((str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    return (value,)


def _of_wordwrap(env: Counting, value: object, *rest: object, **more: object) -> tuple[object]:
    wrap = more.get("wrapstring") or (rest[2] if len(rest) > 2 else "\n")
    env.refuse_above(len(str(value)) * max(1, len(str(wrap or ""))))
    return (value,)


def _of_format(env: Counting, value: object, *rest: object, **more: object) -> tuple[object]:
    env._check_percent(str(value), more or rest)
    return (value,)


def _of_tojson(env: Counting, value: object, *rest: Any, **more: Any) -> tuple[object]:
    indent, separators = (*rest[1:3], None, None)[:2]
    for one in (more.get("indent", indent), *(more.get("separators", separators) or ())):
        if (isinstance(one, int) and one > SMALL) or (isinstance(one, str) and len(one) > SMALL):
            raise Runaway("JSON with an indent or separators of absurd size")
    return (value,)


def _of_sum(env: Counting, value: object, attribute: object = None, start: object = 0, **more: object) -> tuple[object]:
    if not isinstance(more.get("start", start), (int, float)):
        raise Runaway("a sum of lists")
    return (env._listed(value),)


GUARDS: dict[str, Callable[..., tuple[object]]] = {
    "join": _of_join, "replace": _of_replace, "indent": _of_indent, "wordwrap": _of_wordwrap, "format": _of_format,
    "tojson": _of_tojson, "sum": _of_sum,
}  # fmt: skip
COUNTED = {"center", "batch", "slice", "truncate", "wordwrap", "round", "indent", "urlize"}
COMPARES = {"groupby", "max", "min", "sort", "unique"}  # entries with each other, which may be lists
STRUCTURAL = {  # look at a list's entries one by one, and write none of them out
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map",
    "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sum",
    "boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable", "lower",
    "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined",
}  # fmt: skip
WRITES = {"string", "lower"}  # names of tests above that are filters, too, and do write their value out
