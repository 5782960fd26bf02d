"""Writes the man pages of both programs and their shell completions, from the programs themselves.

`python deploy/man/make.py FOLDER` (`make man` writes to build/man) makes

    FOLDER/man1/liberatai.1, liberatai-agent.1, and a page per command: `man liberatai-jobs-create`
    FOLDER/bash, zsh, fish: completion scripts of both programs, as packages install them

Nothing is copied by hand: a command that is added is in the next page.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer._completion_shared import get_completion_script

from liberatai_agent import cli as agent
from liberatai_coordinator.cli import app as coordinator
from liberatai_core import __version__

SHELLS = ("bash", "zsh", "fish")
SEE = "https://github.com/liberatai/liberatai/tree/main/docs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option or argument.

    Attributes:
        names: "-o", "--output"; of an argument its name in capitals.
        value: what follows it; "" for a switch.
        text: what it does.
        choices: that its value is one of.
    """

    names: tuple[str, ...]
    value: str
    text: str
    choices: tuple[str, ...] = ()

    @property
    def is_argument(self) -> bool:
        """Whether it stands for itself."""
        return not self.names[0].startswith("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of a program, or the program itself.

    Attributes:
        words: that lead to it: ("liberatai", "jobs", "create").
        text: what it does, in a sentence or more.
        example: a line that works.
        options: in order.
        below: names of what stands below it, with what each does.
    """

    words: tuple[str, ...]
    text: str
    example: str
    options: tuple[Option, ...]
    below: tuple[tuple[str, str], ...] = ()

    @property
    def page(self) -> str:
        """Name of its page."""
        return "-".join(self.words)


def of_coordinator() -> Iterator[Command]:
    """Yield every command of `liberatai`, the program first."""

    def walk(words: tuple[str, ...], command: Any) -> Iterator[Command]:
        below = getattr(command, "commands", {})
        yield Command(
            words=words,
            text=(command.help or "").replace("\n\n", "\n").strip(),
            example=(command.epilog or "").removeprefix("Example: "),
            options=tuple(_option(one) for one in command.params),
            below=tuple((name, _first(inner.help or "")) for name, inner in below.items()),
        )
        for name, inner in below.items():
            yield from walk((*words, name), inner)

    yield from walk(("liberatai",), typer.main.get_command(coordinator.app))


def _option(found: Any) -> Option:
    if found.param_type_name == "argument":
        return Option(names=(found.metavar or found.name.upper(),), value="", text=found.help or "")
    value = "" if found.is_flag else found.metavar or found.name.upper()
    return Option(names=tuple(sorted(found.opts, key=len)), value=value, text=found.help or "")


def of_agent() -> Iterator[Command]:
    """Yield every command of `liberatai-agent`, the program first."""
    parser = agent._parser()  # noqa: SLF001 - its only user beside the program
    yield from _of_parser(("liberatai-agent",), parser, parser.description or "")


def _of_parser(words: tuple[str, ...], parser: argparse.ArgumentParser, text: str) -> Iterator[Command]:
    options, inner = [], {}
    told: dict[str, str] = {}
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            inner |= action.choices
            told |= {one.dest: one.help or "" for one in action._choices_actions}  # noqa: SLF001
            continue
        names = tuple(action.option_strings) or (str(action.metavar or action.dest).upper(),)
        value = (
            ""
            if action.nargs == 0 or not action.option_strings
            else str(action.metavar or action.dest).upper()
        )
        said = (action.help or "") % {"default": action.default, "prog": parser.prog}
        choices = tuple(map(str, action.choices or ()))
        options.append(Option(names=names, value=value, text=said, choices=choices))
    yield Command(
        words=words,
        text=text,
        example=(parser.epilog or "").removeprefix("example: "),
        options=tuple(options),
        below=tuple((name, told.get(name, "")) for name in inner),
    )
    for name, sub in inner.items():
        yield from _of_parser((*words, name), sub, sub.description or told.get(name, ""))


def _sentence(text: str) -> str:
    return _first(text).partition(". ")[0].rstrip(".")


def _first(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


# --- man pages ------------------------------------------------------------------------------------


def page(command: Command) -> str:
    """Return a page in roff."""
    lines = [
        f'.TH "{command.page.upper()}" 1 "" "LiberatAI {__version__}" "User Commands"',
        ".SH NAME",
        f"{_roff(command.page)} \\- {_roff(_sentence(command.text))}",
        ".SH SYNOPSIS",
        _synopsis(command),
        ".SH DESCRIPTION",
        "\n.PP\n".join(_roff(" ".join(part.split())) for part in command.text.split("\n") if part.strip()),
    ]
    if command.below:
        lines.append(".SH COMMANDS")
        for name, text in command.below:
            lines += [
                ".TP",
                f"\\fB{_roff(name)}\\fR",
                f"{_roff(text)} See \\fB{_roff(command.page)}\\-{_roff(name)}\\fR(1).",
            ]
    if command.options:
        lines.append(".SH OPTIONS")
        for one in command.options:
            lines += [".TP", _named(one), _roff(one.text) or "\\&"]
    if command.example:
        lines += [".SH EXAMPLE", ".EX", _roff(command.example), ".EE"]
    exits = "0 ok, 1 failed, 2 wrong usage or settings, 3 partly done, 4 not found."
    lines += [".SH EXIT STATUS", exits, ".SH SEE ALSO"]
    above = command.words[:-1]
    lines.append(f"\\fB{_roff('-'.join(above))}\\fR(1), " * bool(above) + _roff(SEE))
    return "\n".join(lines) + "\n"


def _synopsis(command: Command) -> str:
    words = f"\\fB{_roff(' '.join(command.words))}\\fR"
    if any(not one.is_argument for one in command.options):
        words += " [\\fIOPTIONS\\fR]"
    words += "".join(f" \\fI{_roff(one.names[0])}\\fR" for one in command.options if one.is_argument)
    return words + (" \\fICOMMAND\\fR" if command.below else "")


def _named(one: Option) -> str:
    if one.is_argument:
        return f"\\fI{_roff(one.names[0])}\\fR"
    value = f" \\fI{_roff('|'.join(one.choices) or one.value)}\\fR" if one.value else ""
    return ", ".join(f"\\fB{_roff(name)}\\fR" for name in one.names) + value


def _roff(text: str) -> str:
    """Return a text in which nothing is an instruction to roff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in escaped)
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in escaped.split("\n"))


