"""The command incr-report, by its path."""

from incr_ds.cli.report import main

if __name__ == "__main__":
    main()
