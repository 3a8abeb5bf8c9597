"""The console script `nexusgen`: every command of this package under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import (
    demo,
    describe,
    edit,
    embed,
    evaluate,
    export,
    gc,
    generate,
    import_model,
    inspect,
    jobs,
    make_base,
    pack,
    plan,
    promote,
    register,
    reproduce,
    road,
    serve,
    status,
    submit,
    train,
    verify,
)
from jobs.command import main as run_command

COMMANDS = (
    demo,
    road,
    plan,
    pack,
    inspect,
    embed,
    train,
    register,
    evaluate,
    promote,
    serve,
    submit,
    jobs,
    status,
    generate,
    edit,
    describe,
    import_model,
    export,
    verify,
    reproduce,
    make_base,
    gc,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Gives the exit code: 0 done, 2 wrong usage or configuration, 1 anything else, 130 on Ctrl-C."""
    return run_command(COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
