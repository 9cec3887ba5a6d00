"""The command line, the same for every program here. `fire` makes flags from a signature. This file adds what
fire lacks: texts stay texts ("2019", "None", "C# is"), types are checked, help is short, a mistake gets one line.

Exit status: 0 success; 1 a failure of the world (network, disk, a damaged file); 2 a mistake of the user's; 130 Ctrl-C.
"""

import atexit
import contextlib
import functools
import gc
import inspect
import json
import os
import signal
import stat
import sys
import threading

BOOLEANS = {"true": True, "false": False}


def leave_on_ctrl_c():
    """Makes Ctrl-C end this process at once with status 130. A program calls it first, before slow imports.

    Python's own answer, a KeyboardInterrupt, may arrive inside JAX, which then crashes, or be lost in a callback. And
    it waits while compiled code runs, which takes seconds for a large model; the thread here does not.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # SIGINT is ignored, as in a shell script's background job
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # Python writes a byte here as soon as the signal comes
    signal.signal(signal.SIGINT, leave)
    threading.Thread(target=lambda: leave(os.read(reading, 1)), daemon=True).start()


def leave(*_):
    """Ends the process with status 130, without the exit handlers of libraries: JAX's may crash in the middle of work.
    All that was printed is written out first."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the stream is closed, or Ctrl-C came while it was being written
            stream.flush()
    os._exit(130)


def unwind_on_ctrl_c():
    """Makes Ctrl-C raise KeyboardInterrupt again, so that temporary files are removed. For programs without JAX."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def noticing_ctrl_c():
    """Yields a list that is empty until Ctrl-C, which in this block does nothing else; a second Ctrl-C ends the
    process. For work that is done in steps and looks at the list after each."""
    pressed, before = [], signal.getsignal(signal.SIGINT)
    wakeup = signal.set_wakeup_fd(-1)  # else the thread of leave_on_ctrl_c would end the process
    signal.signal(signal.SIGINT, lambda *_: leave() if pressed else pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)


def run(main, program):
    """Runs `main`, a function or {command: function}, with this process's arguments, and ends the process.

    Each parameter is annotated str, int, float, bool, or list (a flag that may be given several times). The docstring
    has a line for each of them below "Args:". main raises ValueError for a mistake, OSError for a failure.
    """
    prepare_streams()
    collect_garbage_rarely()
    try:
        call(main, program, sys.argv[1:])
        print(end="", flush=True)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the program that reads our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError, MemoryError) as error:
        print("not enough memory: " * isinstance(error, MemoryError) + one_line(error), file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)


def prepare_streams():
    """UTF-8 on stdout and stderr: Windows would choose otherwise, and fail at an emoji. A closed stream is replaced."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, open as long as the process; print would take None for stdout
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")


