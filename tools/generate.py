"""The command incr-generate, by its path."""

from incr_ds.cli.generate import main

if __name__ == "__main__":
    main()
