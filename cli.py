"""Command-line manners, the same for every program here. `fire` makes the flags from a function's signature; this adds
what it lacks: texts stay texts ("2019", "None", "C# is"), types are checked, and a mistake gets one line.

Exit status: 0 done; 1 the world failed (network, disk, a damaged file); 2 the user's mistake; 130 Ctrl-C.
"""

import difflib
import functools
import inspect
import os
import sys


def run(main, program):
    """Runs `main` (a function, or {name: function}) on this process's arguments, and ends the process.

    Each parameter is annotated str, int, float or bool. main raises ValueError for a mistake, OSError for a failure.
    """
    import fire

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows would choose otherwise, and stop at an emoji
    try:
        commands = main if isinstance(main, dict) else {}
        arguments = check_arguments(sys.argv[1:], commands)
        if {"-h", "--help"} & set(arguments):
            fire.Fire(main, command=[*(a for a in arguments[:1] if a in commands), "--", "--help"], name=program)
        component = {name: strict(f) for name, f in commands.items()} or strict(main)
        # Arguments after "--" are fire's own: "-" is to be no separator but a file name, stdin.
        fire.Fire(component, command=[*arguments, "--", "--separator", "\0"], name=program)
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)


def one_line(error):
    named = isinstance(error, OSError) and error.filename is not None
    return " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())


def check_arguments(arguments, commands):
    """The arguments, if they begin with one of `commands` where there are any. fire would take several lines to say."""
    if "--" in arguments:
        raise ValueError("-- is not needed: a prompt that begins with - is given as --prompt=-...")
    if commands and not (arguments and arguments[0] in {*commands, "-h", "--help"}):
        raise ValueError(f"which command? There is {', '.join(commands)}; --help says more")
    return arguments


def strict(main):
    """`main` for fire: each argument converted as annotated; one too many or a flag unknown is a ValueError."""
    from fire.decorators import SetParseFn, SetParseFns

    parameters = inspect.signature(main).parameters
    by_position = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(main)
    def command(*args, **flags):
        if surplus := args[len(by_position) :]:
            raise ValueError(f"{surplus[0]!r} is one argument too many: a text with spaces needs quotes around it")
        for flag in flags.keys() - parameters.keys():
            nearest = "".join(
                f"did you mean --{name}? " for name in difflib.get_close_matches(flag, parameters, 1, 0.5)
            )
            raise ValueError(f"unknown flag --{flag}: {nearest}--help lists them all")
        return main(*args, **flags)

    surplus = inspect.Parameter("surplus", inspect.Parameter.VAR_POSITIONAL)
    unknown = inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)
    command.__signature__ = inspect.Signature([*by_position, surplus, *by_name, unknown])
    converters = {name: functools.partial(convert, name, p.annotation) for name, p in parameters.items()}
    return SetParseFns(**converters)(SetParseFn(str)(command))


def convert(name, kind, text):
    """The value of --name, a str, int (no flag here has a use for one below 0), float or bool; else ValueError."""
    if kind is bool and text in ("True", "False"):
        return text == "True"
    try:
        value = kind(text) if kind is not bool else {}[text]
    except (ValueError, KeyError):
        value = None
    if value is None or (kind is int and value < 0):
        wanted = {int: "a whole number, 0 or more", float: "a number", bool: "True or False"}[kind]
        raise ValueError(f"--{name} must be {wanted}, not {text!r}")
    return value