def stdin_is_piped():
    """Whether stdin is a pipe or a file, as in `echo text | program`."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by an object
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def collect_garbage_rarely():
    """For speed only: a vocabulary is 50,000 objects, and JAX has as many. By default Python searches all of them for
    garbage several times, and once more at the end, which takes a tenth of the time to a first token."""
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def check(rules):
    """Raises ValueError for the first broken one of `rules`, pairs (whether it is broken, the message)."""
    for is_broken, message in rules:
        if is_broken:
            raise ValueError(message)


def one_line(error):
    named = isinstance(error, OSError) and error.filename is not None
    return " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())


def call(main, program, arguments):
    """Prints help, or has fire call main. Raises ValueError for arguments that main does not take."""
    import fire
    from fire.decorators import SetParseFns

    if "--" in arguments:
        raise ValueError("-- is not needed: a prompt that begins with - is given as --prompt=-...")
    if isinstance(main, dict):
        command, *arguments = arguments or [""]
        if command not in main and command not in ("-h", "--help"):
            raise ValueError(f"unknown command {command!r}: choose {' or '.join(main)}; --help explains them")
        main, program = main.get(command, main), f"{program} {command}"
    if isinstance(main, dict) or {"-h", "--help"} & set(arguments):
        print(help_text(main, program))
        return
    parameters = inspect.signature(main).parameters
    converters = {name: functools.partial(convert, name, kind_of(p)) for name, p in parameters.items()}
    words = normalize(parameters, arguments)
    # Words after "--" are fire's own: "-" is not to be a separator but a file name, stdin.
    fire.Fire(SetParseFns(**converters)(main), command=[*words, "--", "--separator", "\0"], name=program)


def help_text(main, program):
    """Summary, usage and a line for each flag of a function, from its docstring and signature; of {command: function} a
    line for each command."""
    if sys.flags.optimize > 1:
        raise ValueError("--help is made from docstrings, which python -OO removes: leave out -OO")
    if isinstance(main, dict):
        return "\n".join(f"{program.split()[0]} {name}: {f.__doc__.splitlines()[0]}" for name, f in main.items())
    parameters = inspect.signature(main).parameters
    summary, _, flags = (inspect.getdoc(main) or "").partition("Args:\n")
    texts = dict(line.strip().split(": ", 1) for line in flags.splitlines())
    usage = "".join(f"[{p.name.upper()}] " for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    lines = [f"python {program} {usage}[--flag value ...]", "", summary.rstrip(), ""]
    for name, parameter in parameters.items():
        default = parameter.default
        shown = "" if default in ("", None, ()) or default is False else default
        lines.append(f"  --{name} {shown}".ljust(28) + f" {texts.get(name, '')}")
    return "\n".join(lines)


def normalize(parameters, arguments):
    """The arguments in the form that fire understands: texts, then each flag as --name=value, a list as JSON.

    By itself fire takes the word after a boolean flag for its value, and keeps only the last of several values. Raises
    ValueError for an unknown flag, a flag without a value, or one text too many.
    """
    texts, flags, words = [], {}, [*arguments]
    while words:
        word = words.pop(0)
        if word == "-" or not word.startswith("-"):
            texts.append(word)
            continue
        name, value = read_flag(word, words, parameters)
        flags[name] = [*flags.get(name, []), value] if kind_of(parameters[name]) is list else value
    by_position = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in flags]
    for surplus in texts[len(by_position) :]:
        raise ValueError(f"{surplus!r} is one argument too many: give one text, in quotes if it has spaces")
    return texts + [f"--{name}={json.dumps(v) if isinstance(v, list) else v}" for name, v in flags.items()]


def read_flag(word, words, parameters):
    """(name, value) of the flag `word`, both str. If the value is the next of `words`, it is removed from them."""
    flag, equals, value = word.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    positive = name.removeprefix("no")
    if name not in parameters and kind_of(parameters.get(positive)) is bool and not equals:
        return positive, "False"  # --nojson
    if not flag.startswith("--") or name not in parameters:
        raise ValueError(f"unknown flag {flag}: {guess(name, parameters)}--help lists them all")
    if equals:
        return name, value
    if kind_of(parameters[name]) is bool:
        return name, words.pop(0) if words and words[0].lower() in BOOLEANS else "True"
    if not words or words[0].startswith("--"):
        raise ValueError(f"{flag} needs a value; one that begins with -- is given as {flag}=--...")
    return name, words.pop(0)


def guess(flag, parameters):
    import difflib  # here, as only mistakes need it

    longer = [name for name in parameters if flag and name.startswith(flag)]
    nearest = (longer or difflib.get_close_matches(flag, parameters, 1, 0.5))[:1]
    return "".join(f"did you mean --{name}? " for name in nearest)


def kind_of(parameter):
    """The type that a parameter is annotated with; of `int | None`, where None means that the flag is left out, int."""
    return parameter and getattr(parameter.annotation, "__args__", [parameter.annotation])[0]


def convert(name, kind, text):
    """The value of --name: a str, int (0 or more: no flag here needs less), float, bool or list. Raises ValueError."""
    parse = {bool: lambda word: BOOLEANS[word.lower()], list: json.loads}.get(kind, kind)
    try:
        value = parse(text)
    except (ValueError, KeyError):
        value = None
    if value is None or (kind is int and value < 0):
        wanted = {int: "a whole number, 0 or more", float: "a number", bool: "True or False"}[kind]
        raise ValueError(f"--{name} must be {wanted}, not {text!r}")
    return value
