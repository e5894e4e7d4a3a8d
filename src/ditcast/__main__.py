"""`python -m ditcast`."""

from ditcast.cli import main

if __name__ == "__main__":
    main()
