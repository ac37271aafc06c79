"""`python -m trainer.commands COMMAND ...` is the same as `socratic COMMAND ...`."""

from trainer.commands.main import main

if __name__ == "__main__":
    main()
