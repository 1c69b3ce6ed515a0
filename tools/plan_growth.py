"""The command incr-plan-growth, by its path."""

from incr_ds.cli.plan_growth import main

if __name__ == "__main__":
    main()
