"""The program `llm-attack`; also `python -m llm_attack`, for launchers that need a module."""

import sys


def main() -> None:
    """Runs the command line. From here on, Ctrl-C ends in one line, even during imports."""
    try:
        from llm_attack.cli import main as commands

        commands(prog_name="llm-attack")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
