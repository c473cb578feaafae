"""The configurations that a command line names, and its changes to them."""

import argparse
import contextlib
import os
from pathlib import Path

from spak_jax.command_line import InputError
from spak_jax.config_files import NAMED, specification_file


def add_words(
    parser: argparse.ArgumentParser, default: str | None = None, several: bool = False
) -> None:
    """Adds to a command line what `file_and_overrides` or `files_and_overrides` reads.

    Args:
      parser: of the command line.
      default: the name of the configuration that stands for none; None where one must be named.
      several: whether more than one may be named.
    """
    # Not by argparse's own %(default)s: `parse_intermixed_args` hides the defaults of words.
    otherwise = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "words",
        nargs="+" if several else "?" if default else None,
        metavar="CONFIG",
        help=NAMED + otherwise,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="changes to it, such as model.loops=24 or name=trial",
    )
    parser.set_defaults(default_config=default)


def files_and_overrides(arguments: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The specifications that a command line names, by path or by name, and the changes to them.

    A word with `=` is a change, unless it is a file.

    Raises:
      InputError: it names none, or one that is not there.
    """
    given = arguments.words or []
    words = [given] if isinstance(given, str) else given
    files, overrides = [], []
    for word in [*words, *arguments.overrides]:
        # A file keeps the name that Python has for it, whatever the locale.
        if "=" in word and not os.path.isfile(word):
            overrides.append(_as_unicode(word))
        else:
            files.append(word)
    if not files and arguments.default_config is None:
        raise InputError(f"a configuration must be named before {' '.join(overrides)}")
    return list(map(specification_file, files or [arguments.default_config])), overrides


def file_and_overrides(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """`files_and_overrides` of a program that takes one specification.

    Raises:
      InputError: also where several are named.
    """
    files, overrides = files_and_overrides(arguments)
    if len(files) > 1:
        raise InputError(f"one configuration is expected: {', '.join(map(str, files))} are given")
    return files[0], overrides


def _as_unicode(word: str) -> str:
    """A word of the command line; without a locale Python leaves its UTF-8 undecoded."""
    with contextlib.suppress(UnicodeError):
        word.encode()
        return word
    with contextlib.suppress(UnicodeError):
        return os.fsencode(word).decode()
    return word
