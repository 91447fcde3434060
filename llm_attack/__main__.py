"""The program `llm-attack`, and `python -m llm_attack` where launchers want a module."""

import sys


def main() -> None:
    """The command line. Ctrl-C is a line from here on, also while its libraries are imported."""
    try:
        from llm_attack.cli import main as commands

        commands(prog_name="llm-attack")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