# --- completion -----------------------------------------------------------------------------------


def completion(program: str, commands: list[Command], shell: str) -> str:
    """Return a script that completes commands, options and the words that options take.

    That of `liberatai` asks the program, which knows devices, jobs and models, too; the agent's asks nobody:
    a small device starts Python in seconds.
    """
    if program == "liberatai":
        return (
            get_completion_script(prog_name=program, complete_var="_LIBERATAI_COMPLETE", shell=shell) + "\n"
        )
    writer = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return writer(program, commands)


def _bash(program: str, commands: list[Command]) -> str:
    name = f"_{program.replace('-', '_')}"
    cases = []
    for one in commands:
        below = " ".join(inner for inner, _ in one.below)
        options = " ".join(
            option for found in one.options for option in found.names if option.startswith("-")
        )
        cases.append(f'        "{" ".join(one.words[1:])}") words="{f"{below} {options}".strip()}" ;;')
    values = []
    for one in commands:
        for found in one.options:
            if found.choices and not found.is_argument:
                pattern = "|".join(f'"{" ".join(one.words[1:])} {option}"' for option in found.names)
                values.append(f'        {pattern}) words="{" ".join(found.choices)}" ;;')
    known = "|".join(" ".join(one.words[1:]) for one in commands if len(one.words) > 1)
    lines = [
        f"# bash completion of {program}",
        f"{name}() {{",
        '    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD - 1]}"',
        '    local known="|' + known + '|" path="" words="" word longer',
        "    local -i place",
        "    for ((place = 1; place < COMP_CWORD; place++)); do",
        '        word="${COMP_WORDS[place]}" longer="${path:+$path }${COMP_WORDS[place]}"',
        '        case "$known" in *"|$longer|"*) path="$longer" ;; esac',
        "    done",
        '    case "$path" in',
        *cases,
        "    esac",
        '    case "$path $before" in',
        *(values or ["        *) ;;"]),
        "    esac",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        '    [ "${#COMPREPLY[@]}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$current"))',
        "}",
        f"complete -o filenames -F {name} {program}",
    ]
    return "\n".join(lines) + "\n"


def _zsh(program: str, commands: list[Command]) -> str:
    return (
        f"#compdef {program}\n# zsh completion of {program}: that of bash\n"
        "autoload -U +X bashcompinit && bashcompinit\n" + _bash(program, commands)
    )


def _fish(program: str, commands: list[Command]) -> str:
    lines = [f"# fish completion of {program}"]
    for one in commands:
        inner = " ".join(name for name, _ in one.below)
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in one.words[1:])
        lacking = f"not __fish_seen_subcommand_from {inner}" if inner else ""
        condition = "; and ".join(filter(None, (seen, lacking)))
        when = f" -n {_quoted(condition)}" if condition else ""
        lines += [f"complete -c {program}{when} -f -a {name} -d {_quoted(text)}" for name, text in one.below]
        for found in one.options:
            if found.is_argument:
                continue
            flags = "".join(
                f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
                for option in found.names
            )
            takes = (
                f" -x -a {_quoted(' '.join(found.choices))}" if found.choices else " -r" * bool(found.value)
            )
            lines.append(f"complete -c {program}{when}{flags}{takes} -d {_quoted(_first(found.text))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path) -> int:
    """Write everything; return the number of pages."""
    pages = folder / "man1"
    pages.mkdir(parents=True, exist_ok=True)
    count = 0
    for program, commands in (("liberatai", list(of_coordinator())), ("liberatai-agent", list(of_agent()))):
        for one in commands:
            (pages / f"{one.page}.1").write_text(page(one), encoding="utf-8")
            count += 1
        for shell in SHELLS:
            name = {"bash": program, "zsh": f"_{program}", "fish": f"{program}.fish"}[shell]
            place = folder / shell / name
            place.parent.mkdir(exist_ok=True)
            place.write_text(completion(program, commands, shell), encoding="utf-8")
    return count


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/man")
    print(f"{where}: {write(where)} pages, completions for {', '.join(SHELLS)}")
