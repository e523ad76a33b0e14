"""The command line: a thin door over the Python functions. Nothing here loads torch before a verb needs it.

Flags are made from the fields of RunConfig (flags.py). Errors are one message on standard error and exit code 2 (130
after Ctrl-C); a result for programs is one JSON object on standard output (`--json`).
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from cyclopts import App, ArgumentCollection
from cyclopts.exceptions import CycloptsError

from fitune.cli import help as helppage
from fitune.cli import last_catch as lastcatch
from fitune.cli import look, models, plan, train, use
from fitune.cli.flags import QUANT, whole_numbers
from fitune.core import names, quiet
from fitune.core.errors import FituneError
from fitune.data import readers
from fitune.views import screen


class Verbs(App):
    """Verbs whose options have their texts from the settings' fields, and none from a docstring: to look for some,
    cyclopts reads the source of pydantic's models once for each group of settings, two thirds of what `--help` took."""

    def assemble_argument_collection(self, *, parse_docstring: bool = False, **how: Any) -> ArgumentCollection:
        """See App."""
        return super().assemble_argument_collection(**how)


app = Verbs(
    name="fitune",
    help="Fine-tune open large language models on the hardware that you have.",
    version_flags=["--version"],
    help_flags=["--help", "-h", helppage.ALL],
    help_format="plaintext",
    help_formatter=helppage.Help(),
    suppress_keyboard_interrupt=False,
    config=[whole_numbers],
)
app.register_install_completion_command(help="Let the shell complete verbs and flags; prints what it writes.")
for verb in (
    train.demo, train.train, look.inspect, look.template, use.chat, use.serve, use.ui, models.merge, models.reseal,
    models.download, models.convert, models.export, models.quantize, plan.plan, look.doctor, look.methods,
):  # fmt: skip
    app.command(verb)
app.command(use.evaluate, name="eval")
app.command(models.convert_config, name="convert-config")


def own_options(verb: str) -> set[str]:
    """The names of a verb's options, but for the settings of a run."""
    command = app[verb].default_command if verb and verb in app else None
    if command is None or not command.__module__.startswith("fitune."):
        return set()
    found: set[str] = set()
    for name, kind in get_type_hints(command).items():
        group = next((one for one in get_args(kind) or (kind,) if is_dataclass(one)), None)
        found |= {field.name for field in fields(group)} if group is not None else {name}
    return found - {"return"}


def main() -> None:
    """The `fitune` command."""
    quiet.for_good()
    screen.guard()
    try:
        arguments = sys.argv[1:]
        verb = arguments[0] if arguments else ""
        app(names.flags(arguments, verb, own_options(verb)), exit_on_error=False, print_error=False)
    except FituneError as error:
        _fail(str(error), error.exit_code)
    except CycloptsError as error:
        if readers.STREAM in sys.argv[1:]:  # no option has this value
            _fail(str(readers.from_a_stream()), 2)
        verb = next((word for word in sys.argv[1:2] if word in app), "")
        _fail(f"{_one_line(error)}\n  fix:      fitune {verb}{' ' if verb else ''}--help", 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:  # none of ours: a defect, reported with what it takes to find it
        _fail(lastcatch.report(error, sys.argv[1:]), 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust: it is no Exception
            raise
        _fail(lastcatch.report(RuntimeError(str(error)), sys.argv[1:]), 1)
    finally:
        if text := screen.lost():
            sys.stderr.write(f"{text}\n")


def _one_line(error: CycloptsError) -> str:
    """The error in one line; of pydantic's own text, only what is wrong."""
    text = " ".join(str(error).split()).replace(f"{QUANT}name", "quant").replace(QUANT, "quant.")
    found = re.search(r"nullable\[\w+\] (\S+) (.*?) \[type=\w+, input_value=(.*?), input_type", text)
    name = found[1].replace(".constrained-int", "") if found else ""
    if missing := re.search(r"parameter (--\S+) requires an argument\.?$", text, re.IGNORECASE):
        return f"{missing[1]} is needed"
    return f"--{name}: {found[2]}, received {found[3]}" if found else text


def _fail(text: str, code: int) -> None:
    label = "" if code == 130 else "error: "
    sys.stderr.write(screen.visible(f"{label}{text}\n"))
    raise SystemExit(code)
