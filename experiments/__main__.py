"""The command line: ``python -m experiments COMMAND [flags]``."""

import sys

import tyro

from experiments import variance

app = tyro.extras.SubcommandApp()
app.command(name="variance")(variance.main)


if __name__ == "__main__":
    try:
        app.cli(
            prog="python -m experiments",
            description="Experiments with gradients through unrolled computation.",
        )
    except (ValueError, OverflowError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
