"""What every command shares: --config with its overrides, and bad input said in one line."""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from densejax import models
from densejax.config import KEYS, UserError, default, did_you_mean, flatten, unknown_key
from densejax.runs import files, interrupt, screen, workdir

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A card, with arguments after a colon: --config=configs/cifar10.py:depth=40. "
    "--config.train.epochs=3 sets another of its keys; with --help, all of them are listed.",
)
HELP = {"-h", "-help", "--help", "--helpfull", "--helpshort"}


def run(main: Callable[..., int], config: str = "required", arguments: bool = False) -> NoReturn:
    """Parses the flags, calls `main` and exits with its code; bad input exits with 2.

    Args:
      main: gets what is no flag, one argument each.
      config: whether --config is "required", "optional", or "unused" and therefore refused.
      arguments: whether anything but flags is allowed.
    """

    # What a shell has closed is None, and its number would be that of the next file opened.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in sys.stdout, sys.stderr:  # names that the terminal's encoding lacks are escaped
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding
            stream.reconfigure(errors="backslashreplace")

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # orbax tells a story about every save
        try:
            code = main(*argv[1:])
        except UserError as error:
            _say(str(error))
            code = error.exit_code
        except KeyboardInterrupt:  # by a second signal
            interrupt.end()
        if any(future.running() for future in interrupt.stuck):
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    if HELP & set(sys.argv[1:]):
        module = sys.modules[main.__module__]
        words, keys = [word for word in sys.argv if word not in HELP], ""
        if config != "unused" and any(re.match("--?config\\b", word) for word in words):
            _parse(words, config, arguments=True)
            keys = f"\nkeys of this card:\n{described(CONFIG.value)}\n"
        own, shared = map(flags.FLAGS.module_help, (module, __name__))
        own, shared = (text.partition(":\n")[2] for text in (own, shared))  # without their names
        shared = "" if config == "unused" else f"{shared}\n"
        print(f"{module.__doc__}\nflags:\n{own}\n{shared}{keys}", end="")
        sys.exit()
    app.run(guarded, flags_parser=lambda argv: _parse(argv, config, arguments))


def require(*holders: flags.FlagHolder) -> None:
    """Raises UserError for the first of these flags that has no value."""
    for holder in holders:
        if not holder.value:
            raise UserError(f"--{holder.name}: give a value; --help explains it")


def run_directory(holder: flags.FlagHolder) -> str:
    """The directory that a flag names, or None; "latest" is the newest run, which is said."""
    if holder.value != "latest":
        return holder.value and str(files.path_of(f"--{holder.name}", holder.value))
    found = workdir.latest()
    screen.say(f"densejax: --{holder.name}=latest is {found}")
    return found


def described(config: ConfigDict) -> str:
    """Each key of a configuration with its value, what it means, and which values it takes."""
    family, lines = config.model.get("family"), []
    of_model = models.meanings(family) if family in models.FAMILIES else {}
    for key, value in flatten(config).items():
        if field := KEYS.get(key):
            words = field.allowed.words if field.allowed else "True or False"
            is_limited = field.allowed or isinstance(value, bool)
            text = field.meaning + (f" Allowed: {words}." if is_limited else "")
        else:
            text = of_model.get(key.removeprefix("model."), "")
        lines.append(f"  --config.{key}={shlex.quote(str(value))}")
        lines += textwrap.wrap(text, 79, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _parse(argv: list[str], config: str, arguments: bool) -> list[str]:
    logging.set_verbosity(logging.ERROR)  # ml_collections warns of what is refused below
    try:
        left = flags.FLAGS(argv)
        if isinstance(CONFIG.value, ConfigDict):
            flatten(CONFIG.value)
    except BaseException as error:  # a card is Python: anything may come out of it
        _stop(explain(error, argv, config != "unused"))
    given = {name: flag.value for name in flags.FLAGS if (flag := flags.FLAGS[name]).present}
    for name, value in given.items():
        if value in ("", []) and not name.startswith("config."):
            _stop(f"--{name}=: give a value, or leave the flag out for its default")
    if left[1:] and not arguments:
        _stop(f"{left[1]!r} is no flag; flags look like --config=configs/digits.py")
    if "config" not in given and config == "required":
        _stop("--config: name a card, such as --config=configs/digits.py")
    if "config" in given and config == "unused":
        _stop("--config: nothing here reads it; a run has its own config.json")
    if "config" in given and not isinstance(CONFIG.value, ConfigDict):
        file = flags.FLAGS["config"].config_filename
        said = getattr(CONFIG.value, "_error", "get_config returns no ConfigDict")
        if not os.path.exists(file.partition(":")[0]):
            said = "there is no such file; cards are in configs/"
        _stop(f"--config={file}: {said}")
    return left


def _stop(text: str) -> NoReturn:
    _say(text)
    sys.exit(UserError.exit_code)


def _say(text: str) -> None:
    screen.say(f"densejax: {UserError(text)}")


def explain(error: BaseException, argv: list[str], reads_config: bool = True) -> str:
    """What a user is told of an error in reading flags: one line."""
    text = str(error)
    given = dict(re.findall(r"^--?config\.([\w.]+)=?(.*)$", "\n".join(argv), re.MULTILINE))
    known = flatten(default())
    for name in models.MODELS:
        known |= flatten({"model": models.fields(name)})
    for key in given if isinstance(error, AttributeError | KeyError) else ():
        if key not in known:
            return unknown_key(key, known)
    if isinstance(error, flags.UnrecognizedFlagError) and reads_config:
        if error.flagname.startswith("config."):
            return f"--{error.flagname}: give the card, too, such as --config=configs/digits.py"
        if hint := did_you_mean(error.flagname, [f"--config.{key}" for key in known]):
            return f"unknown flag --{error.flagname}{hint}"
    if wrong := re.match(r"flag --config\.([\w.]+)=", text):
        if keys := [key for key in known if key.startswith(f"{wrong[1]}.")]:
            return f"{wrong[1]} is a section; set one of its keys: {', '.join(keys)}"
        kind = type(known.get(wrong[1])).__name__
        wanted = "a Python literal" if kind == "NoneType" else f"a value of type {kind}"
        return f"{wrong[1]} = {given.get(wrong[1])}: give {wanted}"
    if "get_config" in text and isinstance(error, AttributeError):
        return "--config: the file is no card, it has no function get_config"
    # A card's own error comes as a traceback in the text, of one escaped line if it is a UserError.
    _, is_own, said = text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    if is_own:
        return said.removesuffix("\\n")
    last = text.strip().rpartition("\n")[2]
    kind = type(error).__name__
    return last if isinstance(error, flags.Error) else f"--config: the card raises {kind} {last}"
