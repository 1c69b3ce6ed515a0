"""The command incr-growth-study, by its path."""

from incr_ds.cli.growth_study import main

if __name__ == "__main__":
    main()
