"""What the user got wrong, in one line: which field, file or shard, its value, and what would be right.

The commands print the line and end with code 2. All else that is raised is a fault of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input. The message is the whole report: one line, no traceback (a list of files may follow it)."""


def wrong(field: str, value: object, reason: str) -> UserError:
    """The line for a setting that cannot be: `wrong("optim.betas", (0.9, 1.2), "each must be below 1")`."""
    return UserError(f"{field} = {value}: {reason}")
