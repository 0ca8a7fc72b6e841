"""`python -m sprint`."""

from sprint.commands import main

if __name__ == "__main__":
    main()
