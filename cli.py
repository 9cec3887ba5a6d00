"""Command-line manners, the same for every program here. `fire` makes the flags from a function's signature; this adds
what it lacks: texts stay texts ("2019", "None", "C# is"), types are checked, help is short, a mistake gets one line.

Exit status: 0 done; 1 the world failed (network, disk, a damaged file); 2 the user's mistake; 130 Ctrl-C.
"""

import atexit
import difflib
import functools
import gc
import inspect
import json
import os
import sys


def run(main, program):
    """Runs `main` (a function, or {name: function}) on this process's arguments, and ends the process.

    Each parameter is annotated str, int, float, bool, or list: a flag that may be given many times. The docstring has a
    line for each below "Args:". main raises ValueError for a mistake, OSError for a failure.
    """
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for a stream that was closed: print would take None for stdout
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows would choose otherwise, and stop at an emoji
    # A vocabulary is 50,000 objects, JAX as many: Python would look through them for garbage again and again, and once
    # more at the end, for a tenth of the time to a first token.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    try:
        status = call(main, program, sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except MemoryError as error:
        print(one_line(f"not enough memory: {error}"), file=sys.stderr)
        status = 1
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)


def call(main, program, arguments):
    """Shows help, or has fire call main. Returns 0."""
    import fire

    if "--" in arguments:
        raise ValueError("-- is not needed: a prompt that begins with - is given as --prompt=-...")
    if isinstance(main, dict):
        command, *arguments = arguments or [""]
        if command not in main and command not in ("-h", "--help"):
            raise ValueError(f"which command? There is {', '.join(main)}; --help says more")
        main, program = main.get(command, main), f"{program} {command}"
    if isinstance(main, dict) or {"-h", "--help"} & set(arguments):
        print(help_text(main, program))
        return 0
    # Arguments after "--" are fire's own: "-" is to be no separator but a file name, stdin.
    fire.Fire(strict(main), command=[*gather(main, arguments), "--", "--separator", "\0"], name=program)
    return 0


def stdin_is_piped():
    """Whether stdin is a pipe or a file, as in `echo text | program`."""
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def help_text(main, program):
    if isinstance(main, dict):
        return "\n".join(
            f"{program.split()[0]} {name}: {inspect.getdoc(f).splitlines()[0]}" for name, f in main.items()
        )
    parameters = inspect.signature(main).parameters
    summary, _, flags = inspect.getdoc(main).partition("Args:\n")
    positional = [f"[{p.name.upper()}]" for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    lines = [f"python {program} {' '.join(positional)} [--flag value ...]", "", summary.rstrip(), ""]
    for name, text in (line.strip().split(": ", 1) for line in flags.splitlines()):
        default = parameters[name].default
        lines.append(
            f"  --{name} {'' if default in ('', None, ()) or default is False else default}".ljust(28) + f" {text}"
        )
    return "\n".join(lines)


def one_line(error):
    named = isinstance(error, OSError) and error.filename is not None
    return " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())


def gather(main, arguments):
    """The arguments, with all values of a flag that is a list in one JSON list: fire would keep the last. Raises
    ValueError for a flag that main does not have, or that lacks a value: fire would take it for "True"."""
    parameters = inspect.signature(main).parameters
    lists, others, words = {}, [], [*arguments]
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        kind = kind_of(parameters.get(name))
        if not flag.startswith("--"):
            kind = bool  # no flag, or one with a single dash: for fire to see to
        elif kind is None and kind_of(parameters.get(name.removeprefix("no"))) is not bool:
            raise ValueError(f"unknown flag {flag}: {guess(name, parameters)}--help lists them all")
        if kind in (None, bool) or equals:
            others.append(word)
        elif not words or words[0].startswith("--"):
            raise ValueError(f"{flag} needs a value; one that begins with -- is given as {flag}=--...")
        else:
            value = words.pop(0)
            others += [f"{flag}={value}"]
        if kind is list:
            others.pop()
            lists.setdefault(name, []).append(value)
    return others + [f"--{name}={json.dumps(values)}" for name, values in lists.items()]


def kind_of(parameter):
    """What a parameter is annotated with; of `int | None`, where None is for a flag that is left out, int."""
    return parameter and getattr(parameter.annotation, "__args__", [parameter.annotation])[0]


def guess(flag, parameters):
    longer = [name for name in parameters if flag and name.startswith(flag)]
    nearest = (longer or difflib.get_close_matches(flag, parameters, 1, 0.5))[:1]
    return "".join(f"did you mean --{name}? " for name in nearest)


def strict(main):
    """`main` for fire: each argument converted as annotated; one too many or a flag unknown is a ValueError."""
    from fire.decorators import SetParseFn, SetParseFns

    parameters = inspect.signature(main).parameters
    by_position = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(main)
    def command(*args, **flags):
        if surplus := args[len(by_position) :]:
            raise ValueError(f"{surplus[0]!r} is one argument too many: give one text, in quotes if it has spaces")
        for flag in flags.keys() - parameters.keys():  # given with a single dash
            raise ValueError(f"unknown flag -{flag}: {guess(flag, parameters)}--help lists them all")
        return main(*args, **flags)

    surplus = inspect.Parameter("surplus", inspect.Parameter.VAR_POSITIONAL)
    unknown = inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)
    command.__signature__ = inspect.Signature([*by_position, surplus, *by_name, unknown])
    converters = {name: functools.partial(convert, name, kind_of(p)) for name, p in parameters.items()}
    return SetParseFns(**converters)(SetParseFn(str)(command))


def convert(name, kind, text):
    """The value of --name: a str, int (none here has a use for one below 0), float, bool or list; else ValueError."""
    parse = {bool: {"True": True, "False": False}.__getitem__, list: json.loads}.get(kind, kind)
    try:
        value = parse(text)
    except (ValueError, KeyError):
        value = None
    if value is None or (kind is int and value < 0):
        wanted = {int: "a whole number, 0 or more", float: "a number", bool: "True or False"}[kind]
        raise ValueError(f"--{name} must be {wanted}, not {text!r}")
    return value
