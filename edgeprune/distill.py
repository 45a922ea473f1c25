"""The same as `edgeprune distill`, for launchers that start a module: `python -m edgeprune.distill`."""

if __name__ == "__main__":
    import sys

    from edgeprune.cli import main

    sys.argv.insert(1, "distill")
    main()
