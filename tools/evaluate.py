"""The command incr-evaluate, by its path."""

from incr_ds.cli.evaluate import main

if __name__ == "__main__":
    main()
