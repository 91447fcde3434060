"""`python -m llm_attack`: the command line, where launchers want a module."""

from llm_attack.cli import main

if __name__ == "__main__":
    main()
